"""The pipelines of embedding, classification and reranking, whose answers are the engine's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import GivenTokens, Item, Pipeline, Row
from .names import TOKEN_IDS


class TextPipeline(Pipeline):
    """The pipeline that turns one text into one row of numbers, fp32 `[width]`."""

    #: Whether a row may hold two texts.
    pairs: ClassVar[bool] = False
    structured: ClassVar[bool] = False
    offsets: ClassVar[bool] = False

    def given(self, ids: Sequence[int]) -> Item:
        return {TOKEN_IDS: self.encoder.given(ids)}

    def prepare(self, item: Item) -> Any:
        if TOKEN_IDS not in item:
            return super().prepare(item)
        ids = item[TOKEN_IDS]
        types = self.encoder.types_of(ids) if self.pairs else [0] * len(ids)
        return [Row(GivenTokens(tuple(ids), tuple(types)))]

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> np.ndarray:
        return outputs[0]


class ClassifyingPipeline(TextPipeline):
    """The pipeline that turns one text or a pair into one row of numbers.

    The longer text of a pair is cut first, as transformers does.
    """

    pairs: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("TEXT_PAIR",)

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        texts = (item["TEXT"], item["TEXT_PAIR"]) if "TEXT_PAIR" in item else (item["TEXT"],)
        return [self.encoder.enough(texts)]


class PairPipeline(TextPipeline):
    """The pipeline that turns a query and a text into one row of numbers.

    The longer of the two is cut first, as sentence-transformers does.
    """

    pairs: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("QUERY", "TEXT")
    from_ids: ClassVar[tuple[str, ...]] = ("QUERY", "TEXT")

    def given(self, ids: Sequence[int]) -> Item:
        kept = self.encoder.given(ids)
        self.require_texts(self.encoder.parts(kept))
        return {TOKEN_IDS: kept}
