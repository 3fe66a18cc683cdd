"""The step `reference`: the answers of the library that users would otherwise run."""

from __future__ import annotations

from pathlib import Path

from resources.accuracy.reference import compare_with_library
from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import Reference
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.step import Recipe, Step, Work


class ReferenceStep(Step[Reference]):
    """Compare PyTorch's answers with the library's, and raise CheckpointError if they differ."""

    record = Reference
    code = (
        "resources.accuracy.reference",
        "resources.tasks",
        "resources.checkpoints.tokenizer",
        "resources.pipelines",
        "resources.steps.reference",
    )

    def __init__(self) -> None:
        super().__init__("reference", [CHECKPOINT, EVALUATION_SET])

    def recipe(self, work: Work) -> Recipe[Reference]:
        """See Step."""
        entry, workspace, checkpoint = work.entry, work.workspace, work.get(CHECKPOINT)
        made_of = Fingerprint.of(
            "reference",
            model=entry.name,
            evaluation=work.expected(EVALUATION_SET).digest,
            # The library reads all of the checkpoint by itself, including files that this project never reads.
            copy=checkpoint.digest,
            code=code_versions(*self.code),
            libraries=library_versions("torch", "transformers", "tokenizers", "sentence-transformers"),
        )

        def make(folder: Path) -> Reference:
            evaluation = work.get(EVALUATION_SET)
            work.store.require_whole(checkpoint, evaluation)
            found, cost = work.isolated(
                compare_with_library,
                checkpoint,
                work.folder(checkpoint),
                entry.trust,
                work.folder(evaluation),
                folder,
                workspace.threads(entry),
                what=f"{entry.name}, revision {checkpoint.revision}: the answers of the library that users would use",
                log="reference",
            )
            return Reference(
                digest=made_of.digest,
                model=entry.name,
                library=found.library,
                compared=found.compared,
                refused=found.refused,
                rows=found.rows,
                retokenized=found.retokenized,
                **cost,
            )

        return Recipe(made_of, make)


REFERENCE = ReferenceStep()
