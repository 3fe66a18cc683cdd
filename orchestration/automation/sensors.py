"""The sensor that looks at every source of the catalog, and requests runs for new revisions."""

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

#: The time for one tick. Dagster ends a tick after 60 seconds.
TICK_SECONDS = 8.0
#: The part of that time that is kept for decisions, after the looks at the sources.
_DECIDE_SECONDS = 2.0
#: The number of sources on servers that are looked at in half a minute. The Hub answers a client without an account 500
#: times in five minutes.
MOST_REMOTE = 40
#: The number of runs that one tick requests. The next tick requests the rest.
MOST_RUNS = 25
#: This long after `refinery optimize` has added an entry, its run exists. That was seen to take 2 to 3 seconds.
ADDED_SECONDS = 15.0
#: The number of lines on models that wait, in a tick's summary.
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
    """Return the sensor, which looks again after `interval_s` seconds at the earliest."""
    looks = Looks()

    @dg.sensor(
        name=SENSOR,
        job=optimize,
        minimum_interval_seconds=interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks at every source of the catalog, and starts a run for each model with a new revision.",
    )
    def new_checkpoints(context: dg.SensorEvaluationContext, workspace: dg.ResourceParam[Workspace]) -> dg.SensorResult:
        # The tick reads the partitions before the catalog, because `refinery optimize` adds an entry before its
        # partition. A partition without an entry is thus an old one.
        tick = _Tick(context.instance, workspace, Cursor.read(context.cursor), time.time())
        catalog = workspace.catalog()  # an error in the catalog fails the tick, and no model is retired
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
    """One evaluation of the sensor. Its `lines` tell people what happened."""

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
        """Forget models that are not in the catalog any more. Their releases stay, and go on serving."""
        if catalog.refused:  # nobody knows which models those files hold
            return
        gone = self._partitions.union(self._models) - {*catalog.names}
        for name in sorted(gone):
            memory = self._models.pop(name, None)
            if name in self._partitions:
                self._retired.append(name)
                source = memory.source if memory is not None else "unknown"
                self._tell(name, source, "The model left the catalog. Its releases stay and are served.")

    def look(self, catalog: Catalog, looks: Looks) -> None:
        """Look at as many sources as there is time for. The next tick begins with those that were not reached."""
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
        """Request runs for new revisions, and report problems."""
        self._busy = busy = models_under_way(self._instance)
        # New revisions come first. The others wait for a run or are stuck, and must not keep a new one waiting.
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
        except StorageError as error:  # object storage does not answer, so no run of any model could use it
            self.lines.append(str(error))
            self._deadline = self._began
            return memory
        decision = decide(memory, self._newest(entry.name), collected, self._now)
        if not decision.reason:
            return decision.memory
        return self._ask(entry, decision.memory, decision.reason) if len(self._requests) < MOST_RUNS else memory

    def _just_added(self, entry: ModelEntry) -> bool:
        """Return whether a command added the entry so recently that the command's own run may not exist yet."""
        try:
            added = (self._workspace.additions / f"{entry.name}.yaml").stat().st_mtime
        except FileNotFoundError:
            return False
        return 0 <= self._now - added < ADDED_SECONDS

    def result(self, catalog: Catalog) -> dg.SensorResult:
        """Return the runs and partitions that Dagster is to add, the new cursor, and the events of this tick."""
        new = [name for name in catalog.names if name not in self._partitions]
        changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
        if new:
            changes.append(models.build_add_request(new))
        if self._retired:
            changes.append(models.build_delete_request(self._retired))
        return dg.SensorResult(
            run_requests=self._requests,
            # Dagster shows this text with a tick that requests no run.
            skip_reason=None if self._requests else "\n".join(self.lines) or self._quiet(catalog),
            cursor=Cursor(models=self._models).text(),
            dynamic_partitions_requests=changes,
            asset_events=self._events,
        )

    def _memory(self, entry: ModelEntry) -> Memory:
        """Return the memory of the entry's source.

        If the entry has a new source, the memory begins anew, but for the number of attempts, because run keys must not
        be used twice, and for the problem that was last reported.
        """
        memory = self._models.get(entry.name)
        if memory is None or memory.source == entry.source:
            return memory or Memory(source=entry.source)
        return Memory(source=entry.source, attempt=memory.attempt, problem=memory.problem)

    def _newest(self, model: str) -> Newest | None:
        """Return the newest run of the job for the model, or None if there is no run or it has not ended."""
        which = dg.RunsFilter(job_name=optimize.name, tags={PARTITION_TAG: model})
        for record in self._instance.get_run_records(which, limit=1):
            run, created = record.dagster_run, record.create_timestamp.timestamp()
            if run.status in _ENDED:
                return Newest(
                    run_id=run.run_id, ended=_ENDED[run.status], created=created, at=record.end_time or created
                )
        return None

    def _collected(self, entry: ModelEntry) -> str:
        """Return the revision of this source that was collected last, or an empty text if there is none.

        The files of that checkpoint may be on another machine.
        """
        record = Work(self._workspace, entry).last(CHECKPOINT)
        return record.revision if record is not None and record.source == entry.source else ""

    def _ask(self, entry: ModelEntry, memory: Memory, reason: str) -> Memory:
        if memory.attempt == 1:
            # The cursor may have been lost, or the model retired for a while. Run keys of that time are not used again.
            which = dg.RunsFilter(tags={_SENSOR_TAG: SENSOR, PARTITION_TAG: entry.name})
            memory = memory.model_copy(update={"attempt": 1 + self._instance.get_runs_count(which)})
        attempt = str(memory.attempt)
        self._requests.append(
            dg.RunRequest(
                run_key=f"{entry.name}:{memory.asked}:{attempt}",
                partition_key=entry.name,
                # With this tag Dagster does not look up the partition, which may be one that this tick only adds.
                tags={
                    PARTITION_TAG: entry.name,
                    REVISION_TAG: memory.asked,
                    REASON_TAG: reason,
                    ATTEMPT_TAG: attempt,
                },
            )
        )
        self.lines.append(f"{entry.name}: a run for revision {memory.asked} was requested ({reason})")
        return memory

    def _told(self, entry: ModelEntry, memory: Memory) -> Memory:
        """Report a problem once, report its end once, and return the memory with the problem that was reported."""
        problem = memory.error or memory.stuck
        if problem == memory.problem:
            return memory
        self._tell(entry.name, entry.source, problem or "The problem is gone.", problem)
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
        return "\n".join([f"{said}; {wrong} with a problem" if wrong else said, *waiting[:_MOST_LINES]])


def _is_remote(entry: ModelEntry) -> bool:
    """Return whether a look at the entry's source asks a server."""
    try:
        kind = kind_of(entry.source)
        return kind in REMOTE and not (kind == "hub" and is_pinned(entry.source))
    except CheckpointError:  # the source is of no known kind, which the look reports
        return False
