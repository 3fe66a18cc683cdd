"""Zero-shot classification: a model of natural language inference judges the labels of each request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from resources.pipelines.limits import RequestLimits
from resources.pipelines.unicode import is_unicode
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
)
from resources.tasks.classification import HEAD
from resources.tasks.grading import one_of, require
from resources.tasks.heads import classifier
from resources.tasks.libraries import transformers_name, transformers_pipeline
from resources.tasks.samples import labelled_items

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder


#: Lists of labels that are refused. Half of a surrogate pair is valid JSON, and deep brackets exceed the parser's
#: stack.
_NO_LABELS = ("[]", "urgent", "[1]", "{}", '["\\ud800"]', "[" * 100_000)


class ZeroShotGates(Gates):
    """The gates of zero-shot classification.

    Args:
        label_agreement: The share of texts whose best label is PyTorch's.
        score_error: The largest error of one score.
    """

    label_agreement: float = at_least(0.99)
    score_error: float = at_most(0.05, high=1.0)


class ZeroShotOptions(Options):
    """The options of zero-shot classification.

    Args:
        hypothesis_template: The sentence that the text should entail, with {} for the label.
        multi_label: Whether each label is judged on its own.
    """

    hypothesis_template: str = "This example is {}."
    multi_label: bool = False

    @field_validator("hypothesis_template")
    @classmethod
    def _takes_a_label(cls, template: str) -> str:
        try:
            good = template.format("a") != template.format("b")
        except (IndexError, KeyError, ValueError, AttributeError):
            good = False
        if not good:
            raise ValueError("must hold {} once, for the label, and no other braces")
        return template


class ZeroShotClassificationTask(Task):
    """The task with inputs TEXT and LABELS, a JSON list, and output RESULT.

    RESULT is a JSON object with `labels` and `scores`, best first.
    """

    name: ClassVar[str] = "zero-shot-classification"
    gates: ClassVar[type[Gates]] = ZeroShotGates
    fields: ClassVar[tuple[str, ...]] = ("text", "labels", "label")
    options: ClassVar[type[Options]] = ZeroShotOptions

    def example(self, settings: dict[str, Any]) -> str:
        return '--labels "one,another" "any text"'

    def check(self, files: CheckpointFiles) -> None:
        files.require_head(self.name, HEAD, "the head of a model of natural language inference")
        _entailment(files)

    def output(self, files: CheckpointFiles) -> str:
        return "inference_logits"

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        return read_labels(files)

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForSequenceClassification

        return classifier(load_pretrained(AutoModelForSequenceClassification, files, **load), "identity")

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        entailment = _entailment(files)
        # As in transformers' pipeline, the first label means contradiction, or the last if the first means entailment.
        contradiction = len(read_labels(files)) - 1 if entailment == 0 else 0
        settings = super().settings(files, options, tokens)
        return {**settings, "entailment_id": entailment, "contradiction_id": contradiction}

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        from transformers import AutoModelForSequenceClassification

        classify = transformers_pipeline(
            self.name, files, AutoModelForSequenceClassification, tokenizer, encoder.max_tokens, **load
        )
        choices = {name: settings[name] for name in ("hypothesis_template", "multi_label")}

        def answer(item: Item) -> Any:
            if not item["TEXT"]:  # the pipeline takes an empty text for a missing one
                return None
            found = classify(item["TEXT"], candidate_labels=json.loads(item["LABELS"]), **choices)
            return {"labels": found["labels"], "scores": found["scores"]}

        return Library(transformers_name(self.name), answer)

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        given = dict(zip(found["labels"], found["scores"], strict=True))
        wanted = dict(zip(expected["labels"], expected["scores"], strict=True))
        if given.keys() != wanted.keys():
            return f"labels {', '.join(given)[:60]}"
        for label, score in wanted.items():
            if not is_near(score, given[label]):
                return f"{label} {given[label]:.6g}, and not {score:.6g}"
        # Labels with equal scores may change places.
        for label, score in zip(found["labels"], expected["scores"], strict=True):
            if not is_near(score, wanted[label]):
                return f"labels in the order {', '.join(found['labels'])[:60]}"
        return ""

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return labelled_items(max_tokens)

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        most = RequestLimits().labels
        (text,) = require(line, "text")
        labels = line.get("labels")
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError("'labels' is not there, or is no list of texts")
        if len(labels) > most or not all(map(is_unicode, labels)):
            raise ValueError(f"'labels' holds more than {most} labels, or half of a surrogate pair")
        right = one_of(line["label"], labels, "label") if "label" in line else None
        return [({"TEXT": text, "LABELS": json.dumps(labels, ensure_ascii=False)}, right)]

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        same = [answer["labels"][0] == label for label, answer in zip(right, answers, strict=True) if label is not None]
        return {"accuracy": sum(same) / len(same)} if same else {}

    def odd_items(self, settings: dict[str, Any], text: str) -> list[Item]:
        return [{"TEXT": text, "LABELS": json.dumps([text, "other"])}, {"TEXT": text, "LABELS": json.dumps([text])}]

    def refused_items(self, settings: dict[str, Any]) -> list[Item]:
        return [{"TEXT": "a text", "LABELS": labels} for labels in _NO_LABELS]

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        return np.array([1.0 - _error(first, second) for first, second in zip(baseline, answers, strict=True)])

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        pairs = list(zip(baseline, answers, strict=True))
        same = sum(first["labels"][0] == second["labels"][0] for first, second in pairs)
        return {
            "label_agreement": same / len(pairs),
            "score_error": max(_error(first, second) for first, second in pairs),
        }


def _entailment(files: CheckpointFiles) -> int:
    labels = read_labels(files)
    for number, label in enumerate(labels):
        if label.lower().startswith("entail"):
            return number
    raise files.refuse(
        "task 'zero-shot-classification' needs a model of natural language inference, and none of the labels in "
        f"config.json (id2label: {', '.join(labels[:5])}) begins with 'entail'",
        "Use such a model, or name its labels",
    )


def _error(first: dict[str, Any], second: dict[str, Any]) -> float:
    expected = dict(zip(first["labels"], first["scores"], strict=True))
    found = dict(zip(second["labels"], second["scores"], strict=True))
    if expected.keys() != found.keys():
        return float("nan")
    return max(abs(expected[label] - found[label]) for label in expected)
