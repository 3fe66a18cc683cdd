"""The span of a context that answers a question, chosen as transformers' question-answering pipeline chose it.

That pipeline left transformers with version 5; its arithmetic is still there in `document_question_answering`.
Method: Chen et al., "Reading Wikipedia to Answer Open-Domain Questions" (2017), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row, softmax


class QuestionAnsweringPipeline(Pipeline):
    """A question and a context to `answer`, `score`, `start`, `end` (characters of the context).

    settings: `max_answer_tokens`; `handle_impossible_answer`: an empty answer is one of the answers.
    outputs: logits of start and end `[tokens, 2]`.
    """

    inputs: ClassVar[tuple[str, ...]] = ("QUESTION", "CONTEXT")
    strategy: ClassVar[str] = "only_second"
    windowed: ClassVar[bool] = True

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        # Two thirds of what two windows do not share: a context must have room beside any question.
        room = 2 * (self.encoder.max_tokens - self.encoder.stride) // 3
        return [
            (self.encoder.cut(item["QUESTION"], max(1, room - self.encoder.special_tokens(pair=True))), item["CONTEXT"])
        ]

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        best: dict[str, Any] = {"answer": "", "score": 0.0, "start": 0, "end": 0}
        nothing = 1.0
        for row, output in zip(rows, outputs, strict=True):
            allowed = np.array([number == 1 for number in row.encoding.sequence_ids])
            if not allowed.any():
                continue
            # The first token stands for "no answer": it takes part in the softmax and is no answer itself.
            allowed[0] = True
            start, end = softmax(np.where(allowed[:, None], output, -np.inf).T)
            nothing = min(nothing, float(start[0] * end[0]))
            start[0] = end[0] = 0.0
            first, last, score = _best_span(start, end, self.settings["max_answer_tokens"])
            if score > best["score"]:
                begin, stop = _characters(row.encoding, first, last)
                best = {"answer": item["CONTEXT"][begin:stop], "score": score, "start": begin, "end": stop}
        if self.settings["handle_impossible_answer"] and nothing > best["score"]:
            return {"answer": "", "score": nothing, "start": 0, "end": 0}
        return best


def _best_span(start: np.ndarray, end: np.ndarray, longest: int) -> tuple[int, int, float]:
    """The span of at most `longest` tokens with the largest product of both probabilities."""
    longest = min(longest, len(start))
    padded = np.concatenate([end, np.zeros(longest - 1, dtype=end.dtype)])
    products = start[:, None] * np.lib.stride_tricks.sliding_window_view(padded, longest)
    first, length = np.unravel_index(int(products.argmax()), products.shape)
    return int(first), int(first + length), float(products[first, length])


def _characters(encoding: Any, first: int, last: int) -> tuple[int, int]:
    """From the beginning of the first token's word to the end of the last one's."""
    begin, stop = encoding.token_to_word(first), encoding.token_to_word(last)
    if begin is None or stop is None:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    return encoding.word_to_chars(begin, 1)[0], encoding.word_to_chars(stop, 1)[1]
