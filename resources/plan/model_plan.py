"""The plan of one model: its steps, each with its state and the reasons for that state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resources.artifacts.fingerprint import fingerprint

#: `reused`: the step's artifact exists and is current.
#: `found`: the artifact exists, but another one is current. A run makes it the current one in milliseconds.
#: `run`: a run would make the artifact.
#: `follows`: whether a run would make the artifact is known only after another step.
#: `retry`: the step failed before with the same inputs. A run tries again, but is not started for that alone.
#: `elsewhere`: the artifact was made on a machine with another device, and only that machine can tell its state.
State = Literal["reused", "found", "run", "follows", "retry", "elsewhere"]


@dataclass(frozen=True)
class PlannedStep:
    """One step of the pipeline, with its state.

    Args:
        step: The name of the step's asset in Dagster, with `/` between the parts.
        state: What a run would do with the step.
        reasons: The reasons why the step is not reused, each in a few words.
        digest: The digest of the artifact; empty if it is not known yet.
        seconds: How long the last artifact of the step took to make. 0 means unknown.
    """

    step: str
    state: State
    reasons: tuple[str, ...] = ()
    digest: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelPlan:
    """The plan of a run of one model.

    Args:
        model: The model's name.
        steps: The steps in the order of the run.
        error: The error with which the run would fail, as far as that can be known. The steps then end before it.
    """

    model: str
    steps: tuple[PlannedStep, ...]
    error: str = ""

    @property
    def differing(self) -> tuple[PlannedStep, ...]:
        """The steps whose artifacts a run may change. If there are none, there is no reason for a run."""
        return tuple(step for step in self.steps if step.state in ("found", "run", "follows"))

    @property
    def digest(self) -> str:
        """The digest of the differing steps. Two plans with the same digest describe the same run."""
        return fingerprint("plan", model=self.model, steps=self.differing)
