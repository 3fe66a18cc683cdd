"""Evaluation items made of the sample texts, for every task. Written for this project and under its licence."""

from __future__ import annotations

import json
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resources.pipelines.base import Item

_FOLDER = Path(__file__).resolve().parent
#: Questions, notes, reports, chat, in a dozen languages; one object with a `text` a line.
SAMPLE_TEXTS = _FOLDER / "sample_texts.jsonl"
#: What tokenizers, normalizers and truncation tell apart: ligatures, wide letters, invisible and combining characters,
#: emoji with joiners, languages without spaces or from right to left, control characters, the empty text.
RARE_TEXTS = _FOLDER / "sample_rare_texts.jsonl"
#: Questions with contexts made of those texts, some long, some without an answer.
SAMPLE_QUESTIONS = _FOLDER / "sample_questions.jsonl"
#: Asked of the rare texts.
_QUESTION = "What is written here?"
#: Attention takes time by the square of the length: of a text of 8,192 tokens a large model needs minutes. Where texts
#: may be longer than this, the one that is longer than any is cut, and compared as tokens alone.
_LONGEST_EVALUATED = 1024
#: Every so many texts begin a pair.
_PAIR_EVERY = 20
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
def rare_texts() -> tuple[str, ...]:
    """Texts that tell tokenizers apart, the empty one and one of a space alone among them."""
    return tuple(json.loads(line)["text"] for line in RARE_TEXTS.read_text(encoding="utf-8").splitlines())


def long_text(tokens: int) -> str:
    """A text that is longer than so many tokens, however a tokenizer cuts it into words."""
    words = cycle(" ".join(sample_texts()).split())
    return " ".join(islice(words, tokens + 16))


@cache
def sample_questions() -> tuple[tuple[str, str], ...]:
    """60 questions and their contexts."""
    lines = [json.loads(line) for line in SAMPLE_QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return tuple((line["question"], line["context"]) for line in lines)


def telling_texts(max_tokens: int) -> tuple[str, ...]:
    """The rare texts, and one that is longer than the model takes, unless that would take longer than all others."""
    return (*rare_texts(), long_text(max_tokens)) if max_tokens <= _LONGEST_EVALUATED else rare_texts()


def text_items(max_tokens: int) -> list[Item]:
    """One text each."""
    return [{"TEXT": text} for text in (*sample_texts(), *telling_texts(max_tokens))]


def paired_items() -> list[Item]:
    """A text and the one after it, here and there."""
    texts = sample_texts()
    return [{"TEXT": texts[place], "TEXT_PAIR": texts[place + 1]} for place in range(0, len(texts) - 1, _PAIR_EVERY)]


def question_items(max_tokens: int) -> list[Item]:
    """One question and its context each."""
    rare = [(_QUESTION, text) for text in telling_texts(max_tokens) if text.strip()]
    return [{"QUESTION": question, "CONTEXT": context} for question, context in (*sample_questions(), *rare)]


def ranking_items(max_tokens: int, others: int = 4) -> list[Item]:
    """Each question with its own context and with those of others, which are to be ranked below."""
    pairs = sample_questions()
    contexts = [context for _, context in pairs]
    usual = [
        {"QUERY": question, "TEXT": contexts[(number + 7 * step) % len(contexts)]}
        for number, (question, _) in enumerate(pairs)
        for step in range(others + 1)
    ]
    rare = telling_texts(max_tokens)
    return [
        *usual,
        *({"QUERY": _QUESTION, "TEXT": text} for text in rare),
        # As the query too, of which all is kept, as far as it is the shorter one.
        *({"QUERY": text, "TEXT": contexts[number % len(contexts)]} for number, text in enumerate(rare)),
    ]


def labelled_items(max_tokens: int, every: int = 4) -> list[Item]:
    """Every so many texts, each with one of the sets of labels."""
    texts = (*sample_texts()[::every], *telling_texts(max_tokens))
    return [
        {"TEXT": text, "LABELS": json.dumps(_LABEL_SETS[number % len(_LABEL_SETS)])}
        for number, text in enumerate(texts)
    ]


def masked_items(mask: str, max_tokens: int, every: int = 2) -> list[Item]:
    """Every so many texts with one word, and in every eighth of them a second one, replaced by the mask; the rare texts
    with a mask after them.
    """
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
    return [*items, *({"TEXT": f"{text} {mask}"} for text in telling_texts(max_tokens) if text.strip())]
