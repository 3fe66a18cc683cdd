"""Making the exported graph an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import Checkpoint, OnnxGraph
from resources.artifacts.store import Made
from resources.boundary.trust import Trust
from resources.catalog.entries import ModelEntry
from resources.errors import ExportError, RefineryError
from resources.export import Exported
from resources.machine.lock import building
from resources.machine.usage import Watch
from resources.processes.isolation import run_isolated
from resources.settings.workspace import Workspace

#: What a graph depends on, beside what it was made from.
CODE = ("resources.export", "resources.tasks", "resources.pipelines.tokenization")


def _export(
    checkpoint: Checkpoint, source: Path, trust: Trust, folder: Path, external_data_threshold_bytes: int
) -> Exported:
    """In the child: torch is imported there, never here."""
    from resources.export.exporter import export

    return export(checkpoint, source, trust, folder, external_data_threshold_bytes)


def make_graph(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint) -> Made[OnnxGraph]:
    """The exported graph of a checkpoint, exported in a child process with limits. Raises ExportError."""
    made_of = Fingerprint.of(
        "onnx_graph",
        model=entry.name,
        weights=checkpoint.weights_digest,
        # Parity is checked with ids of such a vocabulary, up to this checkpoint's longest text; with which text they
        # stand for it has nothing to do.
        ids=checkpoint.ids_digest,
        task=checkpoint.task,
        threshold=workspace.external_data_threshold_bytes,
        code=code_versions(*CODE),
        libraries=library_versions("torch", "transformers", "onnx", "onnxscript", "onnx-ir"),
    )

    def make(folder: Path) -> OnnxGraph:
        workspace.store.require_whole(checkpoint)
        what = f"{entry.name}, revision {checkpoint.revision}: exporting to ONNX"
        try:
            with building(), Watch() as watch:
                exported, peak = run_isolated(
                    _export,
                    checkpoint,
                    workspace.store.folder(checkpoint),
                    entry.trust,
                    folder,
                    workspace.external_data_threshold_bytes,
                    limits=workspace.limits,
                    what=what,
                    log=workspace.log(entry.name, "onnx_graph"),
                )
        except RefineryError as error:
            log = workspace.log(entry.name, "onnx_graph")
            raise ExportError(f"{what}: {error} The exporter's own words are in {log}.") from error
        return OnnxGraph(
            digest=made_of.digest,
            model=entry.name,
            weights_digest=checkpoint.weights_digest,
            peak_memory_bytes=peak,
            usage=watch.usage,
            **asdict(exported),
        )

    return workspace.store.get_or_make(OnnxGraph, made_of, make)
