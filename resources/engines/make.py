"""Making an engine an artifact: built in a child process with limits, or recorded as unsupported or failed."""

from __future__ import annotations

import shutil
from pathlib import Path

from resources.artifacts.fingerprint import code_version, fingerprint, library_versions
from resources.artifacts.records import Checkpoint, Engine, OnnxGraph
from resources.artifacts.store import Made
from resources.catalog import ModelEntry
from resources.engines import EngineSpec, Sources, build, unsupported_reason
from resources.errors import EngineError, ExportError
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


def make_engine(
    workspace: Workspace, entry: ModelEntry, spec: EngineSpec, target: str, sources: Sources
) -> Made[Engine]:
    """The engine of that spec. Never raises for the engine's own troubles: those are a record's status and reason."""
    graph = sources.graph
    if graph.problems:
        raise ExportError(f"{entry.name}: no engine is built from a graph that is wrong: {' '.join(graph.problems)}")
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
            "peak_memory_bytes": peak,
        }
        return record.model_copy(update=update)

    return workspace.store.get_or_make(Engine, digest, make)
