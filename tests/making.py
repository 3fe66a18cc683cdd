"""Single steps for tests, made of records that the test has at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import (
    BenchmarkReport,
    Champion,
    Checkpoint,
    Engine,
    EvaluationSet,
    OnnxGraph,
    Record,
    Reference,
    ServingConfiguration,
)
from resources.artifacts.store import ArtifactStore, Made
from resources.benchmark.champion import Served, choose
from resources.catalog.entries import ModelEntry
from resources.checkpoints.collect import collect, complete_copy, require_source
from resources.engines.interface import Goal, Sources
from resources.engines.specs import BASELINE, EngineSpec, engine_spec
from resources.engines.tuning import Tuning
from resources.processes.isolation import Limits
from resources.settings.sources import SourceSettings
from resources.settings.workspace import Workspace
from resources.steps import engine
from resources.steps.benchmark import BenchmarkStep
from resources.steps.champion import ChampionStep
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.engine import EngineStep
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.graph import steps_of
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.reference import REFERENCE
from resources.steps.step import R, Step, Work
from resources.triton.publish import Published


def collect_checkpoint(
    entry: ModelEntry, store: ArtifactStore, limits: Limits, *, settings: SourceSettings | None = None
) -> Made[Checkpoint]:
    """Collect a checkpoint without a workspace."""
    found = collect(entry, store.caches, settings=settings)
    made = store.get_or_make(
        Checkpoint, found.made_of, lambda folder: complete_copy(entry, found, folder, limits, None)
    )
    if made.reused:
        require_source(made.record, found.hashes, store)
    return made


def _made(workspace: Workspace, entry: ModelEntry, step: Step[R], *records: tuple[Step, Record | None]) -> Made[R]:
    work = Work(workspace, entry, made={other.name: record for other, record in records if record is not None})
    made = work.make(step)
    assert made is not None
    return made


def make_evaluation_set(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint) -> Made[EvaluationSet]:
    return _made(workspace, entry, EVALUATION_SET, (CHECKPOINT, checkpoint))


def make_reference(
    workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint, evaluation: EvaluationSet
) -> Made[Reference]:
    return _made(workspace, entry, REFERENCE, (CHECKPOINT, checkpoint), (EVALUATION_SET, evaluation))


def make_graph(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint) -> Made[OnnxGraph]:
    return _made(workspace, entry, ONNX_GRAPH, (CHECKPOINT, checkpoint))


def sources_of(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint, graph: OnnxGraph) -> Sources:
    store = workspace.store
    return Sources(checkpoint, store.folder(checkpoint), graph, store.folder(graph), entry.trust)


def make_engine(
    workspace: Workspace,
    entry: ModelEntry,
    spec: EngineSpec,
    target: str,
    sources: Sources,
    evaluation: EvaluationSet | None = None,
) -> Made[Engine]:
    known = ((CHECKPOINT, sources.checkpoint), (ONNX_GRAPH, sources.graph), (EVALUATION_SET, evaluation))
    return _made(workspace, entry, EngineStep(spec, target), *known)


def goal_of(workspace: Workspace, entry: ModelEntry, evaluation: EvaluationSet) -> Goal:
    work = Work(workspace, entry, made={EVALUATION_SET.name: evaluation})
    return engine.goal_of(work, engine_spec("onnxruntime_int8"))


def tuning_of(workspace: Workspace, entry: ModelEntry, sources: Sources) -> Tuning:
    return engine.tuning_of(Work(workspace, entry, made={}), sources.checkpoint)


def make_benchmark(
    workspace: Workspace,
    entry: ModelEntry,
    built: Engine,
    baseline: Engine,
    evaluation: EvaluationSet,
    sources: Sources,
) -> Made[BenchmarkReport]:
    baseline_step = EngineStep(engine_spec(BASELINE), built.target)
    step = BenchmarkStep(EngineStep(engine_spec(built.name), built.target), baseline_step)
    known = ((CHECKPOINT, sources.checkpoint), (ONNX_GRAPH, sources.graph), (EVALUATION_SET, evaluation))
    return _made(workspace, entry, step, *known, (step.baseline, baseline), (step.engine, built))


def make_champion(
    workspace: Workspace,
    entry: ModelEntry,
    target: str,
    reports: Sequence[BenchmarkReport],
    evaluation: EvaluationSet,
    served: Served | None = None,
) -> Made[Champion]:
    choice = choose(entry, target, reports, evaluation, served)
    made_of = Fingerprint.of("champion", **choice.parts, code=code_versions(*ChampionStep.code))

    def make(folder: Path) -> Champion:
        del folder
        return choice.champion.model_copy(update={"digest": made_of.digest})

    return workspace.store.get_or_make(Champion, made_of, make)


def make_serving_configuration(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    built: Engine,
    evaluation: EvaluationSet,
    champion: Champion,
) -> Made[ServingConfiguration]:
    steps = steps_of(champion.target)
    made = next(step for step in steps.engines if step.spec.name == built.name)
    known = ((CHECKPOINT, checkpoint), (EVALUATION_SET, evaluation), (steps.champion, champion), (made, built))
    return _made(workspace, entry, steps.configuration, *known)


def make_release(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    built: Engine,
    evaluation: EvaluationSet,
    champion: Champion,
    configuration: ServingConfiguration,
    *,
    dagster_run: str,
) -> Published:
    steps = steps_of(champion.target)
    made = next(step for step in steps.engines if step.spec.name == built.name)
    records: dict[Step, Record] = {
        CHECKPOINT: checkpoint,
        EVALUATION_SET: evaluation,
        steps.champion: champion,
        steps.configuration: configuration,
        made: built,
    }
    work = Work(workspace, entry, made={step.name: record for step, record in records.items()})
    return steps.release._publish(work, dagster_run)
