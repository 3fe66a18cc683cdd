"""The span of a context that answers a question, chosen as transformers' question-answering pipeline chose it.

That pipeline left transformers with version 5; this is the arithmetic of its last version, 4.57.3: the best spans of
every window, widened to whole words, the scores of equal answers added up.
Method: Chen et al., "Reading Wikipedia to Answer Open-Domain Questions" (2017), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row, softmax

#: Spans of a window that are looked at, as transformers took them, where they are widened to words: twice the answers
#: that are wanted, and ten. Several of them may become one answer.
_SPANS = 12
#: More than any probability: no window was looked at.
_NO_WINDOW = 2.0
_NOTHING = {"answer": "", "score": 0.0, "start": 0, "end": 0}


class QuestionAnsweringPipeline(Pipeline):
    """A question and a context to `answer`, `score`, `start`, `end` (characters of the context).

    settings: `max_answer_tokens`; `handle_impossible_answer`: an empty answer is one of the answers; `align_to_words`:
    answers are widened to whole words.
    outputs: logits of start and end `[tokens, 2]`.
    """

    inputs: ClassVar[tuple[str, ...]] = ("QUESTION", "CONTEXT")
    from_ids: ClassVar[tuple[str, ...]] = ("QUESTION", "CONTEXT")
    strategy: ClassVar[str] = "only_second"
    windowed: ClassVar[bool] = True

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        question, context = item["QUESTION"], item["CONTEXT"]
        room = self.encoder.max_tokens - self.encoder.special_tokens(pair=True)
        tokens = self.encoder.count(question, room + 1)
        # Windows need more room beside the question than they share; a pair that fits needs none.
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
            # The first token stands for "no answer": it takes part in the softmax and is no answer itself.
            allowed[0] = True
            start, end = softmax(np.where(allowed[:, None], output, -np.inf).T)
            nothing = min(nothing, float(start[0] * end[0]))
            start[0] = end[0] = 0.0
            for first, last, score in _best_spans(start, end, self.settings["max_answer_tokens"], count):
                if not (allowed[first] and allowed[last]):
                    continue
                begin, stop = _characters(row.encoding, first, last, words=words)
                text = item["CONTEXT"][begin:stop]
                # The same words at another place, in another window or as other tokens of them: one answer.
                known = found.setdefault(text.lower(), {"answer": text, "score": 0.0, "start": begin, "end": stop})
                known["score"] += score
        answers = list(found.values())
        if self.settings["handle_impossible_answer"] and nothing < _NO_WINDOW:
            answers.append({"answer": "", "score": nothing, "start": 0, "end": 0})
        return max(answers, key=lambda answer: answer["score"], default={**_NOTHING})


def _best_spans(start: np.ndarray, end: np.ndarray, longest: int, count: int) -> list[tuple[int, int, float]]:
    """So many spans of at most `longest` tokens with the largest products of both probabilities, the largest first."""
    longest = min(longest, len(start))
    padded = np.concatenate([end, np.zeros(longest - 1, dtype=end.dtype)])
    products = (start[:, None] * np.lib.stride_tricks.sliding_window_view(padded, longest)).ravel()
    count = min(count, len(products))
    best = np.argpartition(-products, count - 1)[:count]
    best = best[np.argsort(-products[best], kind="stable")]
    # Beyond the last token there is none: those of probability zero only fill the list up.
    spans = ((int(place // longest), int(place // longest + place % longest), float(products[place])) for place in best)
    return [(first, last, score) for first, last, score in spans if last < len(start)]


def _characters(encoding: Any, first: int, last: int, *, words: bool) -> tuple[int, int]:
    """From the beginning of the first token to the end of the last one; words: of their words, where they have any."""
    begin, stop = encoding.token_to_word(first), encoding.token_to_word(last)
    if not words or begin is None or stop is None:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    return encoding.word_to_chars(begin, 1)[0], encoding.word_to_chars(stop, 1)[1]
