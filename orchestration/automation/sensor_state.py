"""What the sensor remembers of a model from tick to tick, and when it asks for a run. Pure: no clock, no store."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from resources.checkpoints.watch.probe import Seen

#: What is waited after the first failure of a revision, and after the second; a third is the last.
RETRY_SECONDS = (300.0, 1800.0)
#: A run that was asked for and is still not there by then was lost, or removed.
LAUNCH_SECONDS = 600.0
#: Of a source that failed once, twice, ...: doubled each time, until it is looked at so seldom.
SELDOM_SECONDS = 600.0
#: The clock of the run's record may be another's.
_CLOCKS_SECONDS = 5.0

Ended = Literal["success", "failure", "canceled"]


class Memory(BaseModel):
    """One model's part of the cursor. Times in seconds since 1970, 0: never.

    seen: what its source held when it was last looked at; failures: looks that came to nothing since then.
    asked: the revision that a run was asked for last, or that was found optimized; tries: runs for that one; attempt:
    runs ever, which a run key has to name, because Dagster remembers run keys for ever.
    done: the revision that is optimized. error, stuck: why the source cannot be looked at, and why what it holds is not
    tried again. problem: what of these people were told last.
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
        """What could be optimized now: nothing while the source fails."""
        return self.seen.revision if self.seen is not None and not self.error else ""

    def as_of(self, now: float) -> Memory:
        """The same without times that are still to come: once a clock is put back, nothing waits until it caught up."""
        changes: dict[str, object] = {name: now for name in ("looked", "asked_at") if getattr(self, name) > now}
        if self.seen is not None and self.seen.since > now:
            changes["seen"] = self.seen.model_copy(update={"since": now})
        return self.model_copy(update=changes) if changes else self


class Cursor(BaseModel):
    """What Dagster keeps between two ticks."""

    models: dict[str, Memory] = {}

    @classmethod
    def read(cls, text: str | None) -> Cursor:
        """An empty one where there is none yet, or one of another version."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()

    def text(self) -> str:
        return self.model_dump_json(exclude_defaults=True)


class Newest(BaseModel):
    """The newest run of a model, which has ended. created, at: when it was made and when it ended, since 1970."""

    model_config = ConfigDict(frozen=True)
    run_id: str
    ended: Ended
    created: float
    at: float


class Decision(BaseModel):
    """What to remember, and why a run is wanted; empty: none is."""

    model_config = ConfigDict(frozen=True)
    memory: Memory
    reason: str = ""


def is_due(memory: Memory, now: float, interval_s: float) -> bool:
    """Whether a source that failed is to be looked at again."""
    return now - memory.looked >= min(SELDOM_SECONDS, interval_s * (2**memory.failures - 1) / 2)


def saw(memory: Memory, outcome: Seen | Exception, now: float) -> Memory:
    """The memory after a look."""
    if isinstance(outcome, Exception):
        return memory.model_copy(
            update={"looked": now, "error": str(outcome), "failures": min(memory.failures + 1, 20)}
        )
    return memory.model_copy(update={"looked": now, "seen": outcome, "error": outcome.problem, "failures": 0})


def decide(memory: Memory, newest: Newest | None, collected: str, now: float) -> Decision:
    """Whether a run is wanted for what the source holds. Only for a model of which no run is under way.

    newest: its newest run, which has ended. collected: the revision that the artifact store has of this source.
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
        last = "of which Dagster knows nothing"
    elif newest.ended == "canceled":  # somebody did not want it
        return Decision(memory=memory)
    else:
        ended_at, last = newest.at, f"the last was {newest.run_id}"
    if memory.tries > len(RETRY_SECONDS):
        stuck = (
            f"{memory.tries} runs did not optimize revision {revision}, {last}. There is another when the revision "
            "changes, or by hand: the job 'optimize' for this partition."
        )
        return Decision(memory=memory.model_copy(update={"stuck": stuck}))
    # What ended in time to come did so before the clock was put back.
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
