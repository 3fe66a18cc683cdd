"""The choice of the span that answers a question, as transformers' question-answering pipeline made it.

Version 5 of transformers removed that pipeline. This module has the arithmetic of its last version, 4.57.3: it takes
the best spans of every window, widens them to whole words, and adds up the scores of equal answers.
Method: Chen et al., "Reading Wikipedia to Answer Open-Domain Questions" (2017), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row, softmax

#: The number of spans of a window that are considered if spans are widened to words, because several of them may become
#: one answer. As in transformers it is twice the number of wanted answers, plus ten.
_SPANS = 12
#: The score of "no answer" before any window was read. It is larger than any probability.
_NO_WINDOW = 2.0
_NOTHING = {"answer": "", "score": 0.0, "start": 0, "end": 0}


class QuestionAnsweringPipeline(Pipeline):
    """The pipeline that turns a question and a context into `answer`, `score`, `start` and `end`.

    `start` and `end` count characters of the context. The engine's outputs are the logits of start and end,
    `[tokens, 2]`. The settings are `max_answer_tokens`, `handle_impossible_answer`, which allows the empty answer, and
    `align_to_words`, which widens answers to whole words.
    """

    inputs: ClassVar[tuple[str, ...]] = ("QUESTION", "CONTEXT")
    from_ids: ClassVar[tuple[str, ...]] = ("QUESTION", "CONTEXT")
    strategy: ClassVar[str] = "only_second"
    windowed: ClassVar[bool] = True

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        question, context = item["QUESTION"], item["CONTEXT"]
        room = self.encoder.max_tokens - self.encoder.special_tokens(pair=True)
        tokens = self.encoder.count(question, room + 1)
        # The room beside the question must exceed the tokens that windows share. A pair that fits in one row is exempt.
        if tokens + self.encoder.stride >= room and tokens + self.encoder.count(context, room + 1) > room:
            question = self.encoder.cut(question, max(1, 2 * (room - self.encoder.stride) // 3))
        return [self.encoder.enough((question, context), windows=self.windows)]

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        nothing, words = _NO_WINDOW, self.settings["align_to_words"]
        count = _SPANS if words else 1
        for row, output in zip(rows, outputs, strict=True):
            allowed = np.array([number == 1 for number in row.encoding.sequence_ids])
            if not allowed.any():
                continue
            # The first token stands for "no answer". It takes part in the softmax and cannot be part of an answer.
            allowed[0] = True
            start, end = softmax(np.where(allowed[:, None], output, -np.inf).T)
            nothing = min(nothing, float(start[0] * end[0]))
            start[0] = end[0] = 0.0
            for first, last, score in _best_spans(start, end, self.settings["max_answer_tokens"], count):
                if not (allowed[first] and allowed[last]):
                    continue
                begin, stop = _characters(row.encoding, first, last, words=words)
                text = item["CONTEXT"][begin:stop]
                # Equal texts are one answer, even from another place, another window or other tokens of the words.
                known = found.setdefault(text.lower(), {"answer": text, "score": 0.0, "start": begin, "end": stop})
                known["score"] += score
        answers = list(found.values())
        if self.settings["handle_impossible_answer"] and nothing < _NO_WINDOW:
            answers.append({"answer": "", "score": nothing, "start": 0, "end": 0})
        return max(answers, key=lambda answer: answer["score"], default={**_NOTHING})


def _best_spans(start: np.ndarray, end: np.ndarray, longest: int, count: int) -> list[tuple[int, int, float]]:
    """Return the best `count` spans of at most `longest` tokens, best first.

    The score of a span is the product of the probabilities of its start and its end.
    """
    longest = min(longest, len(start))
    padded = np.concatenate([end, np.zeros(longest - 1, dtype=end.dtype)])
    products = (start[:, None] * np.lib.stride_tricks.sliding_window_view(padded, longest)).ravel()
    count = min(count, len(products))
    best = np.argpartition(-products, count - 1)[:count]
    best = best[np.argsort(-products[best], kind="stable")]
    # Spans that reach beyond the last token come from the padding with probability zero, and are dropped.
    spans = ((int(place // longest), int(place // longest + place % longest), float(products[place])) for place in best)
    return [(first, last, score) for first, last, score in spans if last < len(start)]


def _characters(encoding: Any, first: int, last: int, *, words: bool) -> tuple[int, int]:
    """Return where the first token begins and where the last token ends, in characters.

    With `words`, the tokens' words count in place of the tokens, if both tokens belong to words.
    """
    begin, stop = encoding.token_to_word(first), encoding.token_to_word(last)
    if not words or begin is None or stop is None:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    return encoding.word_to_chars(begin, 1)[0], encoding.word_to_chars(stop, 1)[1]
