"""The texts that accuracy and speed are measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resources.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

    from resources.tokenization import TextEncoder

#: Written for this project and under its licence: questions, notes, reports, chat, in a dozen languages.
SAMPLE_TEXTS = Path(__file__).with_name("sample_texts.jsonl")


def load_texts(path: Path = SAMPLE_TEXTS) -> list[str]:
    """The texts of a JSON Lines file, one object with a `text` a line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def batch_of_shape(texts: Sequence[str], encoder: TextEncoder, rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Arrays `[rows, tokens]` of real text without padding: each row goes on with the next texts until it is full.

    Raises EngineError for rows too short to hold the special tokens and a word.
    """
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
    return exact.pad(encodings, tokens)
