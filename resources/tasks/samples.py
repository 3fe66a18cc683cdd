"""Evaluation items made of the sample texts, for every task. Written for this project and under its licence."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resources.pipelines.base import Item

_FOLDER = Path(__file__).resolve().parents[1] / "evaluation"
#: Questions, notes, reports, chat, in a dozen languages; one object with a `text` a line.
SAMPLE_TEXTS = _FOLDER / "sample_texts.jsonl"
#: Questions with contexts made of those texts, some long, some without an answer.
SAMPLE_QUESTIONS = _FOLDER / "sample_questions.jsonl"
#: Sets of labels for texts of any kind.
_LABEL_SETS = (
    ["urgent", "not urgent"],
    ["health", "travel", "technology", "cooking", "finance"],
    ["question", "complaint", "instruction"],
    ["positive"],
    ["sport", "politics", "gardening", "law", "music", "history", "family", "shopping"],
)


@cache
def sample_texts() -> tuple[str, ...]:
    """320 texts of 1 to 320 words."""
    return tuple(json.loads(line)["text"] for line in SAMPLE_TEXTS.read_text(encoding="utf-8").splitlines())


@cache
def sample_questions() -> tuple[tuple[str, str], ...]:
    """60 questions and their contexts."""
    lines = [json.loads(line) for line in SAMPLE_QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return tuple((line["question"], line["context"]) for line in lines)


def text_items() -> list[Item]:
    """One text each."""
    return [{"TEXT": text} for text in sample_texts()]


def question_items() -> list[Item]:
    """One question and its context each."""
    return [{"QUESTION": question, "CONTEXT": context} for question, context in sample_questions()]


def ranking_items(others: int = 4) -> list[Item]:
    """Each question with its own context and with those of others, which are to be ranked below."""
    pairs = sample_questions()
    contexts = [context for _, context in pairs]
    return [
        {"QUERY": question, "TEXT": contexts[(number + 7 * step) % len(contexts)]}
        for number, (question, _) in enumerate(pairs)
        for step in range(others + 1)
    ]


def labelled_items(every: int = 4) -> list[Item]:
    """Every so many texts, each with one of the sets of labels."""
    texts = sample_texts()[::every]
    return [
        {"TEXT": text, "LABELS": json.dumps(_LABEL_SETS[number % len(_LABEL_SETS)])}
        for number, text in enumerate(texts)
    ]


def masked_items(mask: str, every: int = 2) -> list[Item]:
    """Every so many texts with one word, and in every eighth of them a second one, replaced by the mask."""
    items: list[Item] = []
    for number, text in enumerate(sample_texts()[::every]):
        words = text.split(" ")
        if len(words) < 2:  # a word of a language without spaces: the mask takes the middle of it
            words = [
                text[: len(text) // 3],
                text[len(text) // 3 : -(len(text) // 3) or None],
                text[-(len(text) // 3) :],
            ]
            if not all(words):
                continue
            items.append({"TEXT": f"{words[0]}{mask}{words[2]}"})
            continue
        words[number * 7 % len(words)] = mask
        if number % 8 == 0 and len(words) > 2:
            words[(number * 7 + len(words) // 2) % len(words)] = mask
        items.append({"TEXT": " ".join(words)})
    return items
