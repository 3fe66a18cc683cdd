"""The sensor's memory of each model between ticks, and its decisions on runs, as pure functions of that memory.

The functions read no clock and no store.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from resources.checkpoints.watch.probe import Seen

#: The waiting times after the first and the second failed run of a revision. There is no run after the third failure.
RETRY_SECONDS = (300.0, 1800.0)
#: A run that was requested and that Dagster does not know after this time was lost or removed.
LAUNCH_SECONDS = 600.0
#: The longest time between two looks at a source that fails. The time doubles with each failure until it is this long.
SELDOM_SECONDS = 600.0
#: The times of a run's record may come from the clock of another machine, which may differ by this much.
_CLOCKS_SECONDS = 5.0

Ended = Literal["success", "failure", "canceled"]


class Memory(BaseModel):
    """One model's part of the cursor. Times are in seconds since 1970, and 0 means never.

    Args:
        source: The model's source in the catalog.
        seen: The result of the last look at the source that succeeded.
        looked: When the source was last looked at.
        failures: The number of looks that failed since the last success.
        error: Why the source cannot be looked at.
        asked: The revision for which a run was last requested, or which was found optimized.
        asked_at: When that run was requested.
        tries: The number of runs that were requested for that revision.
        attempt: The number of runs that were ever requested. Run keys contain it, because Dagster remembers run keys
            for ever.
        done: The revision that is optimized.
        stuck: Why the revision is not tried again.
        problem: The value of `error` or `stuck` that was last reported to people.
    """

    model_config = ConfigDict(frozen=True)
    source: str
    seen: Seen | None = None
    looked: float = 0.0
    failures: int = 0
    error: str = ""
    asked: str = ""
    asked_at: float = 0.0
    tries: int = 0
    attempt: int = 0
    done: str = ""
    stuck: str = ""
    problem: str = ""

    @property
    def revision(self) -> str:
        """The revision that could be optimized now. It is empty while the source fails."""
        return self.seen.revision if self.seen is not None and not self.error else ""

    def as_of(self, now: float) -> Memory:
        """Return the memory with `now` in place of recorded times that lie in the future.

        After a clock is set back, such times would otherwise block the source until the clock catches up.
        """
        changes: dict[str, object] = {name: now for name in ("looked", "asked_at") if getattr(self, name) > now}
        if self.seen is not None and self.seen.since > now:
            changes["seen"] = self.seen.model_copy(update={"since": now})
        return self.model_copy(update=changes) if changes else self


class Cursor(BaseModel):
    """The sensor's cursor, which Dagster keeps between two ticks."""

    models: dict[str, Memory] = {}

    @classmethod
    def read(cls, text: str | None) -> Cursor:
        """Return the cursor, or an empty one if there is none yet or it is of another version."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()

    def text(self) -> str:
        """Return the cursor as JSON, without values that are the default."""
        return self.model_dump_json(exclude_defaults=True)


class Newest(BaseModel):
    """The newest run of a model, which has ended.

    Args:
        run_id: The run's id.
        ended: How the run ended.
        created: When the run was created, in seconds since 1970.
        at: When the run ended, in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)
    run_id: str
    ended: Ended
    created: float
    at: float


class Decision(BaseModel):
    """The memory after a decision, and whether a run is wanted.

    Args:
        memory: What the sensor is to remember.
        reason: Why a run is wanted. It is empty if none is.
    """

    model_config = ConfigDict(frozen=True)
    memory: Memory
    reason: str = ""


def is_due(memory: Memory, now: float, interval_s: float) -> bool:
    """Return whether the source is to be looked at now. A source that fails is looked at less often."""
    return now - memory.looked >= min(SELDOM_SECONDS, interval_s * (2**memory.failures - 1) / 2)


def saw(memory: Memory, outcome: Seen | Exception, now: float) -> Memory:
    """Return the memory after a look, which ended with a result or an error."""
    if isinstance(outcome, Exception):
        return memory.model_copy(
            update={"looked": now, "error": str(outcome), "failures": min(memory.failures + 1, 20)}
        )
    return memory.model_copy(update={"looked": now, "seen": outcome, "error": outcome.problem, "failures": 0})


def decide(memory: Memory, newest: Newest | None, collected: str, now: float) -> Decision:
    """Decide whether a run is wanted for the revision that the source holds.

    Args:
        memory: The memory of a model of which no run is under way.
        newest: The model's newest run, which has ended.
        collected: The revision of this source that the artifact store has.
        now: The time in seconds since 1970.
    """
    revision = memory.revision
    if not revision or memory.done == revision == memory.asked:
        return Decision(memory=memory)
    if newest is not None and newest.ended == "success" and collected == revision:
        return Decision(memory=memory.model_copy(update={"asked": revision, "done": revision, "tries": 0, "stuck": ""}))
    if memory.asked != revision:
        before = memory.done or collected
        return _ask(memory, 1, f"{before} -> {revision}" if before else "new", now)
    if newest is None or newest.created < memory.asked_at - _CLOCKS_SECONDS:
        ended_at, lost = memory.asked_at, now - memory.asked_at >= LAUNCH_SECONDS
        if not lost:
            return Decision(memory=memory)
        last = "Dagster has no record of the last one"
    elif newest.ended == "canceled":  # somebody did not want the run
        return Decision(memory=memory)
    else:
        ended_at, last = newest.at, f"the last was {newest.run_id}"
    if memory.tries > len(RETRY_SECONDS):
        stuck = (
            f"{memory.tries} runs did not optimize revision {revision}; {last}. The next run starts when the revision "
            "changes. To try again now, start the job 'optimize' for this partition."
        )
        return Decision(memory=memory.model_copy(update={"stuck": stuck}))
    # If the end lies in the future, it was recorded before the clock was set back, and the wait is over.
    if -_CLOCKS_SECONDS <= now - ended_at < RETRY_SECONDS[memory.tries - 1]:
        return Decision(memory=memory)
    return _ask(memory, memory.tries + 1, f"try {memory.tries + 1} of {len(RETRY_SECONDS) + 1}", now)


def _ask(memory: Memory, tries: int, reason: str, now: float) -> Decision:
    changes = {
        "asked": memory.revision,
        "asked_at": now,
        "tries": tries,
        "attempt": memory.attempt + 1,
        "done": "",
        "stuck": "",
    }
    return Decision(memory=memory.model_copy(update=changes), reason=reason)
