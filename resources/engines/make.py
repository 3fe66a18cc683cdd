"""Making an engine an artifact: built in a child process with limits, or recorded as unsupported or failed."""

from __future__ import annotations

import shutil
from pathlib import Path

from resources.artifacts.fingerprint import code_version, fingerprint, library_versions
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.artifacts.store import Made
from resources.catalog import ModelEntry
from resources.engines import EngineSpec, Sources, build, unsupported_reason
from resources.errors import EngineError, ExportError
from resources.evaluation.goal import Goal
from resources.isolation import run_isolated
from resources.locks import building
from resources.workspace import Workspace

_LIBRARIES = {
    "torch": ("torch", "transformers"),
    "onnxruntime": ("onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13"),
}


def sources_of(workspace: Workspace, checkpoint: Checkpoint, graph: OnnxGraph) -> Sources:
    """The sources of a model's engines, with the folders they lie in."""
    store = workspace.store
    return Sources(
        checkpoint=checkpoint,
        checkpoint_folder=store.folder(checkpoint),
        graph=graph,
        graph_folder=store.folder(graph),
    )


def goal_of(workspace: Workspace, entry: ModelEntry, evaluation: EvaluationSet) -> Goal:
    """What an engine of reduced precision has to reach."""
    return Goal(
        evaluation_folder=workspace.store.folder(evaluation),
        gates=entry.accuracy_gates(),
        max_batch_size=entry.max_batch_size,
        trials=entry.ladder.trials,
        seconds=entry.ladder.seconds,
    )


def make_engine(
    workspace: Workspace,
    entry: ModelEntry,
    spec: EngineSpec,
    target: str,
    sources: Sources,
    evaluation: EvaluationSet | None = None,
) -> Made[Engine]:
    """The engine of that spec. Never raises for the engine's own troubles: those are a record's status and reason.

    evaluation: what specs that are `examined` are judged on while they are built.
    """
    graph = sources.graph
    if graph.problems:
        raise ExportError(f"{entry.name}: no engine is built from a graph that is wrong: {' '.join(graph.problems)}")
    goal, examined = None, {}
    if spec.examined and unsupported_reason(spec, target) is None:
        assert evaluation is not None, f"{spec.name} is judged while it is built"
        goal = goal_of(workspace, entry, evaluation)
        examined = {
            "evaluation": evaluation.digest,
            "gates": entry.accuracy_gates().model_dump(),
            "batch": entry.max_batch_size,
            "ladder": entry.ladder.model_dump(),
            "examiner": code_version("resources.evaluation", "resources.pipelines"),
        }
    digest = fingerprint(
        "engine",
        model=entry.name,
        graph=graph.digest,
        # Labels are no part of an engine, and the baseline reads the checkpoint directly.
        weights=sources.checkpoint.weights_digest,
        spec=spec,
        target=target,
        competes=entry.competes(spec.name),
        code=code_version("resources.engines", "resources.tasks"),
        libraries=library_versions(*_LIBRARIES[spec.runtime]),
        **examined,
    )
    record = Engine(
        digest=digest,
        model=entry.name,
        name=spec.name,
        target=target,
        runtime=spec.runtime,
        precision=spec.precision,
        status="built",
        inputs=graph.inputs,
        output=graph.output,
        width=graph.width,
    )

    def make(folder: Path) -> Engine:
        reason = unsupported_reason(spec, target)
        if reason is None and not entry.competes(spec.name):
            reason = f"Not among the engines that the catalog lists for {entry.name}."
        if reason is not None:
            return record.model_copy(update={"status": "unsupported", "reason": reason})
        if spec.runtime == "torch":  # nothing to build, so no child either
            return record
        try:
            with building():
                built, peak = run_isolated(
                    build,
                    sources,
                    spec,
                    folder,
                    goal,
                    limits=workspace.limits,
                    what=f"{entry.name}: building {spec.name} for {target}",
                    log=workspace.log(entry.name, f"engine-{target}-{spec.name}"),
                )
        except EngineError as error:
            shutil.rmtree(folder)
            folder.mkdir()
            log = workspace.log(entry.name, f"engine-{target}-{spec.name}")
            return record.model_copy(
                update={"status": "failed", "reason": f"{error} What its libraries printed is in {log}."}
            )
        update = {
            "entry_file": built.entry_file,
            "parameters": built.parameters,
            "operators": built.operators,
            "kept": built.kept,
            "steps": built.steps,
            "peak_memory_bytes": peak,
        }
        return record.model_copy(update=update)

    return workspace.store.get_or_make(Engine, digest, make)
