"""What transformers itself answers: its pipelines where it has them, else its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resources.pipelines.base import Item

#: By task: how a small checkpoint for it is made, see tests.checkpoints.make_checkpoint.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "classification": {"labels": ("bad", "fair", "good")},
    "reranking": {"head": "sequence", "labels": ("relevance",)},
    "token-classification": {"head": "tokens", "labels": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")},
    "question-answering": {"head": "question"},
    "zero-shot-classification": {"labels": ("contradiction", "neutral", "entailment")},
    "fill-mask": {"head": "mask"},
}


def transformers_answers(task: str, folder: Path, items: Sequence[Item], **options: Any) -> list[Any]:
    """The answer to each item alone, in fp32, from the checkpoint in `folder`."""
    import transformers

    if task == "question-answering":
        return [_span(folder, item, **options) for item in items]
    if task == "reranking":
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(str(folder), device="cpu")
        pairs = [(item["QUERY"], item["TEXT"]) for item in items]
        return [np.atleast_1d(model.predict([pair])[0]) for pair in pairs]
    ask = transformers.pipeline(task, model=str(folder), device="cpu", **options)
    if task == "zero-shot-classification":
        found = [ask(item["TEXT"], json.loads(item["LABELS"])) for item in items]
        return [{"labels": answer["labels"], "scores": answer["scores"]} for answer in found]
    return [ask(item["TEXT"]) for item in items]


def _span(folder: Path, item: Item, *, stride: int, max_tokens: int, impossible: bool = False) -> dict[str, Any]:
    """As transformers' question-answering pipeline did it in its last version, 4.57.3, with what is left of it."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer
    from transformers.pipelines.document_question_answering import select_starts_ends

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        item["QUESTION"],
        item["CONTEXT"],
        truncation="only_second",
        max_length=max_tokens,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    answers: list[dict[str, Any]] = []
    nothing = 1000000.0
    for number, ids in enumerate(encoded["input_ids"]):
        inputs = {name: torch.tensor([encoded[name][number]]) for name in tokenizer.model_input_names}
        with torch.inference_mode():
            logits = model(**inputs)
        forbidden = np.array([[0 if sequence == 1 else 1 for sequence in encoded.sequence_ids(number)]])
        forbidden[0, 0] = 0
        starts, ends, scores, nothing = select_starts_ends(
            logits.start_logits.numpy(),
            logits.end_logits.numpy(),
            forbidden,
            np.ones_like(forbidden),
            nothing,
            top_k=2 * 1 + 10,
            handle_impossible_answer=impossible,
        )
        window = encoded.encodings[number]
        assert len(ids) == len(window.ids)
        for first, last, score in zip(starts.tolist(), ends.tolist(), scores.tolist(), strict=True):
            try:
                begin = window.word_to_chars(window.token_to_word(first), 1)[0]
                stop = window.word_to_chars(window.token_to_word(last), 1)[1]
            except TypeError:  # the first token is no word
                begin, stop = window.offsets[first][0], window.offsets[last][1]
            text = item["CONTEXT"][begin:stop]
            same = [answer for answer in answers if answer["answer"].lower() == text.lower()]
            if same:
                same[0]["score"] += score
            else:
                answers.append({"answer": text, "score": score, "start": begin, "end": stop})
    if impossible:
        answers.append({"answer": "", "score": nothing, "start": 0, "end": 0})
    return sorted(answers, key=lambda answer: answer["score"], reverse=True)[0]


def assert_same(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """The same document: numbers to within the tolerance, everything else exactly."""
    if isinstance(expected, dict) and {"labels", "scores"} <= set(expected):
        # Labels of nearly equal scores may come in either order; each must have its own score.
        assert found["scores"] == sorted(found["scores"], reverse=True)
        found, expected = (
            {**answer, **dict(zip(answer["labels"], answer["scores"], strict=True))} for answer in (found, expected)
        )
        for name in ("labels", "scores"):
            del found[name], expected[name]
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for name in expected:
            assert_same(found[name], expected[name], tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), (found, expected)
        for first, second in zip(found, expected, strict=True):
            assert_same(first, second, tolerance)
    elif isinstance(expected, float | np.floating | np.ndarray):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
    else:
        assert found == expected
