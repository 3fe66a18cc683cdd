"""From a request's texts to rows of an engine's input, and from the engine's answers to the request's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .limits import RefusedError, RequestLimits
from .names import TOKEN_IDS
from .tokenization import TextEncoder

#: One request, by the name of its input: {"QUESTION": ..., "CONTEXT": ...}; token ids in place of texts are a list.
Item = dict[str, Any]


@dataclass(frozen=True)
class GivenTokens:
    """What a client cut text into by itself, in place of a `tokenizers.Encoding`."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    overflowing: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Row:
    """One row for the engine: a `tokenizers.Encoding`, and the model's inputs that are one number a row."""

    encoding: Any
    extra: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Its length without padding, special tokens included."""
        return len(self.encoding)


class Pipeline:
    """What stands before and behind the engine of one task.

    `inputs`: the names of a request's texts. `optional`: of further ones. `from_ids`: of those that token ids may stand
    for. `strategy`: which of two texts is cut where both together are too long.
    `windowed`: a text that is too long becomes several rows that overlap, up to `windows` of them, and is not cut.
    `structured`: an answer is a JSON document; else it is the engine's own numbers.
    `offsets`: the answer says where in the text something stands.
    Holds no state between requests, so that one instance may be used by several threads. `limits`: of one request.
    """

    inputs: ClassVar[tuple[str, ...]] = ("TEXT",)
    optional: ClassVar[tuple[str, ...]] = ()
    from_ids: ClassVar[tuple[str, ...]] = ("TEXT",)
    strategy: ClassVar[str] = "longest_first"
    windowed: ClassVar[bool] = False
    structured: ClassVar[bool] = True
    offsets: ClassVar[bool] = True

    def __init__(self, encoder: TextEncoder, settings: dict[str, Any]) -> None:
        self.encoder, self.settings = encoder, settings
        self.limits = RequestLimits()

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        """What is tokenized for the request, one or two texts each. Raises RefusedError where it has no answer."""
        return [self.encoder.enough(tuple(item[name] for name in self.inputs), windows=self.windows)]

    def given(self, ids: Sequence[int]) -> Item:
        """The texts that token ids stand for, special tokens around them included. Raises RefusedError.

        Answers that say where in a text something stands are about the text that the tokens are decoded to. Ids are
        refused that the tokenizer would not make of that text: they would be answered as other ids.
        """
        parts = self.encoder.parts(self.encoder.given(ids))
        self.require_texts(parts)
        texts = [self.encoder.decode(part) for part in parts]
        if [encoding.ids for encoding in map(self.encoder.inner, texts)] != parts:
            raise RefusedError(
                f"{TOKEN_IDS} holds tokens that this model's tokenizer does not make of the text that they stand for; "
                "send the text"
            )
        return dict(zip(self.from_ids, texts, strict=True))

    def require_texts(self, parts: Sequence[list[int]]) -> None:
        """Raise RefusedError where token ids are not of as many texts as a request has."""
        if len(parts) != len(self.from_ids):
            raise RefusedError(f"{TOKEN_IDS} holds {len(parts)} texts; this model takes {len(self.from_ids)}")

    def prepare(self, item: Item) -> Any:
        """What `tokenize` takes for the request. Raises RefusedError where the request has no answer."""
        return self.segments(item)

    def tokenize(self, prepared: Sequence[Any]) -> list[list[Row]]:
        """The engine's rows for each request."""
        # In one call, which uses all cores.
        texts = [segment for group in prepared for segment in group if not isinstance(segment, Row)]
        encodings = iter(self.encoder.tokens(texts, offsets=self.offsets))
        return [
            [
                row
                for segment in group
                for row in ([segment] if isinstance(segment, Row) else self._windows(next(encodings)))
            ]
            for group in prepared
        ]

    def rows(self, items: Sequence[Item]) -> list[list[Row]]:
        """The engine's rows for each request. Raises RefusedError where one has no answer."""
        return self.tokenize([self.prepare(item) for item in items])

    @property
    def windows(self) -> int:
        """The most rows that a text becomes."""
        return int(self.settings["windows"]) if self.windowed else 1

    def arrays(self, rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
        """The engine's int64 inputs: `[rows, length]`, padded on the right, and `[rows, 1]` for the extra ones."""
        arrays = self.encoder.pad([row.encoding for row in rows], length)
        for name in rows[0].extra if rows else ():
            arrays[name] = np.array([[row.extra[name]] for row in rows], dtype=np.int64)
        return arrays

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> Any:
        """The request's answer. outputs: one a row, fp32 `[width]` or `[tokens, width]`, without padding."""
        raise NotImplementedError

    def _windows(self, encoding: Any) -> list[Row]:
        more = encoding.overflowing[: self.windows - 1] if self.windowed else ()
        return [Row(window) for window in (encoding, *more)]


def softmax(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return result
