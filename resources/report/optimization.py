"""All that the report of an optimization is made from. Kept beside it, so that what is served later can be added, and
so that the next optimization can say what changed.
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
    """One accuracy gate: the metric of that name has to be at least, or at most, the limit."""

    model_config = _CONFIG
    name: str
    bound: Literal["least", "most"]
    limit: float

    @property
    def best(self) -> float:
        """What the metric is where the answers are PyTorch's own."""
        return 1.0 if self.bound == "least" else 0.0

    def kept_by(self, value: float) -> bool:
        """NaN keeps no gate."""
        return value >= self.limit if self.bound == "least" else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.bound == 'least' else '≤'} {self.limit:g}"


class Changes(BaseModel):
    """What is otherwise than in an earlier optimization. inputs: what was given, before and now. candidates: see
    resources.report.changes.
    """

    model_config = _CONFIG
    inputs: tuple[tuple[str, str, str], ...] = ()
    candidates: tuple[tuple[str, str, str, str, str], ...] = ()


class Before(BaseModel):
    """The optimization of the same model and target that was finished last. changes: None where it left no report
    that can be read.
    """

    model_config = _CONFIG
    run_id: str
    url: str
    changes: Changes | None = None


class OptimizationReport(BaseModel):
    """One optimization of one model for one target. reports: the champion's and those it was chosen among."""

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
        return f"{self.model} on {self.target}: {self.device}"

    @property
    def inaccurate(self) -> frozenset[str]:
        """Engines that were measured and miss a gate. PyTorch is what the others are compared with."""
        eligible = {verdict.engine for verdict in self.champion.verdicts if verdict.eligible}
        measured = {report.engine for report in self.reports if report.status == "measured"}
        return frozenset(measured - eligible - {BASELINE})

    @property
    def scores(self) -> dict[str, float]:
        """By engine, times better than PyTorch by the objective."""
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
    """What is known once the champion is chosen. engines: those that were measured. Costs no heavy import."""
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
        # What a digest is of, part by part, says nothing to the reader of a report.
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
