"""The texts that accuracy and speed are measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Arrays `[rows, tokens]` of real text without padding: each row goes on with the next texts until it is full."""
    import numpy as np

    exact = encoder.shortened(tokens)
    encodings = []
    for row in range(rows):
        start = row * len(texts) // rows
        words = ""
        for step in range(len(texts) * 64):
            words += texts[(start + step) % len(texts)] + " "
            # Four characters a token is the usual; asking the tokenizer at every step would cost more than it saves.
            if len(words) >= 4 * tokens or step % 16 == 15:
                encoding = exact.tokens([words])[0]
                if len(encoding.ids) == tokens:
                    break
        encodings.append(encoding)
    batch = exact.pad(encodings, tokens)
    assert np.all(batch.get("attention_mask", 1))
    return batch
