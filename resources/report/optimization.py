"""The data of an optimization's report.

The data is kept beside the report, so that facts about serving can be added later, and so that the next optimization
can show the changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from resources.artifacts.fingerprint import library_versions
from resources.artifacts.records import (
    BenchmarkReport,
    Champion,
    Checkpoint,
    Engine,
    EvaluationSet,
    LengthProfile,
    ServingConfiguration,
    ServingReport,
)
from resources.catalog.entries import ModelEntry, Objective
from resources.engines.specs import BASELINE, LIBRARIES
from resources.settings.workspace import Workspace
from resources.tasks import TASKS
from resources.tasks.base import bound_of

_CONFIG = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)


class Gate(BaseModel):
    """One accuracy gate: the metric of that name must be at least, or at most, the limit."""

    model_config = _CONFIG
    name: str
    bound: Literal["least", "most"]
    limit: float

    @property
    def best(self) -> float:
        """The metric's value when the answers equal PyTorch's."""
        return 1.0 if self.bound == "least" else 0.0

    def kept_by(self, value: float) -> bool:
        """Return whether the value keeps the gate. NaN keeps no gate."""
        return value >= self.limit if self.bound == "least" else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.bound == 'least' else '≤'} {self.limit:g}"


class Changes(BaseModel):
    """The differences from an earlier optimization.

    Args:
        inputs: The inputs that differ, each with its name and its values before and now.
        candidates: One row for each engine, see resources.report.changes.
    """

    model_config = _CONFIG
    inputs: tuple[tuple[str, str, str], ...] = ()
    candidates: tuple[tuple[str, str, str, str, str], ...] = ()


class Before(BaseModel):
    """The latest finished optimization of the same model and target.

    Args:
        run_id: The id of its MLflow run.
        url: The address of that run's page.
        changes: The differences from it, or None if it left no readable report.
    """

    model_config = _CONFIG
    run_id: str
    url: str
    changes: Changes | None = None


class OptimizationReport(BaseModel):
    """One optimization of one model for one target.

    Args:
        reports: The champion's report, and the reports on the engines that it was chosen from.
    """

    model_config = _CONFIG
    model: str
    target: str
    source: str
    revision: str
    task: str
    device: str
    evaluation_items: int
    libraries: dict[str, str]
    configuration: dict[str, str] = Field(description="The catalog's, fields of fields with a dot; and the threads.")
    objective: Objective
    gates: tuple[Gate, ...]
    champion: Champion
    reports: tuple[BenchmarkReport, ...]
    lengths: LengthProfile | None = None
    before: Before | None = Field(default=None, description="None: it is the first.")
    dagster_run: str = ""
    dagster_url: str = Field(default="", description="Its page; empty: none is configured.")
    serving: ServingConfiguration | None = None
    load: ServingReport | None = None
    release: int | None = Field(default=None, description="Triton's; None: not released yet.")

    @property
    def title(self) -> str:
        """The title of the report's plots."""
        return f"{self.model} on {self.target}: {self.device}"

    @property
    def inaccurate(self) -> frozenset[str]:
        """The engines that were measured and miss a gate, without PyTorch, which is the baseline."""
        eligible = {verdict.engine for verdict in self.champion.verdicts if verdict.eligible}
        measured = {report.engine for report in self.reports if report.status == "measured"}
        return frozenset(measured - eligible - {BASELINE})

    @property
    def scores(self) -> dict[str, float]:
        """Each engine's score: how many times better than PyTorch it is by the objective."""
        return {verdict.engine: verdict.score for verdict in self.champion.verdicts if verdict.score is not None}


def make_report(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    evaluation: EvaluationSet,
    champion: Champion,
    reports: Sequence[BenchmarkReport],
    engines: Sequence[Engine],
) -> OptimizationReport:
    """Make the report of an optimization whose champion has just been chosen.

    This function imports no heavy library. `engines` are the engines that were measured.
    """
    gates, task = entry.accuracy_gates(), TASKS[entry.task]
    gated = {name for report in reports if report.accuracy for name in report.accuracy.gated}
    runtimes = {engine.runtime for engine in engines if engine.status == "built"}
    libraries = library_versions(*sorted({name for runtime in runtimes for name in LIBRARIES[runtime]}))
    return OptimizationReport(
        model=entry.name,
        target=champion.target,
        source=checkpoint.source,
        revision=checkpoint.revision,
        task=entry.task,
        device=next(report.device for report in reports if report.engine == champion.engine),
        evaluation_items=evaluation.items,
        libraries={name: version for name, version in libraries.items() if version != "absent"},
        configuration={
            **_flat(entry.fields(), leaving_out=("name", "source", "task")),
            "threads": str(workspace.threads(entry)),
            "PyTorch's threads": str(workspace.baseline_threads(entry)),
        },
        objective=entry.objective,
        gates=tuple(
            Gate(name=name, bound="least" if bound_of(info) == "least" else "most", limit=getattr(gates, name))
            for name, info in task.gates.model_fields.items()
            if name in gated
        ),
        champion=champion,
        # The parts of a fingerprint and the digests of files do not help the reader of a report.
        reports=tuple(report.model_copy(update={"made_of": {}, "files": {}}) for report in reports),
        lengths=checkpoint.lengths,
    )


def _flat(fields: dict[str, Any], prefix: str = "", *, leaving_out: Sequence[str] = ()) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in fields.items():
        if name in leaving_out:
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
