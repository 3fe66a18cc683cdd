"""The step `onnx_graph`: the checkpoint, exported to ONNX."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import Checkpoint, OnnxGraph
from resources.boundary.trust import Trust
from resources.errors import ExportError, RefineryError
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.reference import REFERENCE
from resources.steps.step import Recipe, Step, Work

if TYPE_CHECKING:
    from resources.export.exported import Exported


class OnnxGraphStep(Step[OnnxGraph]):
    """Export the checkpoint in a child process, which raises ExportError if the export fails."""

    record = OnnxGraph
    code = ("resources.export", "resources.tasks", "resources.pipelines.tokenization", "resources.steps.onnx_graph")

    def __init__(self) -> None:
        super().__init__("onnx_graph", [CHECKPOINT, REFERENCE])

    def recipe(self, work: Work) -> Recipe[OnnxGraph]:
        """See Step."""
        entry, workspace, checkpoint = work.entry, work.workspace, work.get(CHECKPOINT)
        threshold_bytes = workspace.external_data_threshold_bytes
        made_of = Fingerprint.of(
            "onnx_graph",
            model=entry.name,
            weights=checkpoint.weights_digest,
            # Parity is checked with token ids of this vocabulary, up to this checkpoint's longest text. The text behind
            # them does not matter.
            ids=checkpoint.ids_digest,
            task=checkpoint.task,
            threshold=threshold_bytes,
            code=code_versions(*self.code),
            libraries=library_versions("torch", "transformers", "onnx", "onnxscript", "onnx-ir"),
        )

        def make(folder: Path) -> OnnxGraph:
            work.store.require_whole(checkpoint)
            what = f"{entry.name}, revision {checkpoint.revision}: exporting to ONNX"
            try:
                exported, cost = work.isolated(
                    _export,
                    checkpoint,
                    work.folder(checkpoint),
                    entry.trust,
                    folder,
                    threshold_bytes,
                    what=what,
                    log=self.name,
                )
            except RefineryError as error:
                log = workspace.log(entry.name, self.name)
                raise ExportError(f"{what}: {error} The exporter's own words are in {log}.") from error
            return OnnxGraph(
                digest=made_of.digest,
                model=entry.name,
                weights_digest=checkpoint.weights_digest,
                **cost,
                **asdict(exported),
            )

        return Recipe(made_of, make)


def _export(checkpoint: Checkpoint, source: Path, trust: Trust, folder: Path, threshold_bytes: int) -> Exported:
    """In the child: torch is imported there, never here."""
    from resources.export.exporter import export

    return export(checkpoint, source, trust, folder, threshold_bytes)


ONNX_GRAPH = OnnxGraphStep()
