"""The grouping of tokens into entities with character offsets, as transformers' token-classification pipeline does it.

The strategies and their names are documented at
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
    """The pipeline that turns a text into a list of entities.

    An entity has `entity_group` (`entity` without aggregation), `score`, `word`, `start` and `end`. The engine's
    outputs are probabilities `[tokens, labels]`. The settings are `labels`, `ignore_labels`, `unknown_id`, `windows`
    and `aggregation_strategy` (none, simple, first, average, max).
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
        """Return every token of the text without the special tokens."""
        tokens = []
        # The library builds a new list of all tokens at every access, so each attribute is read once.
        words, ids, special = encoding.tokens, encoding.ids, encoding.special_tokens_mask
        for index, (start, end) in enumerate(encoding.offsets):
            if special[index]:
                continue
            word, written = words[index], text[start:end]
            if self.encoder.subword_prefix:
                subword = len(word) != len(written)
            else:  # the tokenizer has no mark for subwords, so a token without a space before it is one
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
        """Return one word as an entity. The strategy decides what happens when its tokens disagree."""
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
    """Group neighbours of one kind.

    A label with the prefix B- begins a new entity. A label with the prefix I- or without a prefix continues the entity
    before it if both are of one kind.
    """
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, kind = _parts(entity["entity"])
        if groups and not begins and kind == _parts(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _parts(label: str) -> tuple[bool, str]:
    """Return whether the label begins an entity, and the entity's kind."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _without_overlaps(entities: list[Entity]) -> list[Entity]:
    """Return the entities without those that overlap.

    An entity is found twice where windows overlap. The longer one stays. Of equally long ones, the one with the higher
    score stays.
    """
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: int(entity["start"])):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        elif _weight(entity) > _weight(kept[-1]):
            kept[-1] = entity
    return kept


def _weight(entity: Entity) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
