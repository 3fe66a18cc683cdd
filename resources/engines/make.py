"""Making an engine an artifact: built in a child process with limits, or recorded as unsupported or failed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.artifacts.store import Made
from resources.catalog.entries import ModelEntry
from resources.checkpoints.shapes import shapes_of
from resources.engines.availability import unsupported_reason
from resources.engines.interface import Goal, Sources, build
from resources.engines.rebuild import CODE, JUDGING, SCRIPT, recipe_of, write_script
from resources.engines.specs import EngineSpec
from resources.engines.tensorrt_availability import cuda_packages, tensorrt_packages
from resources.engines.tuning import Tuning, profiles_of
from resources.errors import EngineError, ExportError
from resources.machine.device import describe_device
from resources.machine.lock import building
from resources.machine.targets import Device, device_of
from resources.machine.usage import Watch
from resources.processes.isolation import run_isolated
from resources.settings.workspace import Workspace

#: What engines of a runtime are built and run with.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers"),
    "onnxruntime": ("onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime"),
}
#: Of the time that a step has, what a builder that ends by itself may take.
_BUILDING_SHARE = 0.9


def built_with(spec: EngineSpec, device: Device) -> dict[str, str]:
    """The versions of all that an engine of the spec is built and run with on the device."""
    return {
        **library_versions(*LIBRARIES[spec.runtime]),
        **(cuda_packages() if device == "cuda" else {}),
        **(tensorrt_packages() if spec.tuned else {}),
    }


def sources_of(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint, graph: OnnxGraph) -> Sources:
    """The sources of a model's engines, with the folders they lie in."""
    store = workspace.store
    return Sources(
        checkpoint=checkpoint,
        checkpoint_folder=store.folder(checkpoint),
        graph=graph,
        graph_folder=store.folder(graph),
        trust=entry.trust,
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


def tuning_of(workspace: Workspace, entry: ModelEntry, sources: Sources) -> Tuning:
    """What an engine is tuned for that is tuned to shapes. Raises CheckpointError for shapes that are too long."""
    from resources.pipelines.tokenization import buckets_up_to  # numpy

    checkpoint, settings = sources.checkpoint, entry.tensorrt
    encoder = json.loads((sources.checkpoint_folder / "encoder.json").read_text(encoding="utf-8"))
    buckets = encoder.get("buckets") or buckets_up_to(checkpoint.max_tokens)
    return Tuning(
        profiles=profiles_of(buckets, shapes_of(entry, checkpoint), entry.max_batch_size, settings.profiles),
        settings=settings,
        caches=workspace.store.caches,
        seconds=_BUILDING_SHARE * workspace.limits.timeout_s,
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
    record = Engine(
        digest="",
        model=entry.name,
        name=spec.name,
        target=target,
        runtime=spec.runtime,
        precision=spec.precision,
        status="unsupported",
    )
    reason = unsupported_reason(spec, target)
    if reason is None and not entry.competes(spec.name):
        reason = f"Not among the engines that the catalog lists for {entry.name}."
    if reason is not None:
        return _unsupported(workspace, record, reason)
    goal, examined = None, {}
    if spec.examined:
        assert evaluation is not None, f"{spec.name} is judged while it is built"
        goal = goal_of(workspace, entry, evaluation)
        examined = {
            "evaluation": evaluation.digest,
            "gates": entry.accuracy_gates().model_dump(),
            "batch": entry.max_batch_size,
            "ladder": entry.ladder.model_dump(),
            "examiner": code_versions(*JUDGING),
        }
        if spec.tuned:
            tuning = tuning_of(workspace, entry, sources)
            goal = replace(goal, tuning=tuning)
            examined["profiles"] = [str(profile) for profile in tuning.profiles]
            examined["tensorrt"] = entry.tensorrt.model_dump()
    libraries = built_with(spec, device_of(target))
    made_of = Fingerprint.of(
        "engine",
        model=entry.name,
        graph=graph.digest,
        # Labels are no part of an engine, and the baseline reads the checkpoint directly.
        weights=sources.checkpoint.weights_digest,
        spec=spec,
        target=target,
        # What runs on one GPU was tried on that one; a processor is asked only when it is measured.
        device=describe_device(target) if device_of(target) == "cuda" else "",
        code=code_versions(*CODE),
        libraries=libraries,
        **examined,
    )
    taken = {"inputs": graph.inputs, "output": graph.output, "width": graph.width}
    record = record.model_copy(update={"digest": made_of.digest, "status": "built", **taken})

    def make(folder: Path) -> Engine:
        if spec.runtime == "torch":  # nothing to build, so no child either
            return record
        workspace.store.require_whole(sources.checkpoint, graph, *([evaluation] if evaluation and goal else []))
        try:
            with building(), Watch() as watch:
                built, peak = run_isolated(
                    build,
                    sources,
                    spec,
                    folder,
                    goal,
                    device_of(target),
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
        recipe = recipe_of(sources, spec, target, built, folder, libraries, evaluation, goal)
        write_script(recipe, folder)
        update = {
            "entry_file": built.entry_file,
            "parameters": built.parameters,
            "operators": built.operators,
            "kept": built.kept,
            "steps": built.steps,
            "documents": (SCRIPT, *built.documents),
            "peak_memory_bytes": peak,
            "usage": watch.usage,
        }
        return record.model_copy(update=update)

    return workspace.store.get_or_make(Engine, made_of, make, light=spec.runtime == "torch")


def _unsupported(workspace: Workspace, record: Engine, reason: str) -> Made[Engine]:
    """The record of an engine that there is none of. It depends on the reason alone, whatever changes meanwhile."""
    made_of = Fingerprint.of("engine", model=record.model, spec=record.name, target=record.target, unsupported=reason)
    unsupported = record.model_copy(update={"digest": made_of.digest, "reason": reason})
    return workspace.store.get_or_make(Engine, made_of, lambda _: unsupported, light=True)
