"""Evaluation items for every task, made of the sample texts.

The texts were written for this project and are under its licence.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resources.pipelines.base import Item

_FOLDER = Path(__file__).resolve().parent
#: Questions, notes, reports and chat in a dozen languages. Each line is an object with a `text`.
SAMPLE_TEXTS = _FOLDER / "sample_texts.jsonl"
#: Texts that tokenizers, normalizers and truncation may treat differently: ligatures, wide letters, invisible and
#: combining characters, emoji with joiners, languages without spaces or from right to left, control characters, and the
#: empty text.
RARE_TEXTS = _FOLDER / "sample_rare_texts.jsonl"
#: Questions with contexts made of the sample texts. Some contexts are long, and some have no answer.
SAMPLE_QUESTIONS = _FOLDER / "sample_questions.jsonl"
#: The question for each rare text.
_QUESTION = "What is written here?"
#: The time of attention grows with the square of the length, and a large model needs minutes for a text of 8,192
#: tokens. So a model that takes more tokens than this does not answer the text that exceeds its limit. Only the tokens
#: of such a text are compared, see resources.accuracy.reference.
_LONGEST_EVALUATED = 1024
#: One of this many texts begins a pair.
_PAIR_EVERY = 20
#: Sets of labels that suit texts of any kind.
_LABEL_SETS = (
    ["urgent", "not urgent"],
    ["health", "travel", "technology", "cooking", "finance"],
    ["question", "complaint", "instruction"],
    ["positive"],
    ["sport", "politics", "gardening", "law", "music", "history", "family", "shopping"],
)


@cache
def sample_texts() -> tuple[str, ...]:
    """Return the 320 sample texts, of 1 to 320 words."""
    return tuple(json.loads(line)["text"] for line in SAMPLE_TEXTS.read_text(encoding="utf-8").splitlines())


@cache
def rare_texts() -> tuple[str, ...]:
    """Return texts that tell tokenizers apart, including the empty text and a text of one space."""
    return tuple(json.loads(line)["text"] for line in RARE_TEXTS.read_text(encoding="utf-8").splitlines())


def long_text(tokens: int) -> str:
    """Return a text that has more than `tokens` tokens with any tokenizer."""
    words = cycle(" ".join(sample_texts()).split())
    return " ".join(islice(words, tokens + 16))


@cache
def sample_questions() -> tuple[tuple[str, str], ...]:
    """Return the 60 sample questions and their contexts."""
    lines = [json.loads(line) for line in SAMPLE_QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return tuple((line["question"], line["context"]) for line in lines)


def telling_texts(max_tokens: int) -> tuple[str, ...]:
    """Return the rare texts and a text that is longer than the model takes.

    The long text is left out if its evaluation would take longer than that of all the others.
    """
    return (*rare_texts(), long_text(max_tokens)) if max_tokens <= _LONGEST_EVALUATED else rare_texts()


def text_items(max_tokens: int) -> list[Item]:
    """Return items of one text."""
    return [{"TEXT": text} for text in (*sample_texts(), *telling_texts(max_tokens))]


def paired_items() -> list[Item]:
    """Return items of a text and the text after it, for one in `_PAIR_EVERY` texts."""
    texts = sample_texts()
    return [{"TEXT": texts[place], "TEXT_PAIR": texts[place + 1]} for place in range(0, len(texts) - 1, _PAIR_EVERY)]


def question_items(max_tokens: int) -> list[Item]:
    """Return items of one question and its context."""
    rare = [(_QUESTION, text) for text in telling_texts(max_tokens) if text.strip()]
    return [{"QUESTION": question, "CONTEXT": context} for question, context in (*sample_questions(), *rare)]


def ranking_items(max_tokens: int, others: int = 4) -> list[Item]:
    """Return items of each question with its own context, and with `others` contexts that should rank below it."""
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
        # A rare text is the query too, because truncation treats a query like a text: it cuts the longer of the two.
        *({"QUERY": text, "TEXT": contexts[number % len(contexts)]} for number, text in enumerate(rare)),
    ]


def labelled_items(max_tokens: int, every: int = 4) -> list[Item]:
    """Return items of one in `every` texts, each with one of the sets of labels."""
    texts = (*sample_texts()[::every], *telling_texts(max_tokens))
    return [
        {"TEXT": text, "LABELS": json.dumps(_LABEL_SETS[number % len(_LABEL_SETS)])}
        for number, text in enumerate(texts)
    ]


def masked_items(mask: str, max_tokens: int, every: int = 2) -> list[Item]:
    """Return items with masks.

    The mask replaces one word in one of `every` texts, and a second word in every eighth of these texts. A mask also
    follows each of the rare texts.
    """
    items: list[Item] = []
    for number, text in enumerate(sample_texts()[::every]):
        words = text.split(" ")
        if len(words) < 2:  # the text has no spaces, so the mask takes the middle of it
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
