"""A second, plain implementation of extractive question answering, with which this project's answers are compared.

transformers 5 has no pipeline for this task. This module follows the documentation and the behaviour of the last
pipeline, in version 4.57.3. It uses that library's own tokenizer and model, and reads one window and one span after the
other. It uses nothing of resources.pipelines, because it must not repeat a mistake that is made there. Only child
processes import this module.
"""

from __future__ import annotations

import math
from typing import Any

import torch

#: The number of spans of a window that are considered if answers are widened to words. Several may become one answer.
_SPANS = 12


class QuestionAnswerer:
    """The class that answers as `pipeline("question-answering")` did. Its parameters have that pipeline's names.

    Only `most_windows` is new. A release cuts a context after this many windows, which the pipeline never did.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_seq_len: int,
        doc_stride: int,
        max_answer_len: int,
        handle_impossible_answer: bool,
        align_to_words: bool,
        most_windows: int,
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._length, self._stride, self._longest = max_seq_len, doc_stride, max_answer_len
        self._impossible, self._align, self._most = handle_impossible_answer, align_to_words, most_windows

    def answer(self, question: str, context: str) -> dict[str, Any] | None:
        """Return the best answer, or None if there is nothing to compare with.

        The pipeline refused an empty question or context, and a release cuts a context of too many windows.
        """
        if not question or not context:
            return None
        windows = self._tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self._length,
            stride=self._stride,
            return_overflowing_tokens=True,
            padding=False,
        )
        if len(windows.encodings) > self._most:
            return None
        found: list[dict[str, Any]] = []
        nothing = math.inf
        for number, encoding in enumerate(windows.encodings):
            given = {
                name: torch.tensor([windows[name][number]])
                for name in self._tokenizer.model_input_names
                if name in windows
            }
            with torch.inference_mode():
                said = self._model(**given)
            allowed = [part == 1 for part in encoding.sequence_ids]
            start = self._chances(said.start_logits[0].tolist(), allowed)
            end = self._chances(said.end_logits[0].tolist(), allowed)
            nothing = min(nothing, start[0] * end[0])
            for first, last, score in self._spans(start, end, allowed):
                begin, stop = self._characters(encoding, first, last)
                _add(found, context[begin:stop], begin, stop, score)
        if self._impossible:
            found.append({"answer": "", "score": nothing, "start": 0, "end": 0})
        return max(found, key=lambda one: one["score"]) if found else {"answer": "", "score": 0.0, "start": 0, "end": 0}

    @staticmethod
    def _chances(logits: list[float], allowed: list[bool]) -> list[float]:
        """Return the softmax over the context's tokens and the first token, which stands for "no answer"."""
        kept = [
            value if inside or place == 0 else -math.inf
            for place, (value, inside) in enumerate(zip(logits, allowed, strict=True))
        ]
        most = max(kept)
        powers = [math.exp(value - most) for value in kept]
        total = sum(powers)
        return [power / total for power in powers]

    def _spans(self, start: list[float], end: list[float], allowed: list[bool]) -> list[tuple[int, int, float]]:
        spans = []
        for first in range(1, len(start)):
            for last in range(first, min(first + self._longest, len(end))):
                spans.append((first, last, start[first] * end[last]))
        spans.sort(key=lambda span: -span[2])
        best = spans[: _SPANS if self._align else 1]
        return [span for span in best if allowed[span[0]] and allowed[span[1]]]

    def _characters(self, encoding: Any, first: int, last: int) -> tuple[int, int]:
        if self._align:
            words = encoding.word_ids[first], encoding.word_ids[last]
            if None not in words:
                return encoding.word_to_chars(words[0], 1)[0], encoding.word_to_chars(words[1], 1)[1]
        return encoding.offsets[first][0], encoding.offsets[last][1]


def _add(found: list[dict[str, Any]], text: str, begin: int, stop: int, score: float) -> None:
    """Add an answer to the found ones.

    Equal texts, for example from another window, are one answer whose scores are added up.
    """
    for one in found:
        if one["answer"].lower() == text.lower():
            one["score"] += score
            return
    found.append({"answer": text, "score": score, "start": begin, "end": stop})
