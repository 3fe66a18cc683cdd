"""The base of the pipelines, which turn a request's texts into an engine's rows and its outputs into answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .limits import RefusedError, RequestLimits
from .names import TOKEN_IDS
from .tokenization import TextEncoder

#: The values of one request by the names of its inputs: {"QUESTION": ..., "CONTEXT": ...}. A value is a text, or a list
#: of token ids that a client sent in place of texts.
Item = dict[str, Any]


@dataclass(frozen=True)
class GivenTokens:
    """The tokens of a row that a client tokenized by itself. They take the place of a `tokenizers.Encoding`."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    overflowing: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Row:
    """One row for the engine.

    Args:
        encoding: A `tokenizers.Encoding`, or the `GivenTokens` of a client.
        extra: The model's inputs that are one number a row, by name.
    """

    encoding: Any
    extra: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The row's length in tokens, without padding and with special tokens."""
        return len(self.encoding)


class Pipeline:
    """The code of one task that runs before and after its engine.

    A pipeline holds no state between requests, so several threads may use one instance.

    Attributes:
        inputs: The names of the texts that a request has.
        optional: The names of the texts that a request may have as well.
        from_ids: The names of the texts that token ids may replace.
        strategy: Which of two texts is cut if both together are too long.
        windowed: Whether a text that is too long becomes up to `windows` rows that overlap. Otherwise it is cut.
        structured: Whether an answer is a JSON document. Otherwise it is the engine's own numbers.
        offsets: Whether the answer needs the tokens' places in the text.
        limits: The limits of one request.
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
        """Return the texts that are tokenized for the request, one or two texts for each row.

        Raises:
            RefusedError: The request has no answer.
        """
        return [self.encoder.enough(tuple(item[name] for name in self.inputs), windows=self.windows)]

    def given(self, ids: Sequence[int]) -> Item:
        """Return the texts that a client's token ids, with the special tokens around them, stand for.

        The ids are decoded, and the offsets in an answer refer to the decoded text. That text must encode to the same
        ids again, because the engine would otherwise answer other ids than the client sent.

        Raises:
            RefusedError: The ids do not pass that check, are too many, or stand for too many or too few texts.
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
        """Raise RefusedError unless the token ids hold as many texts as they replace."""
        if len(parts) != len(self.from_ids):
            raise RefusedError(f"{TOKEN_IDS} holds {len(parts)} texts; this model takes {len(self.from_ids)}")

    def prepare(self, item: Item) -> Any:
        """Return the request in the form that `tokenize` takes.

        Raises:
            RefusedError: The request has no answer.
        """
        return self.segments(item)

    def tokenize(self, prepared: Sequence[Any]) -> list[list[Row]]:
        """Return the engine's rows for each prepared request."""
        # One call for all texts uses all cores.
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
        """Return the engine's rows for each request.

        Raises:
            RefusedError: One of the requests has no answer.
        """
        return self.tokenize([self.prepare(item) for item in items])

    @property
    def windows(self) -> int:
        """The largest number of rows that one text can become."""
        return int(self.settings["windows"]) if self.windowed else 1

    def arrays(self, rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
        """Return the engine's int64 inputs.

        The tokenizer's inputs are `[rows, length]`, padded on the right, and the extra inputs are `[rows, 1]`.
        """
        arrays = self.encoder.pad([row.encoding for row in rows], length)
        for name in rows[0].extra if rows else ():
            arrays[name] = np.array([[row.extra[name]] for row in rows], dtype=np.int64)
        return arrays

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> Any:
        """Return the request's answer.

        The engine gives one output for each row, fp32 `[width]` or `[tokens, width]`, without padding.
        """
        raise NotImplementedError

    def _windows(self, encoding: Any) -> list[Row]:
        more = encoding.overflowing[: self.windows - 1] if self.windowed else ()
        return [Row(window) for window in (encoding, *more)]


def softmax(values: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return result
