"""The sensor that looks at every source of the catalog, and has optimized what is new there."""

import time
from collections.abc import Callable
from functools import partial

import dagster as dg

from assets.checkpoint import checkpoint
from assets.freshness import REVISION_TAG
from assets.partitions import PARTITION_TAG, models
from orchestration.automation.sensor_state import RETRY_SECONDS, Cursor, Ended, Memory, Newest, decide, is_due, saw
from orchestration.runs.jobs import optimize
from orchestration.runs.under_way import models_under_way
from resources.catalog.entries import ModelEntry
from resources.catalog.loading import Catalog
from resources.checkpoints.sources.reference import kind_of
from resources.checkpoints.watch.hub import is_pinned
from resources.checkpoints.watch.pool import Looks
from resources.checkpoints.watch.probe import REMOTE, Seen, look
from resources.errors import CheckpointError, StorageError
from resources.settings.workspace import WATCH_SECONDS, Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.step import Work

#: A tick's, of which Dagster ends one after 60.
TICK_SECONDS = 8.0
#: Of these, what is kept for deciding once everybody has been asked.
_DECIDE_SECONDS = 2.0
#: Sources of servers that are looked at in half a minute: the Hub answers who has no account 500 times in five.
MOST_REMOTE = 40
#: Runs asked for in one tick; what is left comes with the next.
MOST_RUNS = 25
#: So long after `refinery optimize` has added an entry, its run is there: it was seen to take 2 to 3.
ADDED_SECONDS = 15.0
#: Of what is waited for, in a tick's summary.
_MOST_LINES = 20
REASON_TAG, ATTEMPT_TAG = "refinery/reason", "refinery/attempt"
_SENSOR_TAG = "dagster/sensor_name"
SENSOR = "new_checkpoints"

_ENDED: dict[dg.DagsterRunStatus, Ended] = {
    dg.DagsterRunStatus.SUCCESS: "success",
    dg.DagsterRunStatus.FAILURE: "failure",
    dg.DagsterRunStatus.CANCELED: "canceled",
}


def checkpoint_sensor(interval_s: int) -> dg.SensorDefinition:
    """The sensor, looking again after `interval_s` at the soonest."""
    looks = Looks()

    @dg.sensor(
        name=SENSOR,
        job=optimize,
        minimum_interval_seconds=interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks at every source of the catalog, and has a model optimized when its revision is new.",
    )
    def new_checkpoints(context: dg.SensorEvaluationContext, workspace: dg.ResourceParam[Workspace]) -> dg.SensorResult:
        # The partitions first: `refinery optimize` makes an entry, then its partition.
        tick = _Tick(context.instance, workspace, Cursor.read(context.cursor), time.time())
        catalog = workspace.catalog()  # what is wrong with it fails the tick, and nobody is taken out
        tick.retire(catalog)
        tick.look(catalog, looks)
        tick.decide(catalog)
        for why in catalog.refused.values():
            context.log.warning(why)
        for line in tick.lines:
            context.log.info(line)
        return tick.result(catalog)

    return new_checkpoints


class _Tick:
    """One evaluation. lines: what happened, for people."""

    def __init__(self, instance: dg.DagsterInstance, workspace: Workspace, cursor: Cursor, now: float) -> None:
        self._instance, self._workspace, self._now = instance, workspace, now
        self._began = time.monotonic()
        self._deadline = self._began + TICK_SECONDS
        self._models = {name: memory.as_of(now) for name, memory in cursor.models.items()}
        self._partitions = set(instance.get_dynamic_partitions(models.name or ""))
        self._retired: list[str] = []
        self._busy: set[str] = set()
        self._requests: list[dg.RunRequest] = []
        self._events: list[dg.AssetObservation] = []
        self.lines: list[str] = []

    def retire(self, catalog: Catalog) -> None:
        """Forget models that are not in the catalog any more. Their releases stay, and are served."""
        if catalog.refused:  # nobody knows which models those files hold
            return
        gone = self._partitions.union(self._models) - {*catalog.names}
        for name in sorted(gone):
            memory = self._models.pop(name, None)
            if name in self._partitions:
                self._retired.append(name)
                source = memory.source if memory is not None else "unknown"
                self._tell(name, source, "Taken out of the catalog. Its releases stay, and are served.")

    def look(self, catalog: Catalog, looks: Looks) -> None:
        """Look at as many sources as there is time for; those that were not reached are the first of the next tick."""
        jobs: dict[tuple[str, str], Callable[[], Seen]] = {}
        interval_s, remote = self._workspace.watch_seconds, 0
        most_remote = max(1, MOST_REMOTE * interval_s // WATCH_SECONDS)
        for entry in sorted(catalog.models, key=lambda entry: self._memory(entry).looked):
            memory = self._models[entry.name] = self._memory(entry)
            if _is_remote(entry):
                if remote == most_remote or not is_due(memory, self._now, interval_s):
                    continue
                remote += 1
            jobs[entry.name, entry.source] = partial(
                look,
                entry,
                memory.seen,
                self._workspace.sources,
                interval_s=interval_s,
                now=self._now,
            )
        for (name, _), outcome in looks.take(jobs, self._deadline - _DECIDE_SECONDS).items():
            self._models[name] = saw(self._models[name], outcome, self._now)

    def decide(self, catalog: Catalog) -> None:
        """Ask for runs of what is new, and tell what is wrong."""
        self._busy = busy = models_under_way(self._instance)
        # New revisions first. What was asked for is only waited for, and what is stuck for ever must not be in the way.
        turn = int(self._now) % max(1, len(catalog.models))
        for entry in sorted((*catalog.models[turn:], *catalog.models[:turn]), key=self._was_asked):
            memory = self._models[entry.name]
            undecided = memory.revision and not memory.done == memory.asked == memory.revision
            free = entry.name not in busy and not self._just_added(entry)
            if undecided and free and time.monotonic() < self._deadline:
                memory = self._decided(entry, memory)
            self._models[entry.name] = self._told(entry, memory)

    def _was_asked(self, entry: ModelEntry) -> bool:
        memory = self._models[entry.name]
        return memory.asked == memory.revision

    def _decided(self, entry: ModelEntry, memory: Memory) -> Memory:
        try:
            collected = self._collected(entry)
        except StorageError as error:  # the store is elsewhere and away, for the others too: no run could use it
            self.lines.append(str(error))
            self._deadline = self._began
            return memory
        decision = decide(memory, self._newest(entry.name), collected, self._now)
        if not decision.reason:
            return decision.memory
        return self._ask(entry, decision.memory, decision.reason) if len(self._requests) < MOST_RUNS else memory

    def _just_added(self, entry: ModelEntry) -> bool:
        """Whether a command has added the entry so shortly ago that its own run of it may not be there yet."""
        try:
            added = (self._workspace.additions / f"{entry.name}.yaml").stat().st_mtime
        except FileNotFoundError:
            return False
        return 0 <= self._now - added < ADDED_SECONDS

    def result(self, catalog: Catalog) -> dg.SensorResult:
        """What Dagster is to do."""
        new = [name for name in catalog.names if name not in self._partitions]
        changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
        if new:
            changes.append(models.build_add_request(new))
        if self._retired:
            changes.append(models.build_delete_request(self._retired))
        return dg.SensorResult(
            run_requests=self._requests,
            # Shown with the tick, where nothing else would be.
            skip_reason=None if self._requests else "\n".join(self.lines) or self._quiet(catalog),
            cursor=Cursor(models=self._models).text(),
            dynamic_partitions_requests=changes,
            asset_events=self._events,
        )

    def _memory(self, entry: ModelEntry) -> Memory:
        """What is known of the entry's source. Of another source nothing is, but run keys must not come back."""
        memory = self._models.get(entry.name)
        if memory is None or memory.source == entry.source:
            return memory or Memory(source=entry.source)
        return Memory(source=entry.source, attempt=memory.attempt, problem=memory.problem)

    def _newest(self, model: str) -> Newest | None:
        """The newest run of the job for the model, where none is under way."""
        which = dg.RunsFilter(job_name=optimize.name, tags={PARTITION_TAG: model})
        for record in self._instance.get_run_records(which, limit=1):
            run, created = record.dagster_run, record.create_timestamp.timestamp()
            if run.status in _ENDED:
                return Newest(
                    run_id=run.run_id, ended=_ENDED[run.status], created=created, at=record.end_time or created
                )
        return None

    def _collected(self, entry: ModelEntry) -> str:
        """The revision of this source that the newest run took; empty: none. Its files may be elsewhere."""
        record = Work(self._workspace, entry).last(CHECKPOINT)
        return record.revision if record is not None and record.source == entry.source else ""

    def _ask(self, entry: ModelEntry, memory: Memory, reason: str) -> Memory:
        if memory.attempt == 1:  # not what was asked before the cursor was lost, or the model was away
            which = dg.RunsFilter(tags={_SENSOR_TAG: SENSOR, PARTITION_TAG: entry.name})
            memory = memory.model_copy(update={"attempt": 1 + self._instance.get_runs_count(which)})
        attempt = str(memory.attempt)
        self._requests.append(
            dg.RunRequest(
                run_key=f"{entry.name}:{memory.asked}:{attempt}",
                partition_key=entry.name,
                # With the partition's own tag Dagster does not look for the partition, which this tick may add.
                tags={
                    PARTITION_TAG: entry.name,
                    REVISION_TAG: memory.asked,
                    REASON_TAG: reason,
                    ATTEMPT_TAG: attempt,
                },
            )
        )
        self.lines.append(f"{entry.name}: {reason}: revision {memory.asked} is optimized")
        return memory

    def _told(self, entry: ModelEntry, memory: Memory) -> Memory:
        """Say what is wrong once, and once that it is right again."""
        problem = memory.error or memory.stuck
        if problem == memory.problem:
            return memory
        self._tell(entry.name, entry.source, problem or "What was wrong is right again.", problem)
        return memory.model_copy(update={"problem": problem})

    def _tell(self, model: str, source: str, text: str, problem: str = "") -> None:
        metadata = {"source": source, "problem": problem or "none"}
        self._events.append(dg.AssetObservation(checkpoint.key, partition=model, description=text, metadata=metadata))
        self.lines.append(f"{model}: {text}")

    def _quiet(self, catalog: Catalog) -> str:
        waiting = [
            f"{name}: {memory.seen.waiting}"
            for name, memory in sorted(self._models.items())
            if memory.seen is not None and memory.seen.waiting
        ]
        waiting += [
            f"{name}: revision {memory.asked} is not optimized yet after try {memory.tries} of {len(RETRY_SECONDS) + 1}"
            for name, memory in sorted(self._models.items())
            if memory.tries and memory.asked == memory.revision and not memory.stuck and name not in self._busy
        ]
        wrong = sum(bool(memory.problem) for memory in self._models.values())
        said = f"{len(catalog.models)} models, nothing new"
        return "\n".join([f"{said}; something is wrong with {wrong}" if wrong else said, *waiting[:_MOST_LINES]])


def _is_remote(entry: ModelEntry) -> bool:
    """Whether a look at its source asks a server."""
    try:
        kind = kind_of(entry.source)
        return kind in REMOTE and not (kind == "hub" and is_pinned(entry.source))
    except CheckpointError:  # of no kind: looking at it says so
        return False
