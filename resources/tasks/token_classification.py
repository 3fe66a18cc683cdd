"""Token classification: the entities of a text and their places in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resources.errors import CatalogError
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
from resources.tasks.grading import micro_f1, one_of, require
from resources.tasks.heads import classifier
from resources.tasks.libraries import transformers_name, transformers_pipeline
from resources.tasks.samples import text_items

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder


#: An engine that never finds an entity agrees with PyTorch on texts without entities, so a few entities are needed.
FEWEST_ENTITIES = 20


class TokenClassificationGates(Gates):
    """The gates of token classification.

    Args:
        entity_agreement: The F1 of the entities against PyTorch's. Equal entities have the same characters and kind.
        score_error: The largest error of the score of an entity that both found.
    """

    entity_agreement: float = at_least(0.98)
    score_error: float = at_most(0.05, high=1.0)


class TokenClassificationOptions(Options):
    """The options of token classification.

    Args:
        aggregation_strategy: The strategy, as transformers' pipeline names it.
        ignore_labels: The labels to leave out, as in transformers' pipeline.
        stride: The number of tokens that neighbouring windows of a long text share.
        windows: The largest number of windows. A text is cut after them.
    """

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: tuple[str, ...] = Field(default=("O",), strict=False)
    stride: int = Field(default=64, ge=0)
    windows: int = Field(default=64, ge=1, le=1024)


class TokenClassificationTask(Task):
    """The task with input TEXT and output RESULT, a JSON list of entities."""

    name: ClassVar[str] = "token-classification"
    gates: ClassVar[type[Gates]] = TokenClassificationGates
    fields: ClassVar[tuple[str, ...]] = ("text", "entities")
    options: ClassVar[type[Options]] = TokenClassificationOptions
    per_token: ClassVar[bool] = True

    def check(self, files: CheckpointFiles) -> None:
        files.require_head(self.name, "ForTokenClassification", "a token classification head")
        read_labels(files)

    def output(self, files: CheckpointFiles) -> str:
        return "token_probabilities"

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        return read_labels(files)

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForTokenClassification

        return classifier(load_pretrained(AutoModelForTokenClassification, files, **load), "softmax")

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        assert isinstance(options, TokenClassificationOptions)
        labels = read_labels(files)
        # The pipeline compares whole labels, and after aggregation labels without the prefix B- or I-.
        known = {*labels, *(label[2:] for label in labels if label.startswith(("B-", "I-")))}
        unknown = [label for label in options.ignore_labels if label not in known]
        if unknown and "ignore_labels" in options.model_fields_set:
            raise CatalogError(
                f"options.ignore_labels: {unknown[0]!r:.60} is none of the model's labels: {', '.join(labels[:20])}"
                f"{', ...' if len(labels) > 20 else ''}. Write one of these."
            )
        return {
            **super().settings(files, options, tokens),
            "ignore_labels": list(options.ignore_labels),
            "labels": list(labels),
            "unknown_id": tokens.unknown_id,
            # Without aggregation an entity is one token, and the tokens of overlapping windows cannot be told apart.
            "windows": 1 if options.aggregation_strategy == "none" else options.windows,
        }

    def stride(self, max_tokens: int, options: Options) -> int:
        assert isinstance(options, TokenClassificationOptions)
        return min(options.stride, max_tokens // 2)

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        from transformers import AutoModelForTokenClassification

        classify = transformers_pipeline(
            self.name, files, AutoModelForTokenClassification, tokenizer, encoder.max_tokens, **load
        )
        strategy = settings["aggregation_strategy"]
        choices = {"aggregation_strategy": strategy, "ignore_labels": settings["ignore_labels"]}
        if strategy != "none":
            choices["stride"] = encoder.stride

        def answer(item: Item) -> Any:
            if strategy != "none":
                cutting = {"truncation": True, "stride": encoder.stride, "return_overflowing_tokens": True}
                # A release cuts a text after so many windows, and the pipeline never does.
                if len(classify.tokenizer(item["TEXT"], **cutting)["input_ids"]) > settings["windows"]:
                    return None
            return [{**entity, "score": float(entity["score"])} for entity in classify(item["TEXT"], **choices)]

        return Library(transformers_name(self.name), answer)

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        wanted, given = (Counter(map(_place, answer)) for answer in (expected, found))
        for place in sorted([*(wanted - given), *(given - wanted)]):
            return f"{given[place]} times {place[2]} at {place[0]} to {place[1]}, and not {wanted[place]} times"
        for first, second in zip(sorted(expected, key=_place), sorted(found, key=_place), strict=True):
            start, end, label = _place(first)
            if not is_near(first["score"], second["score"]):
                return f"{label} at {start} to {end} with score {second['score']:.6g}, and not {first['score']:.6g}"
            if first["word"] != second["word"]:
                return f"word {second['word'][:40]!r}, and not {first['word'][:40]!r}"
        return ""

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return text_items(max_tokens)

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        (text,) = require(line, "text")
        if "entities" not in line:
            return [({"TEXT": text}, None)]
        kinds = sorted({_named(label, settings) for label in settings["labels"]} - {*settings["ignore_labels"]})
        right = []
        for entity in line["entities"] if isinstance(line["entities"], list) else [None]:
            if not isinstance(entity, dict) or not {"start", "end", "label"} <= set(entity):
                raise ValueError("'entities' is not a list of objects with start, end and label")
            start, end = entity["start"], entity["end"]
            if not (type(start) is type(end) is int and 0 <= start < end <= len(text)):
                raise ValueError(f"'entities' holds start {start!r} and end {end!r}, which are no part of the text")
            right.append([start, end, one_of(entity["label"], kinds, "label")])
        return [({"TEXT": text}, right)]

    def too_little(self, settings: dict[str, Any], baseline: Sequence[Any]) -> str:
        found = sum(map(len, baseline))
        if found >= FEWEST_ENTITIES:
            return ""
        return f"PyTorch finds {found} entities in all of the {len(baseline)} texts, and {FEWEST_ENTITIES} are needed"

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        known = [place for place, entities in enumerate(right) if entities is not None]
        if not known:
            return {}
        expected: list[set[Any]] = [{tuple(entity) for entity in right[place]} for place in known]
        return {"f1": micro_f1(expected, [set(_by_place(answers[place])) for place in known])}

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        return np.array([_f1(*_counts([first], [second])) for first, second in zip(baseline, answers, strict=True)])

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        errors = [0.0]
        for first, second in zip(baseline, answers, strict=True):
            expected, found = _by_place(first), _by_place(second)
            errors += [abs(expected[place] - found[place]) for place in expected.keys() & found.keys()]
        return {
            "entity_agreement": _f1(*_counts(baseline, answers)),
            "score_error": max(errors),
            "entities": float(sum(len(entities) for entities in baseline)),
        }


Place = tuple[int, int, str]


def _by_place(entities: Sequence[dict[str, Any]]) -> dict[Place, float]:
    return {_place(entity): entity["score"] for entity in entities}


def _place(entity: dict[str, Any]) -> Place:
    return entity["start"], entity["end"], _kind(entity)


def _kind(entity: dict[str, Any]) -> str:
    return str(entity.get("entity_group") or entity["entity"])


def _named(label: str, settings: dict[str, Any]) -> str:
    """Return the name of a label's entities in answers: the kind, or without aggregation the label itself."""
    return label if settings["aggregation_strategy"] == "none" else label.split("-", 1)[-1]


def _counts(baseline: Sequence[Any], answers: Sequence[Any]) -> tuple[int, int, int]:
    """Return the numbers of entities that are expected, found, and both, over all texts."""
    pairs = [(set(_by_place(first)), set(_by_place(second))) for first, second in zip(baseline, answers, strict=True)]
    return (
        sum(len(first) for first, _ in pairs),
        sum(len(second) for _, second in pairs),
        sum(len(first & second) for first, second in pairs),
    )


def _f1(expected: int, found: int, both: int) -> float:
    """Return the harmonic mean of precision and recall, or 1 if there are no entities on either side."""
    return 2 * both / (expected + found) if expected + found else 1.0
