"""Text to token ids with the `tokenizers` library alone."""

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

#: Rows are padded to the next of these lengths. Triton batches only requests of equal shape: at one common length 16
#: concurrent requests ran as 2 executions of the engine, at 16 different lengths as 16.
LENGTH_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def buckets_up_to(max_tokens: int) -> tuple[int, ...]:
    """The length buckets of a model that takes at most `max_tokens`, which is always the last of them."""
    return (*(size for size in LENGTH_BUCKETS if size < max_tokens), max_tokens)


_VALUES: dict[str, Callable[[Any], Any]] = {
    "input_ids": attrgetter("ids"),
    "attention_mask": lambda _: 1,  # nothing is padded yet
    "token_type_ids": attrgetter("type_ids"),
}


class TextEncoder:
    """Turns texts, or pairs of them, into the int64 arrays `[batch, sequence]` that a model takes.

    tokenizer_file: a `tokenizer.json`. Truncation and padding written in it are cleared: they are whatever the last
        training run left there, and padding of every text to a fixed length is common.
    max_tokens: longer texts are cut to this many tokens, special tokens included.
    inputs: which arrays, and in which order: `input_ids`, `attention_mask`, `token_type_ids`.
    strategy: which of two texts is cut: `longest_first`, `only_first`, `only_second`.
    stride: tokens that the pieces of a cut text have in common; see `tokens`.
    buckets: the lengths that rows are padded to, in order, `max_tokens` the last; default: `buckets_up_to`.
    before, after: the special tokens around a text; between: those between the two of a pair. second_type: the segment
    id of the second one. filler: some token that is not special.
    truncation_side: `right`, or `left` where the end of a text is kept.
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
        """The encoder described by `encoder.json` and `tokenizer.json` in a folder."""
        settings = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
        return cls(str(Path(folder) / "tokenizer.json"), **settings)

    def shortened(self, max_tokens: int) -> "TextEncoder":
        """An encoder of single texts with another limit, for batches of an exact length."""
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
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def subword_prefix(self) -> str | None:
        """What marks a token that goes on with a word (`##`), where the tokenizer's model has such a mark."""
        return getattr(self._tokenizer.model, "continuing_subword_prefix", None) or None

    def special_tokens(self, *, pair: bool = False) -> int:
        """How many tokens are added to a text, or to a pair of them."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def tokens(self, texts: Sequence[Any], *, offsets: bool = True) -> list[Any]:
        """One `tokenizers.Encoding` a text or pair of texts, in parallel threads, truncated, not padded.

        offsets: keep where in the text each token stands; without, a fifth of the time is saved.

        What was cut off is in the encoding's `overflowing`, in pieces that share `stride` tokens with their neighbours.
        Long texts cost time and memory for all that is cut off: give what `enough` returns.
        Raises TypeError for what cannot be written as UTF-8, such as half of a surrogate pair.
        """
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        return list(encode([self._input(text) for text in texts]))

    def whole(self, text: str) -> Any:
        """The encoding of one text, special tokens included, not truncated."""
        return encode_alone(self._endless, text, special=True)

    def inner(self, text: str) -> Any:
        """The encoding of one text without special tokens around it, not truncated."""
        return encode_alone(self._endless, text)

    def enough(self, texts: tuple[str, ...], *, windows: int = 1) -> tuple[str, ...]:
        """A text, or a pair, cut to beginnings whose row, or so many windows, are those of the whole texts.

        Raises RefusedError where that would take too long. A pair of which both are cut (`longest_first`) and too long
        to count gives the odd token of a row to the text with more characters, where otherwise more tokens decide.
        """
        if self.truncation_side == "left":
            return self._require_short(texts)
        if len(texts) == 2 and self.strategy == "longest_first":
            return self._enough_of_both(*texts)
        tokens = self.max_tokens + (windows - 1) * (self.max_tokens - self.stride)
        return tuple(self._beginnings.find(text, tokens) for text in texts)

    @property
    def margin(self) -> int:
        """Tokens in front of a place where a text is cut that the cut may change."""
        return self._beginnings.margin

    def longest_read(self) -> int:
        """Characters of the longest text that is tokenized whole for a single row."""
        return self._beginnings.most(self.max_tokens)

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, as much of it as so many tokens hold. Raises RefusedError, see `enough`."""
        found = encode_alone(self._endless, self._beginnings.find(text, tokens + 1))
        if len(found) <= tokens:
            return text
        return text[: found.offsets[tokens - 1][1]]

    def count(self, text: str, most: int) -> int:
        """Tokens of a text, without special ones; of a long text at least `most`. Raises RefusedError, see `enough`."""
        return self._count(self._beginnings.find(text, most))

    def join(self, tokens: Sequence[str]) -> str:
        """Tokens as text, pieces of words joined."""
        decoder = self._tokenizer.decoder
        return str(decoder.decode(list(tokens))) if decoder is not None else " ".join(tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Token ids as text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def given(self, ids: Sequence[int]) -> list[int]:
        """Token ids that a client gives in place of texts, without the padding on either side. Raises RefusedError."""
        kept = list(ids)
        # Where the token that ends a text pads as well, one of them stays.
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
        """The ids of each text, without the special tokens around them."""
        inner = list(ids)
        if self.before and tuple(inner[: len(self.before)]) == self.before:
            inner = inner[len(self.before) :]
        if self.after and tuple(inner[-len(self.after) :]) == self.after:
            inner = inner[: -len(self.after)]
        place = self._between(inner)
        return [inner] if place is None else [inner[:place], inner[place + len(self.between) :]]

    def types_of(self, ids: Sequence[int]) -> list[int]:
        """The segment id of each token."""
        place = self._between(ids[: len(ids) - len(self.after)])
        first = len(ids) if place is None else place + len(self.between)
        return [0] * first + [self.second_type] * (len(ids) - first)

    def _between(self, ids: Sequence[int]) -> int | None:
        size = len(self.between)
        places = range(len(ids) - size + 1) if size else range(0)
        return next((place for place in places if tuple(ids[place : place + size]) == self.between), None)

    def bucket(self, tokens: int) -> int:
        """The smallest bucket that holds so many tokens."""
        return next(size for size in self.buckets if size >= tokens)

    def set_length_step(self, step: int) -> None:
        """Pad to the next multiple of `step` from now on, unless the buckets were chosen for the user's own lengths."""
        if not self._chosen:
            self.buckets = (*range(step, self.max_tokens, step), self.max_tokens)

    def pad(self, encodings: Sequence[Any], length: int) -> dict[str, np.ndarray]:
        """The arrays of already tokenized rows, padded on the right to `length`."""
        arrays = {name: np.zeros((len(encodings), length), dtype=np.int64) for name in self.inputs}
        if "input_ids" in arrays:
            arrays["input_ids"].fill(self.pad_id)
        for row, encoding in enumerate(encodings):
            tokens = len(encoding)
            for name, array in arrays.items():
                array[row, :tokens] = _VALUES[name](encoding)
        return arrays

    def example(self, rows: int, tokens: int, extra: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Rows as the tokenizer could have made them, without padding, for trying an engine out: models look for the
        special tokens. extra: inputs that are one position a row, `[rows, 1]`.
        """
        row = framed([self.filler] * tokens, self.before, self.after)
        values = {"input_ids": row, "attention_mask": [1] * tokens, "token_type_ids": [0] * tokens}
        arrays = {name: np.array([values[name]] * rows, dtype=np.int64) for name in self.inputs}
        return {**arrays, **{name: np.full((rows, 1), min(1, tokens - 1), dtype=np.int64) for name in extra}}

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays of one request: its rows padded to the bucket of its longest."""
        encodings = self.tokens(texts)
        return self.pad(encodings, self.bucket(max((len(encoding.ids) for encoding in encodings), default=0)))

    def _input(self, text: Any) -> Any:
        """As the library wants it: a string, or a pair of strings."""
        return text[0] if isinstance(text, tuple) and len(text) == 1 else text

    def _require_short(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """The texts themselves: no beginning says what is at the end. Raises RefusedError for one that is long."""
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
        # An odd token goes to the text with more tokens, or to the second. The last tokens of a beginning are not
        # settled, so its count says only that there are as many as were asked for.
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
    """The ids with the special tokens in place of the first and the last ones, as far as there is room."""
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
