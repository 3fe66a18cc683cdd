"""The texts that speed is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder


def texts_of(items: Sequence[Item]) -> list[str]:
    """What the requests' texts say, one string a request; candidate labels are no text."""
    return [" ".join(text for name, text in item.items() if name != "LABELS") for item in items]


def batch_of_shape(
    texts: Sequence[str], encoder: TextEncoder, rows: int, tokens: int, extra: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Arrays `[rows, tokens]` of real text without padding: each row goes on with the next texts until it is full.

    extra: inputs that are one position a row, `[rows, 1]`. Raises EngineError for rows too short to hold the special
    tokens and a word.
    """
    import numpy as np

    exact = encoder.shortened(tokens)
    encodings = []
    for row in range(rows):
        start = row * len(texts) // rows
        words, size, position = "", 0, start
        # Two characters a token at first, then twice as many, until the row is full.
        for attempt in range(1, 7):
            while len(words) < tokens * 2**attempt:
                words += texts[position % len(texts)] + " "
                position += 1
            encoding = exact.tokens([words])[0]
            size = len(encoding.ids)
            if size == tokens:
                break
        if size != tokens:
            raise EngineError(f"Text cannot fill rows of exactly {tokens} tokens (got {size}). Choose a longer shape.")
        encodings.append(encoding)
    positions = np.full((rows, 1), tokens // 2, dtype=np.int64)
    return {**exact.pad(encodings, tokens), **dict.fromkeys(extra, positions)}
