"""Comparing engines with each other in one measuring, outside the pipeline: `refinery bench`.

The pipeline measures each candidate beside PyTorch alone, so two candidates' figures come from different minutes. Here
all of them are loaded at once and take turns, and any two are compared round by round. Engines are those of the
pipeline, from the same artifact store: what is there is used, what is missing is built. The reports are not kept there:
nothing of the pipeline rests on them. Every engine has all threads here; the pipeline measures how many each needs.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from resources.artifacts.fingerprint import library_versions
from resources.artifacts.records import BenchmarkReport, CandidateVerdict, Checkpoint, Record
from resources.artifacts.store import Made
from resources.catalog import ModelEntry, Shape
from resources.checkpoints import collect_checkpoint
from resources.device import describe_device
from resources.engines import BASELINE, EngineSpec, engine_spec
from resources.engines.make import LIBRARIES, make_engine, sources_of
from resources.errors import CatalogError
from resources.evaluation.champion import gates_missed
from resources.evaluation.choosing import judge
from resources.evaluation.evaluation_set import make_evaluation_set
from resources.evaluation.reference import make_reference
from resources.evaluation.rivals import Progress, Rivals
from resources.evaluation.shapes import shapes_of
from resources.evaluation.statistics import geometric_mean
from resources.export.make import make_graph
from resources.machine.lock import benchmarking
from resources.reporting import candidate_table, latency_plot, markdown
from resources.storage.atomic import write_whole
from resources.workspace import Workspace

R = TypeVar("R", bound=Record)

JSON_FILE, TABLE_FILE, PLOT_FILE = "bench.json", "bench.md", "bench.png"


class Comparison(BaseModel):
    """What several engines of one model came to. All times are milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    model: str
    revision: str
    task: str
    target: str
    device: str
    threads: int
    created: str = Field(description="UTC, ISO 8601.")
    seconds: float = Field(description="The bound that the measuring was given.")
    versions: dict[str, str]
    reports: tuple[BenchmarkReport, ...] = Field(description="The baseline first; what was not measured has a reason.")
    verdicts: tuple[CandidateVerdict, ...]
    ratios: dict[str, dict[str, dict[str, float]]] = Field(
        description="By shape and two engines: how many times faster the first is, as the median over the rounds."
    )
    samples: dict[str, dict[str, list[float]]] = Field(
        description="By shape and engine; the same index is one round, measured within one turn of each other."
    )

    @property
    def measured(self) -> list[str]:
        """The engines that were measured, the baseline first."""
        return [report.engine for report in self.reports if report.status == "measured"]

    def overall(self, engine: str, other: str) -> float:
        """How many times faster than another an engine is: the geometric mean over the shapes."""
        return geometric_mean([ratios[engine][other] for ratios in self.ratios.values()])


def compare(
    workspace: Workspace,
    entry: ModelEntry,
    target: str,
    specs: Sequence[EngineSpec],
    say: Progress,
    *,
    shapes: Sequence[Shape] | None = None,
    seconds: float | None = None,
    accuracy: bool = True,
) -> Comparison:
    """Measure those engines of a model and PyTorch in turns.

    shapes: default: those that the pipeline measures at. seconds: bound for all measuring; default: the catalog's for
    one candidate, for each of them. accuracy: whether their answers are compared with PyTorch's too.

    Unsupported and failed engines are part of the result, with their reason. Raises CatalogError, CheckpointError and
    ExportError before anything is built, and EngineError where PyTorch cannot run or nothing is left beside it.
    """
    checkpoint = _said(
        say, "checkpoint", collect_checkpoint(entry, workspace.store, workspace.limits, settings=workspace.sources)
    )
    measured_at = _checked(entry, checkpoint, shapes) if shapes else shapes_of(entry, checkpoint)
    evaluation = _said(say, "evaluation_set", make_evaluation_set(workspace, entry, checkpoint))
    _said(say, "reference", make_reference(workspace, entry, checkpoint, evaluation))
    graph = _said(say, "onnx_graph", make_graph(workspace, entry, checkpoint))
    sources = sources_of(workspace, entry, checkpoint, graph)
    engines = []
    for spec in [engine_spec(BASELINE), *(spec for spec in specs if spec.name != BASELINE)]:
        made = make_engine(workspace, entry, spec, target, sources, evaluation)
        engines.append(_said(say, f"engines/{target}/{spec.name}", made))
    candidates = sum(engine.status == "built" for engine in engines[1:])
    bound = entry.benchmark.seconds * max(1, candidates) if seconds is None else seconds
    rivals = Rivals(workspace, entry, sources, evaluation, engines, measured_at, bound, say)
    with benchmarking(lambda who: say("waiting", f"other work is under way on this machine: {who}")):
        rivals.run(accuracy)
    return Comparison(
        model=entry.name,
        revision=checkpoint.revision,
        task=checkpoint.task,
        target=target,
        device=describe_device(target),
        threads=workspace.threads(entry),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=bound,
        versions={
            "python": platform.python_version(),
            **library_versions(*sorted({"numpy", "tokenizers", *chain.from_iterable(LIBRARIES.values())})),
        },
        reports=tuple(rivals.reports()),
        verdicts=_verdicts(entry, rivals.reports(), accuracy),
        ratios=rivals.ratios(),
        samples=rivals.samples(),
    )


def save_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `bench.json`, `bench.md` and `bench.png`, each whole or not at all; what a comparison before left goes."""
    accurate = {verdict.engine for verdict in comparison.verdicts if verdict.eligible}
    judged = {report.engine for report in comparison.reports if report.accuracy is not None} - {BASELINE}
    plot = latency_plot(comparison.reports, title_of(comparison), judged - accurate)
    assert plot is not None, "a comparison without timings was never made"
    contents = {
        JSON_FILE: comparison.model_dump_json(indent=1).encode(),
        TABLE_FILE: report_text(comparison).encode(),
        PLOT_FILE: plot,
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def title_of(comparison: Comparison) -> str:
    """What was measured where, in one line."""
    threads = f"{comparison.threads} thread{'s' if comparison.threads > 1 else ''}"
    return f"{comparison.model} on {comparison.target} ({comparison.device}; {threads})"


def ratio_table(comparison: Comparison, shape: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many times faster the engine of the row is than that of the column.

    At one shape, or as the geometric mean over all.
    """
    names = comparison.measured

    def cell(engine: str, other: str) -> str:
        if engine == other:
            return "–"
        return f"{comparison.overall(engine, other) if shape is None else comparison.ratios[shape][engine][other]:.2f}×"

    return ["times faster than", *names], [[engine, *(cell(engine, other) for other in names)] for engine in names]


def report_text(comparison: Comparison) -> str:
    """Everything in Markdown but the raw samples."""
    rounds = ", ".join(
        f"{timing.shape}: {timing.pairs}{'' if timing.agreed else ' (the time was over before windows agreed)'}"
        for timing in comparison.reports[0].timings
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items() if version != "absent")
    parts = [
        f"# {title_of(comparison)}",
        f"Revision {comparison.revision}, task {comparison.task}, {comparison.created}. All engines took turns; times "
        "faster than PyTorch, and than each other, are medians over the rounds. Milliseconds: p50 / p99.",
        markdown(*candidate_table(comparison.reports, comparison.verdicts)),
        f"![median latency by shape]({PLOT_FILE})",
        "## Each against each, geometric mean over the shapes",
        markdown(*ratio_table(comparison)),
        *(f"## {shape}\n\n{markdown(*ratio_table(comparison, shape))}" for shape in comparison.ratios),
        f"Rounds by shape: {rounds}. Versions: {versions}.",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _said(say: Progress, name: str, made: Made[R]) -> R:
    record = made.record
    status = getattr(record, "status", "built")
    if status != "built":
        say(name, f"{status}: {getattr(record, 'reason', '')}")
    else:
        say(name, "there already" if made.reused else f"made in {record.build_seconds:.1f} s")
    return record


def _checked(entry: ModelEntry, checkpoint: Checkpoint, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes, none twice. Raises CatalogError where the model does not take or serve one."""
    for shape in shapes:
        if shape.sequence > checkpoint.max_tokens:
            raise CatalogError(
                f"{entry.name}: the shape {shape} is longer than this checkpoint takes ({checkpoint.max_tokens} "
                "tokens); give a shorter one."
            )
        if shape.batch > entry.max_batch_size:
            raise CatalogError(
                f"{entry.name}: the shape {shape} is a larger batch than is served (max_batch_size "
                f"{entry.max_batch_size}); engines are built for no more."
            )
    return tuple(dict.fromkeys(shapes))


def _verdicts(entry: ModelEntry, reports: Sequence[BenchmarkReport], accuracy: bool) -> tuple[CandidateVerdict, ...]:
    """What the pipeline would say of these figures; without accuracy it would say nothing."""
    if accuracy:
        return judge(reports, lambda report: gates_missed(entry, report), entry.objective, reports[0].engine_size_bytes)
    return tuple(
        CandidateVerdict(engine=report.engine, score=None, eligible=False, verdict="accuracy was not measured")
        for report in reports
        if report.status == "measured"
    )
