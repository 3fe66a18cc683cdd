"""Tasks whose answer is what the engine says: embedding, classification, reranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from .base import Item, Pipeline, Row


class TextPipeline(Pipeline):
    """One text to one row of numbers fp32 `[width]`."""

    structured: ClassVar[bool] = False
    offsets: ClassVar[bool] = False

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> np.ndarray:
        return outputs[0]


class PairPipeline(TextPipeline):
    """A query and a text to one row of numbers. The longer of the two is cut first, as sentence-transformers does."""

    inputs: ClassVar[tuple[str, ...]] = ("QUERY", "TEXT")
