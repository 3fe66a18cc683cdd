"""Build the engines for `refinery bench` with the pipeline's steps, and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from resources.artifacts.records import Record
from resources.benchmark.side_by_side import Comparison, Progress, checked_shapes, compare
from resources.catalog.entries import ModelEntry, Shape
from resources.checkpoints.shapes import shapes_of
from resources.engines.specs import BASELINE, EngineSpec, engine_spec
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.engine import EngineStep, sources_of
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.reference import REFERENCE
from resources.steps.step import Step, Work

R = TypeVar("R", bound=Record)


def compare_engines(
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
    """Compare those engines of a model with each other and with PyTorch.

    What the artifact store has is used, and what it lacks is made. Nothing becomes the pipeline's current artifact.

    Args:
        workspace: Where the artifact store is.
        entry: The model.
        target: The target that the engines are built for.
        specs: The engines; PyTorch is always among them.
        say: Called with each step's name and what came of it.
        shapes: The shapes to measure at; by default those that the pipeline measures at.
        seconds: The bound for all measuring; by default the catalog's for one candidate, for each of them.
        accuracy: Whether answers are compared with PyTorch's too.

    Raises:
        CatalogError: A shape is not served by the model. Nothing has been built then.
        CheckpointError: The checkpoint is of no use, or PyTorch's answers are not the library's.
        ExportError: The graph could not be exported.
        EngineError: PyTorch cannot run, or nothing is left beside it.
    """
    work = Work(workspace, entry, made={})
    checkpoint = _made(work, CHECKPOINT, say)
    measured_at = checked_shapes(entry, checkpoint, shapes) if shapes else shapes_of(entry, checkpoint)
    evaluation = _made(work, EVALUATION_SET, say)
    _made(work, REFERENCE, say)
    _made(work, ONNX_GRAPH, say)
    chosen = [engine_spec(BASELINE), *(spec for spec in specs if spec.name != BASELINE)]
    engines = [_made(work, EngineStep(spec, target), say) for spec in chosen]
    return compare(
        workspace,
        entry,
        target,
        sources_of(work),
        evaluation,
        engines,
        say,
        shapes=measured_at,
        seconds=seconds,
        accuracy=accuracy,
    )


def _made(work: Work, step: Step[R], say: Progress) -> R:
    """Find or make what a step makes, and say what came of it."""
    made = work.make(step)
    assert made is not None, f"{step.name} always makes something"
    record = made.record
    status = getattr(record, "status", "built")
    if status != "built":
        say(step.name, f"{status}: {getattr(record, 'reason', '')}")
    else:
        say(step.name, "there already" if made.reused else f"made in {record.build_seconds:.1f} s")
    return record
