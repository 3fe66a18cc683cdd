"""A plan: the steps of one model, each with what would become of it and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resources.artifacts.fingerprint import fingerprint

#: `reused`: it is there, and current. `found`: it is there, and something else is current, so that a run takes it up in
#: milliseconds. `run`: it would be made. `follows`: whether it would be is known once something else is made.
#: `retry`: it failed with just these inputs before; a run tries again, and is not made for that alone.
#: `elsewhere`: it was made on a machine with another device than this one, which alone can tell.
State = Literal["reused", "found", "run", "follows", "retry", "elsewhere"]


@dataclass(frozen=True)
class PlannedStep:
    """One step of the pipeline: an asset, by its name in Dagster, with `/` between the parts.

    reasons: why it is not reused, each in a few words. seconds: what making the one that is there now took; 0: unknown.
    """

    step: str
    state: State
    reasons: tuple[str, ...] = ()
    digest: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelPlan:
    """What a run of one model would do. error: where it would fail, as far as that can be known; no later step is
    among the steps then.
    """

    model: str
    steps: tuple[PlannedStep, ...]
    error: str = ""

    @property
    def differing(self) -> tuple[PlannedStep, ...]:
        """The steps of which something may be another afterwards; none: there is no reason for a run."""
        return tuple(step for step in self.steps if step.state in ("found", "run", "follows"))

    @property
    def digest(self) -> str:
        """Of all that a run would begin from: the same digest, the same run."""
        return fingerprint("plan", model=self.model, steps=self.differing)
