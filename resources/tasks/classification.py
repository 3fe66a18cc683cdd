"""Sequence classification: one probability a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from resources.tasks.base import CheckpointFiles, Gates, Task, load_pretrained

if TYPE_CHECKING:
    import numpy as np
    import torch


class ClassificationGates(Gates):
    """Share of texts with the same labels as PyTorch gives, and the largest difference of one probability."""

    label_agreement: float = Field(default=0.99, ge=0, le=1)
    probability_error: float = Field(default=0.05, ge=0, le=1)


def is_multi_label(files: CheckpointFiles) -> bool:
    """Whether labels are independent of each other (sigmoid) or exclude each other (softmax)."""
    return bool(files.config.get("problem_type") == "multi_label_classification")


class ClassificationTask(Task):
    """Text in, `probabilities` FP32 `[batch, labels]` out; labels are named in Triton's label file."""

    name: ClassVar[str] = "classification"
    output: ClassVar[str] = "probabilities"
    gates: ClassVar[type[Gates]] = ClassificationGates

    def check(self, files: CheckpointFiles) -> None:
        if not files.architecture.endswith("ForSequenceClassification"):
            raise files.refuse(
                "task 'classification' needs a checkpoint with a classification head, and this one is a "
                f"{files.architecture or 'model of unknown architecture'}",
                "Use task 'embedding', or a checkpoint saved from ...ForSequenceClassification",
            )
        if files.config.get("problem_type") == "regression" or len(self.labels(files)) < 2:
            raise files.refuse(
                "it has one output and no labels (regression), which task 'classification' does not serve",
                "Use a checkpoint with at least two labels",
            )

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        table = files.config.get("id2label") or {}
        count = int(files.config.get("num_labels") or len(table) or 2)
        try:
            names = {int(index): str(label) for index, label in table.items()}
        except (ValueError, AttributeError):
            raise files.refuse(
                "config.json, id2label: its keys are not the numbers of the labels",
                'Write it as {"0": "the first label", "1": ...}',
            ) from None
        return tuple(names.get(index, f"LABEL_{index}") for index in range(count))

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForSequenceClassification

        return _classifier(load_pretrained(AutoModelForSequenceClassification, files, **load), is_multi_label(files))

    def scores(self, reference: np.ndarray, answers: np.ndarray) -> np.ndarray:
        import numpy as np

        result: np.ndarray = 1.0 - np.abs(reference.astype(np.float64) - answers).max(axis=1)
        return result

    def compare(self, reference: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        import numpy as np

        # Softmax rows sum to 1 and have one answer; sigmoid rows have an answer each side of one half.
        exclusive = bool(np.allclose(reference.sum(axis=1), 1.0, atol=1e-3))
        if exclusive:
            same = reference.argmax(axis=1) == answers.argmax(axis=1)
        else:
            same = ((reference > 0.5) == (answers > 0.5)).all(axis=1)
        return {
            "label_agreement": float(same.mean()),
            "probability_error": float(np.abs(reference - answers).max()),
        }

    def misses(self, metrics: dict[str, float], gates: Gates) -> list[str]:
        assert isinstance(gates, ClassificationGates)
        found = []
        if not metrics["label_agreement"] >= gates.label_agreement:
            found.append(f"label_agreement {metrics['label_agreement']:.4f} is below {gates.label_agreement:g}")
        if not metrics["probability_error"] <= gates.probability_error:
            found.append(f"probability_error {metrics['probability_error']:.4f} is above {gates.probability_error:g}")
        return found


def _classifier(model: torch.nn.Module, multi_label: bool) -> torch.nn.Module:
    import torch

    class Classifier(torch.nn.Module):
        """Logits to probabilities, in fp32."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra).logits.float()
            return torch.sigmoid(logits) if multi_label else torch.softmax(logits, dim=-1)

    return Classifier().eval()
