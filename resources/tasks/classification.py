"""Sequence classification: one probability for each label, or the numbers that a regression model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from resources.tasks.base import (
    CheckpointFiles,
    Gates,
    Library,
    Metrics,
    Options,
    SpecialTokens,
    Task,
    at_least,
    at_most,
    is_near,
    load_pretrained,
    read_labels,
    stacked,
)
from resources.tasks.grading import micro_f1, number, one_of, require, spearman
from resources.tasks.heads import Activation, classifier
from resources.tasks.libraries import transformers_name, transformers_pipeline
from resources.tasks.samples import paired_items, text_items

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder

HEAD = "ForSequenceClassification"


class ClassificationGates(Gates):
    """The gates of classification.

    Args:
        label_agreement: The share of texts with the same labels as PyTorch gives.
        probability_error: The largest difference of one probability.
        value_error: The largest error of a regression model's value, in standard deviations of PyTorch's values.
    """

    label_agreement: float = at_least(0.99)
    probability_error: float = at_most(0.05, high=1.0)
    value_error: float = at_most(0.05)


def activation(files: CheckpointFiles) -> Activation:
    """Return the activation that turns logits into answers, chosen as transformers' pipeline chooses it."""
    problem = files.config.get("problem_type")
    if problem == "regression":
        return "identity"
    return "sigmoid" if problem == "multi_label_classification" or len(read_labels(files)) == 1 else "softmax"


class ClassificationOptions(Options):
    """The options of classification.

    Args:
        function_to_apply: The activation, as transformers' pipeline names it. By default it is the one that the
            pipeline chooses for the checkpoint.
    """

    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None


class ClassificationTask(Task):
    """The task with input TEXT and output `probabilities`, FP32 `[batch, labels]`.

    Triton's label file names the labels. A regression model's output is named `values`.
    """

    name: ClassVar[str] = "classification"
    gates: ClassVar[type[Gates]] = ClassificationGates
    fields: ClassVar[tuple[str, ...]] = ("text", "pair", "label")
    options: ClassVar[type[Options]] = ClassificationOptions
    computing: ClassVar[tuple[str, ...]] = ("function_to_apply",)

    def check(self, files: CheckpointFiles) -> None:
        files.require_head(self.name, HEAD, "a classification head")
        self.labels(files)

    def output(self, files: CheckpointFiles) -> str:
        if files.settings.get("function_to_apply") == "none":
            return "logits"
        chosen = files.settings["activation"] if files.settings else activation(files)
        return "values" if chosen == "identity" else "probabilities"

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        return read_labels(files)

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForSequenceClassification

        chosen = files.settings["activation"] if files.settings else activation(files)
        return classifier(load_pretrained(AutoModelForSequenceClassification, files, **load), chosen)

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        assert isinstance(options, ClassificationOptions)
        named = options.function_to_apply
        return {
            **super().settings(files, options, tokens),
            "activation": ("identity" if named == "none" else named) or activation(files),
            "labels": list(read_labels(files)),
        }

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        import numpy as np
        from transformers import AutoModelForSequenceClassification

        task = "text-classification"
        classify = transformers_pipeline(
            task, files, AutoModelForSequenceClassification, tokenizer, encoder.max_tokens, **load
        )
        places = {str(label): place for place, label in classify.model.config.id2label.items()}

        def answer(item: Item) -> Any:
            text = item["TEXT"]
            given = {"text": text, "text_pair": item["TEXT_PAIR"]} if "TEXT_PAIR" in item else text
            found = classify(given, top_k=None, truncation=True, function_to_apply=settings["function_to_apply"])
            values = np.zeros(len(found), dtype=np.float32)
            for one in found:
                values[places[str(one["label"])]] = one["score"]
            return values

        return Library(transformers_name(task), answer)

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        labels = settings["labels"]
        for label, wanted, given in zip(labels, expected.tolist(), found.tolist(), strict=True):
            if not is_near(wanted, given):
                return f"{label} {given:.6g}, and not {wanted:.6g}"
        return ""

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return [*text_items(max_tokens), *paired_items()]

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        (text,) = require(line, "text")
        item = {"TEXT": text, **({"TEXT_PAIR": require(line, "pair")[0]} if "pair" in line else {})}
        right: Any = None
        if "label" in line and settings["activation"] == "identity":
            right = number(line, "label")
        elif "label" in line:
            given = line["label"] if isinstance(line["label"], list) else [line["label"]]
            right = [one_of(label, settings["labels"], "label") for label in given]
            if settings["activation"] == "softmax" and len(right) != 1:
                raise ValueError(f"'label' names {len(right)} labels, and these exclude each other")
        return [(item, right)]

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        known = [place for place, label in enumerate(right) if label is not None]
        if not known:
            return {}
        values, expected = stacked(answers)[known], [right[place] for place in known]
        labels = settings["labels"]
        if settings["activation"] == "identity":
            # A line has one right number. With several outputs it is not known which of them the number belongs to.
            return {"spearman": spearman(expected, values[:, 0].tolist())} if values.shape[1] == 1 else {}
        if settings["activation"] == "softmax":
            best = [labels[place] for place in values.argmax(axis=1)]
            return {"accuracy": sum(one == other for one, (other,) in zip(best, expected, strict=True)) / len(known)}
        found: list[set[Any]] = [{labels[place] for place in (row > 0.5).nonzero()[0]} for row in values]
        return {"f1": micro_f1([set(names) for names in expected], found)}

    def gate_names(self, settings: dict[str, Any]) -> tuple[str, ...]:
        return ("value_error",) if settings["activation"] == "identity" else ("label_agreement", "probability_error")

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        scale = _spread(stacked(baseline)) if settings["activation"] == "identity" else 1.0
        result: np.ndarray = 1.0 - (np.abs(stacked(baseline) - stacked(answers)) / scale).max(axis=1)
        return result

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        import numpy as np

        expected, found = stacked(baseline), stacked(answers)
        largest = float(np.abs(expected - found).max())
        if settings["activation"] == "identity":
            error = float((np.abs(expected - found) / _spread(expected)).max())
            return {"value_error": error, "max_abs_error": largest}
        if settings["activation"] == "softmax":
            same = expected.argmax(axis=1) == found.argmax(axis=1)
        else:
            same = ((expected > 0.5) == (found > 0.5)).all(axis=1)
        return {"label_agreement": float(same.mean()), "probability_error": largest}


def _spread(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each column over all texts.

    A column whose values are all equal has the size of that value in its place, or 1 if the value is 0.
    """
    import numpy as np

    size = np.abs(values).max(axis=0)
    result: np.ndarray = np.where(values.std(axis=0) > 0, values.std(axis=0), np.where(size > 0, size, 1.0))
    return result
