"""The encoder that turns text into token ids with the `tokenizers` library alone."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import dropwhile
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from .beginnings import Beginnings, encode_alone
from .limits import RefusedError

#: Rows are padded to the next of these lengths, because Triton batches only requests of equal shape. At one common
#: length 16 concurrent requests ran as 2 executions of the engine, and at 16 different lengths as 16 executions.
LENGTH_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def buckets_up_to(max_tokens: int) -> tuple[int, ...]:
    """Return the length buckets of a model that takes at most `max_tokens`, which is always the last bucket."""
    return (*(size for size in LENGTH_BUCKETS if size < max_tokens), max_tokens)


_VALUES: dict[str, Callable[[Any], Any]] = {
    "input_ids": attrgetter("ids"),
    "attention_mask": lambda _: 1,  # the rows are not padded yet
    "token_type_ids": attrgetter("type_ids"),
}


class TextEncoder:
    """The encoder that turns texts, or pairs of texts, into the int64 arrays `[batch, sequence]` that a model takes.

    Args:
        tokenizer_file: A `tokenizer.json`. Its truncation and padding are cleared, because they are leftovers of the
            last training run, and often pad every text to a fixed length.
        max_tokens: The length to which longer texts are cut, special tokens included.
        inputs: The arrays to make, in order: `input_ids`, `attention_mask`, `token_type_ids`.
        pad_id: The token id that pads a row.
        strategy: Which of two texts is cut: `longest_first`, `only_first`, `only_second`.
        stride: The number of tokens that the pieces of a cut text have in common, see `tokens`.
        buckets: The lengths to which rows are padded, in order. `max_tokens` is the last. Default: `buckets_up_to`.
        before: The special tokens before a text.
        after: The special tokens after a text.
        between: The special tokens between the texts of a pair.
        second_type: The segment id of the second text.
        filler: The id of any token that is not special.
        truncation_side: The side of a text that is cut: `right`, or `left` if the end of a text is kept.
    """

    def __init__(
        self,
        tokenizer_file: str,
        *,
        max_tokens: int,
        inputs: Sequence[str],
        pad_id: int,
        strategy: str = "longest_first",
        stride: int = 0,
        buckets: Sequence[int] = (),
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        between: Sequence[int] = (),
        second_type: int = 0,
        filler: int = 1,
        truncation_side: str = "right",
    ) -> None:
        self._file = tokenizer_file
        self._tokenizer = _open(tokenizer_file)
        self._tokenizer.enable_truncation(
            max_length=max_tokens, strategy=strategy, stride=stride, direction=truncation_side
        )
        self.truncation_side = truncation_side
        self.max_tokens = max_tokens
        self.buckets = tuple(buckets) or buckets_up_to(max_tokens)
        self._chosen = bool(buckets)
        self.inputs = tuple(inputs)
        self.pad_id = pad_id
        self.strategy = strategy
        self.stride = stride
        self.before, self.after, self.filler = tuple(before), tuple(after), filler
        self.between, self.second_type = tuple(between), second_type

    @classmethod
    def from_folder(cls, folder: str) -> "TextEncoder":
        """Return the encoder that a folder's `encoder.json` and `tokenizer.json` describe."""
        settings = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
        return cls(str(Path(folder) / "tokenizer.json"), **settings)

    def shortened(self, max_tokens: int) -> "TextEncoder":
        """Return an encoder of single texts with another limit, for batches of an exact length."""
        return TextEncoder(
            self._file,
            max_tokens=max_tokens,
            inputs=self.inputs,
            pad_id=self.pad_id,
            before=self.before,
            after=self.after,
            between=self.between,
            second_type=self.second_type,
            filler=self.filler,
            truncation_side=self.truncation_side,
        )

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def subword_prefix(self) -> str | None:
        """The mark of a token that continues a word (`##`), or None if the tokenizer's model has no such mark."""
        return getattr(self._tokenizer.model, "continuing_subword_prefix", None) or None

    def special_tokens(self, *, pair: bool = False) -> int:
        """Return the number of special tokens that are added to a text, or to a pair of texts."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def tokens(self, texts: Sequence[Any], *, offsets: bool = True) -> list[Any]:
        """Return one `tokenizers.Encoding` for each text or pair of texts, truncated and not padded.

        The library encodes the texts in parallel threads. The rest of a cut text is in the encoding's `overflowing`, in
        pieces that share `stride` tokens with their neighbours. That rest costs time and memory too, so the texts
        should come from `enough`. With `offsets`, the encodings keep each token's place in the text. A fifth of the
        time is saved without them.

        Raises:
            TypeError: A text cannot be written as UTF-8, such as half of a surrogate pair.
        """
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        return list(encode([self._input(text) for text in texts]))

    def whole(self, text: str) -> Any:
        """Return the encoding of one text with special tokens, not truncated."""
        return encode_alone(self._endless, text, special=True)

    def inner(self, text: str) -> Any:
        """Return the encoding of one text without special tokens around it, not truncated."""
        return encode_alone(self._endless, text)

    def enough(self, texts: tuple[str, ...], *, windows: int = 1) -> tuple[str, ...]:
        """Return beginnings of a text, or of a pair, that give the same row as the whole texts.

        With `windows`, they give the same first `windows` rows. If `longest_first` cuts both texts of a pair, the odd
        token of a row goes to the text with more tokens. Of texts that are too long to count, it goes to the one with
        more characters.

        Raises:
            RefusedError: It would take too long to find the beginnings.
        """
        if self.truncation_side == "left":
            return self._require_short(texts)
        if len(texts) == 2 and self.strategy == "longest_first":
            return self._enough_of_both(*texts)
        tokens = self.max_tokens + (windows - 1) * (self.max_tokens - self.stride)
        return tuple(self._beginnings.find(text, tokens) for text in texts)

    @property
    def margin(self) -> int:
        """The number of tokens before a cut that the cut may change."""
        return self._beginnings.margin

    def longest_read(self) -> int:
        """Return the length of the longest text that is tokenized whole for a single row, in characters."""
        return self._beginnings.most(self.max_tokens)

    def cut(self, text: str, tokens: int) -> str:
        """Return the beginning of a text that so many tokens hold.

        Raises:
            RefusedError: As in `enough`.
        """
        found = encode_alone(self._endless, self._beginnings.find(text, tokens + 1))
        if len(found) <= tokens:
            return text
        return text[: found.offsets[tokens - 1][1]]

    def count(self, text: str, most: int) -> int:
        """Return the number of tokens of a text, without special tokens.

        Of a long text, only a beginning is counted, which has at least `most` tokens.

        Raises:
            RefusedError: As in `enough`.
        """
        return self._count(self._beginnings.find(text, most))

    def join(self, tokens: Sequence[str]) -> str:
        """Return tokens as text, with the pieces of words joined."""
        decoder = self._tokenizer.decoder
        return str(decoder.decode(list(tokens))) if decoder is not None else " ".join(tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return token ids as text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def given(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids that a client sent in place of texts, without the padding on either side.

        Raises:
            RefusedError: No token is left, there are too many tokens, or an id is not in the vocabulary.
        """
        kept = list(ids)
        # If the token that ends a text also pads rows, one such token stays.
        last = [self.pad_id] * (self.pad_id in self.after[-1:])
        while kept[-1 - len(last) :] == [self.pad_id, *last]:
            kept.pop()
        if self.pad_id not in self.before:
            kept = [*dropwhile(lambda token: token == self.pad_id, kept)]
        if not kept:
            raise RefusedError("the request holds a row without a token")
        if len(kept) > self.max_tokens:
            raise RefusedError(f"a row holds {len(kept)} tokens; this model takes at most {self.max_tokens}")
        if min(kept) < 0 or max(kept) >= self.vocabulary_size:
            raise RefusedError(f"a row holds a token id that is not from 0 to {self.vocabulary_size - 1}")
        return kept

    def parts(self, ids: Sequence[int]) -> list[list[int]]:
        """Return the ids of each text, without the special tokens around them."""
        inner = list(ids)
        if self.before and tuple(inner[: len(self.before)]) == self.before:
            inner = inner[len(self.before) :]
        if self.after and tuple(inner[-len(self.after) :]) == self.after:
            inner = inner[: -len(self.after)]
        place = self._between(inner)
        return [inner] if place is None else [inner[:place], inner[place + len(self.between) :]]

    def types_of(self, ids: Sequence[int]) -> list[int]:
        """Return the segment id of each token."""
        place = self._between(ids[: len(ids) - len(self.after)])
        first = len(ids) if place is None else place + len(self.between)
        return [0] * first + [self.second_type] * (len(ids) - first)

    def _between(self, ids: Sequence[int]) -> int | None:
        size = len(self.between)
        places = range(len(ids) - size + 1) if size else range(0)
        return next((place for place in places if tuple(ids[place : place + size]) == self.between), None)

    def bucket(self, tokens: int) -> int:
        """Return the smallest bucket that holds so many tokens."""
        return next(size for size in self.buckets if size >= tokens)

    def set_length_step(self, step: int) -> None:
        """Pad to the next multiple of `step` from now on, unless the buckets were chosen for a user's lengths."""
        if not self._chosen:
            self.buckets = (*range(step, self.max_tokens, step), self.max_tokens)

    def pad(self, encodings: Sequence[Any], length: int) -> dict[str, np.ndarray]:
        """Return the arrays of already tokenized rows, padded on the right to `length`."""
        arrays = {name: np.zeros((len(encodings), length), dtype=np.int64) for name in self.inputs}
        if "input_ids" in arrays:
            arrays["input_ids"].fill(self.pad_id)
        for row, encoding in enumerate(encodings):
            tokens = len(encoding)
            for name, array in arrays.items():
                array[row, :tokens] = _VALUES[name](encoding)
        return arrays

    def example(self, rows: int, tokens: int, extra: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Return rows for trying an engine out, without padding.

        The rows look like the tokenizer's own, because models look for the special tokens. `extra` names the inputs
        that are one position a row, `[rows, 1]`.
        """
        row = framed([self.filler] * tokens, self.before, self.after)
        values = {"input_ids": row, "attention_mask": [1] * tokens, "token_type_ids": [0] * tokens}
        arrays = {name: np.array([values[name]] * rows, dtype=np.int64) for name in self.inputs}
        return {**arrays, **{name: np.full((rows, 1), min(1, tokens - 1), dtype=np.int64) for name in extra}}

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the arrays of one request, whose rows are padded to the bucket of its longest row."""
        encodings = self.tokens(texts)
        return self.pad(encodings, self.bucket(max((len(encoding.ids) for encoding in encodings), default=0)))

    def _input(self, text: Any) -> Any:
        """Return the text as the library takes it: a string, or a pair of strings."""
        return text[0] if isinstance(text, tuple) and len(text) == 1 else text

    def _require_short(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the texts whole, because a beginning does not contain the end that the model reads.

        Raises:
            RefusedError: One of the texts is long.
        """
        longest, most = max(map(len, texts)), self.longest_read()
        if longest > most:
            raise RefusedError(
                f"a text holds {longest} characters; this model keeps the end of a text, and takes at most {most}"
            )
        return texts

    def _enough_of_both(self, first: str, second: str) -> tuple[str, str]:
        settled, margin = self.max_tokens + 2 * self.margin, self.margin
        short = [self._beginnings.find(text, settled) for text in (first, second)]
        cut = [len(part) < len(text) for part, text in zip(short, (first, second), strict=True)]
        counts = [self._count(part) for part in short]
        # An odd token goes to the text with more tokens, or to the second if both have as many. The last tokens of a
        # beginning are not settled, so its count only shows that the text has as many tokens as were asked for.
        if not any(cut) or any(count < settled and not was_cut for count, was_cut in zip(counts, cut, strict=True)):
            return short[0], short[1]
        if max(len(first), len(second)) <= self.longest_read():
            first_has_more = self._count(first) > self._count(second)
        else:
            first_has_more = len(first) > len(second)
        if (counts[0] > counts[1]) != first_has_more:
            less = 1 if first_has_more else 0
            short[less] = self.cut(short[less], self.max_tokens + margin)
        return short[0], short[1]

    def _count(self, text: str) -> int:
        return len(self.inner(text))

    @cached_property
    def _endless(self) -> Any:
        return _open(self._file)

    @cached_property
    def _beginnings(self) -> Beginnings:
        return Beginnings(self._endless)


def framed(ids: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the ids with special tokens in place of the first and the last ids, as far as there is room."""
    row = list(ids)
    row[: len(before)] = before[: len(row)]
    if after:
        row[-len(after) :] = after[-len(row) :]
    return row


def _open(tokenizer_file: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
