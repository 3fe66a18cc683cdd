"""The step `evaluation_set`: real requests, and what PyTorch in fp32 answers to each of them alone."""

from __future__ import annotations

from pathlib import Path

from resources.accuracy.evaluation_set import answer_requests
from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import EvaluationSet
from resources.checkpoints.requests import evaluation_requests
from resources.checkpoints.shapes import shapes_of
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.step import Recipe, Step, Work


class EvaluationSetStep(Step[EvaluationSet]):
    """Have PyTorch answer the evaluation requests: the user's own, or those that are shipped."""

    record = EvaluationSet
    code = (
        "resources.accuracy.evaluation_set",
        "resources.accuracy.inference",
        "resources.accuracy.batches",
        "resources.checkpoints",
        "-resources.checkpoints.watch",
        "resources.tasks",
        "resources.pipelines",
        "resources.steps.evaluation_set",
    )

    def __init__(self) -> None:
        super().__init__("evaluation_set", [CHECKPOINT])

    def recipe(self, work: Work) -> Recipe[EvaluationSet]:
        """See Step. Raises CheckpointError and CatalogError for requests that cannot be a baseline."""
        entry, workspace, checkpoint = work.entry, work.workspace, work.get(CHECKPOINT)
        shapes_of(entry, checkpoint)  # before any work: it refuses what the checkpoint cannot take
        items, right = evaluation_requests(entry, checkpoint.settings, checkpoint.max_tokens)
        made_of = Fingerprint.of(
            "evaluation_set",
            model=entry.name,
            items=items,
            right=right,
            weights=checkpoint.weights_digest,
            tokenizer=checkpoint.tokenizer_digest,
            pipeline=checkpoint.pipeline_digest,
            task=checkpoint.task,
            unused_weights=entry.unused_weights,
            code=code_versions(*self.code),
            libraries=library_versions("torch", "transformers", "tokenizers"),
        )

        def make(folder: Path) -> EvaluationSet:
            work.store.require_whole(checkpoint)
            found, cost = work.isolated(
                answer_requests,
                checkpoint,
                work.folder(checkpoint),
                entry.trust,
                items,
                right,
                folder,
                workspace.threads(entry),
                what=f"{entry.name}, revision {checkpoint.revision}: PyTorch's answers to the evaluation set",
                log="evaluation_set",
            )
            return EvaluationSet(
                digest=made_of.digest,
                model=entry.name,
                items=len(items),
                rows=found.rows,
                width=found.width,
                longest_tokens=found.longest_tokens,
                **cost,
            )

        return Recipe(made_of, make)


EVALUATION_SET = EvaluationSetStep()
