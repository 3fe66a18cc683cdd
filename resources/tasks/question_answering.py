"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from resources.tasks.base import (
    CheckpointFiles,
    Gates,
    Library,
    Metrics,
    Options,
    Task,
    at_least,
    at_most,
    is_near,
    load_pretrained,
)
from resources.tasks.grading import exact_match, require, word_f1
from resources.tasks.heads import span_finder
from resources.tasks.samples import question_items

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder


class QuestionAnsweringGates(Gates):
    """The gates of question answering.

    Args:
        span_agreement: The share of questions with exactly PyTorch's span.
        score_error: The largest error of the score of a question with the same span.
    """

    span_agreement: float = at_least(0.98)
    score_error: float = at_most(0.05, high=1.0)


class QuestionAnsweringOptions(Options):
    """The options of question answering.

    The defaults are those of transformers' pipeline, which has no limit of windows.

    Args:
        max_tokens: The largest number of tokens of a row.
        stride: The number of tokens that neighbouring windows share.
        max_answer_tokens: The largest number of tokens of an answer.
        handle_impossible_answer: Whether "no answer" is allowed, for models that are trained to give it.
        align_to_words: Whether answers are widened to whole words. Languages without spaces have no such words.
        windows: The largest number of windows. A context is cut after them.
    """

    max_tokens: int = Field(default=384, ge=16)
    stride: int = Field(default=128, ge=0)
    max_answer_tokens: int = Field(default=15, ge=1)
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    windows: int = Field(default=64, ge=1, le=1024)


class QuestionAnsweringTask(Task):
    """The task with inputs QUESTION and CONTEXT and output RESULT.

    RESULT is a JSON object with `answer`, `score`, `start` and `end`.
    """

    name: ClassVar[str] = "question-answering"
    gates: ClassVar[type[Gates]] = QuestionAnsweringGates
    fields: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    options: ClassVar[type[Options]] = QuestionAnsweringOptions
    per_token: ClassVar[bool] = True

    def example(self, settings: dict[str, Any]) -> str:
        return '--question "a question" "any text that may answer it"'

    def check(self, files: CheckpointFiles) -> None:
        files.require_head(self.name, "ForQuestionAnswering", "a question answering head")

    def output(self, files: CheckpointFiles) -> str:
        return "span_logits"

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForQuestionAnswering

        return span_finder(load_pretrained(AutoModelForQuestionAnswering, files, **load))

    def max_tokens(self, limit: int, options: Options) -> int:
        assert isinstance(options, QuestionAnsweringOptions)
        return min(limit, options.max_tokens)

    def stride(self, max_tokens: int, options: Options) -> int:
        assert isinstance(options, QuestionAnsweringOptions)
        return min(options.stride, max_tokens // 2)

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        import torch
        from transformers import AutoModelForQuestionAnswering

        from resources.tasks.question_answering_reference import QuestionAnswerer

        model = AutoModelForQuestionAnswering.from_pretrained(
            files.folder, dtype=torch.float32, local_files_only=True, **load
        )
        answerer = QuestionAnswerer(
            model,
            tokenizer,
            max_seq_len=encoder.max_tokens,
            doc_stride=encoder.stride,
            max_answer_len=settings["max_answer_tokens"],
            handle_impossible_answer=settings["handle_impossible_answer"],
            align_to_words=settings["align_to_words"],
            most_windows=settings["windows"],
        )
        return Library(
            "transformers' model and tokenizer, and the arithmetic of pipeline('question-answering') of version 4.57",
            lambda item: answerer.answer(item["QUESTION"], item["CONTEXT"]),
        )

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        if (expected["answer"], _span(expected)) != (found["answer"], _span(found)):
            return f"{found['answer'][:60]!r}, and not {expected['answer'][:60]!r}"
        if not is_near(expected["score"], found["score"]):
            return f"score {found['score']:.6g}, and not {expected['score']:.6g}"
        return ""

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return question_items(max_tokens)

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        question, context = require(line, "question", "context")
        right = line.get("answers")
        if right is not None and (not isinstance(right, list) or not all(isinstance(text, str) for text in right)):
            raise ValueError("'answers' is not a list of texts; it is empty where the context has no answer")
        return [({"QUESTION": question, "CONTEXT": context}, right)]

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        pairs = [
            (texts or [""], answer["answer"]) for texts, answer in zip(right, answers, strict=True) if texts is not None
        ]
        if not pairs:
            return {}
        return {
            "exact_match": sum(exact_match(texts, answer) for texts, answer in pairs) / len(pairs),
            "f1": sum(word_f1(texts, answer) for texts, answer in pairs) / len(pairs),
        }

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        return np.array(
            [
                1.0 - abs(first["score"] - second["score"]) if _span(first) == _span(second) else 0.0
                for first, second in zip(baseline, answers, strict=True)
            ]
        )

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        pairs = list(zip(baseline, answers, strict=True))
        same = [(first, second) for first, second in pairs if _span(first) == _span(second)]
        return {
            "span_agreement": len(same) / len(pairs),
            "score_error": max((abs(first["score"] - second["score"]) for first, second in same), default=0.0),
        }


def _span(answer: dict[str, Any]) -> tuple[int, int]:
    return answer["start"], answer["end"]
