"""Text to token ids with the `tokenizers` library alone.

One module for all that tokenize: the evaluation, the benchmarks, and the released tokenizer model, which carries a copy
of this file beside its `model.py`. So what is measured is what serves, and the server needs no `transformers`.
Needs only `tokenizers` and numpy (1 or 2), and nothing else of this project.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Rows are padded to the next of these lengths. Triton batches only requests of equal shape: at one common length 16
#: concurrent requests ran as 2 executions of the engine, at 16 different lengths as 16.
LENGTH_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def buckets_up_to(max_tokens: int) -> tuple[int, ...]:
    """The length buckets of a model that takes at most `max_tokens`, which is always the last of them."""
    return (*(size for size in LENGTH_BUCKETS if size < max_tokens), max_tokens)


class TextEncoder:
    """Turns texts into the int64 arrays `[batch, sequence]` that a model takes.

    tokenizer_file: a `tokenizer.json`. Truncation and padding written in it are cleared: they are whatever the last
        training run left there, and padding of every text to a fixed length is common.
    max_tokens: longer texts are cut to this many tokens, special tokens included.
    inputs: which arrays, and in which order: `input_ids`, `attention_mask`, `token_type_ids`.
    """

    def __init__(self, tokenizer_file: str, *, max_tokens: int, inputs: Sequence[str], pad_id: int) -> None:
        from tokenizers import Tokenizer

        self._file = tokenizer_file
        self._tokenizer = Tokenizer.from_file(tokenizer_file)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=max_tokens)
        self.max_tokens = max_tokens
        self.buckets = buckets_up_to(max_tokens)
        self.inputs = tuple(inputs)
        self.pad_id = pad_id

    @classmethod
    def from_folder(cls, folder: str) -> "TextEncoder":
        """The encoder described by `encoder.json` and `tokenizer.json` in a folder."""
        settings = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
        return cls(str(Path(folder) / "tokenizer.json"), **settings)

    def settings(self) -> dict[str, Any]:
        """What `encoder.json` holds."""
        return {"max_tokens": self.max_tokens, "inputs": list(self.inputs), "pad_id": self.pad_id}

    def shortened(self, max_tokens: int) -> "TextEncoder":
        """The same encoder with another limit, for batches of an exact length."""
        return TextEncoder(self._file, max_tokens=max_tokens, inputs=self.inputs, pad_id=self.pad_id)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokens(self, texts: Sequence[str]) -> list[Any]:
        """One `tokenizers.Encoding` a text, in parallel threads, truncated, not padded.

        Raises TypeError for what cannot be written as UTF-8, such as half of a surrogate pair.
        """
        return list(self._tokenizer.encode_batch(list(texts)))

    def bucket(self, tokens: int) -> int:
        """The smallest bucket that holds so many tokens."""
        return next(size for size in self.buckets if size >= tokens)

    def pad(self, encodings: Sequence[Any], length: int) -> dict[str, np.ndarray]:
        """The arrays of already tokenized rows, padded on the right to `length`."""
        arrays = {name: np.zeros((len(encodings), length), dtype=np.int64) for name in self.inputs}
        if "input_ids" in arrays:
            arrays["input_ids"].fill(self.pad_id)
        for row, encoding in enumerate(encodings):
            ids = encoding.ids
            values = {
                "input_ids": ids,
                "attention_mask": encoding.attention_mask,
                "token_type_ids": encoding.type_ids,
            }
            for name, array in arrays.items():
                array[row, : len(ids)] = values[name]
        return arrays

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays of one request: its rows padded to the bucket of its longest."""
        encodings = self.tokens(texts)
        return self.pad(encodings, self.bucket(max((len(encoding.ids) for encoding in encodings), default=0)))
