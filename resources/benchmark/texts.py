"""The texts and batches on which speed is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder


def texts_of(items: Sequence[Item]) -> list[str]:
    """Return the texts of each request as one string, without its candidate labels."""
    return [" ".join(text for name, text in item.items() if name != "LABELS") for item in items]


def batch_of_shape(
    texts: Sequence[str], encoder: TextEncoder, rows: int, tokens: int, extra: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return the input arrays `[rows, tokens]` of a batch of real text without padding.

    Each row is filled with one text after the other until it has the wanted number of tokens.

    Args:
        texts: The texts that fill the rows.
        encoder: The checkpoint's tokenizer.
        rows: The number of rows.
        tokens: The number of tokens in each row.
        extra: The names of inputs that hold one position for each row, `[rows, 1]`.

    Raises:
        EngineError: The rows are too short to hold the special tokens and a word.
    """
    import numpy as np

    exact = encoder.shortened(tokens)
    encodings = []
    for row in range(rows):
        start = row * len(texts) // rows
        words, size, position = "", 0, start
        # The first attempt assumes two characters for each token. Each further attempt doubles the text.
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
