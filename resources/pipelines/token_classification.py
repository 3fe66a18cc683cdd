"""Entities with character offsets, grouped as transformers' token-classification pipeline groups them.

Strategies and their names are documented at
https://huggingface.co/docs/transformers/main_classes/pipelines#transformers.TokenClassificationPipeline
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row

Entity = dict[str, Any]


class TokenClassificationPipeline(Pipeline):
    """A text to a list of entities: `entity_group` (`entity` without aggregation), score, word, start, end.

    settings: `labels`, `ignore_labels`, `aggregation_strategy` (none, simple, first, average, max), `unknown_id`.
    outputs: probabilities `[tokens, labels]`.
    """

    windowed: ClassVar[bool] = True

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> list[Entity]:
        strategy, ignored = self.settings["aggregation_strategy"], self.settings["ignore_labels"]
        entities: list[Entity] = []
        for row, output in zip(rows, outputs, strict=True):
            tokens = self._tokens(item["TEXT"], row.encoding, output)
            if strategy in ("none", "simple"):
                found = [self._label(token["scores"], token) for token in tokens]
            else:
                found = [self._word(word, strategy) for word in _words(tokens)]
            if strategy != "none":
                groups = [(group, group[0]["entity"].split("-", 1)[-1]) for group in _groups(found)]
                entities += [self._group(group, kind) for group, kind in groups if kind not in ignored]
            else:
                entities += [entity for entity in found if entity["entity"] not in ignored]
        return _without_overlaps(entities) if len(rows) > 1 else entities

    def _tokens(self, text: str, encoding: Any, scores: np.ndarray) -> list[Entity]:
        """Every token of the text, special ones left out."""
        tokens = []
        # Once: the library makes a new list of all tokens whenever one of these is asked for.
        words, ids, special = encoding.tokens, encoding.ids, encoding.special_tokens_mask
        for index, (start, end) in enumerate(encoding.offsets):
            if special[index]:
                continue
            word, written = words[index], text[start:end]
            if self.encoder.subword_prefix:
                subword = len(word) != len(written)
            else:  # the tokenizer does not mark what goes on; a space before it does
                subword = start > 0 and " " not in text[start - 1 : start + 1]
            if ids[index] == self.settings["unknown_id"]:
                word, subword = written, False
            tokens.append(
                {
                    "word": word,
                    "scores": scores[index],
                    "start": start,
                    "end": end,
                    "index": index,
                    "subword": subword,
                }
            )
        return tokens

    def _label(self, scores: np.ndarray, token: Entity) -> Entity:
        best = int(scores.argmax())
        kept: Entity = {name: token[name] for name in ("index", "word", "start", "end") if name in token}
        return {"entity": self.settings["labels"][best], "score": float(scores[best]), **kept}

    def _word(self, tokens: list[Entity], strategy: str) -> Entity:
        """One word, whose tokens may disagree."""
        if strategy == "first":
            scores = tokens[0]["scores"]
        elif strategy == "max":
            scores = max(tokens, key=lambda token: float(token["scores"].max()))["scores"]
        else:
            scores = np.stack([token["scores"] for token in tokens]).mean(axis=0)
        word = self.encoder.join([token["word"] for token in tokens])
        return self._label(scores, {"word": word, "start": tokens[0]["start"], "end": tokens[-1]["end"]})

    def _group(self, entities: list[Entity], kind: str) -> Entity:
        return {
            "entity_group": kind,
            "score": fmean(entity["score"] for entity in entities),
            "word": self.encoder.join([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }


def _words(tokens: Sequence[Entity]) -> list[list[Entity]]:
    words: list[list[Entity]] = []
    for token in tokens:
        if words and token["subword"]:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _groups(entities: Sequence[Entity]) -> list[list[Entity]]:
    """Neighbours of one kind; B- begins a new entity, and a label without a prefix goes on with the last."""
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, kind = _parts(entity["entity"])
        if groups and not begins and kind == _parts(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _parts(label: str) -> tuple[bool, str]:
    """Whether it begins an entity, and of which kind."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _without_overlaps(entities: list[Entity]) -> list[Entity]:
    """Where windows overlap an entity is found twice: the longer stays, then the surer."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: int(entity["start"])):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        elif _weight(entity) > _weight(kept[-1]):
            kept[-1] = entity
    return kept


def _weight(entity: Entity) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
