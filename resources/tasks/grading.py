"""The usual metrics of answers against the right answers that a user gives, and the reading of a line's fields."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from resources.pipelines.unicode import is_unicode


def micro_f1(expected: Sequence[set[Hashable]], found: Sequence[set[Hashable]]) -> float:
    """Return the harmonic mean of precision and recall over the members of all items, or 1 if there are no members."""
    both = sum(len(first & second) for first, second in zip(expected, found, strict=True))
    members = sum(map(len, expected)) + sum(map(len, found))
    return 2 * both / members if members else 1.0


def spearman(expected: Sequence[float], found: Sequence[float]) -> float:
    """Return the rank correlation, or NaN if one side does not vary."""
    from scipy.stats import spearmanr

    return float(spearmanr(expected, found).statistic)


def ndcg_at_10(queries: Sequence[str], relevance: Sequence[float], scores: Sequence[float]) -> float:
    """Return the mean over the queries of the normalized discounted cumulative gain of their ten best texts.

    A query with a single text, or without a relevant text, is left out, because no ranking of it is right or wrong. The
    mean is NaN if no query is left.
    """
    from sklearn.metrics import ndcg_score

    gains = []
    for query in dict.fromkeys(queries):
        places = [number for number, other in enumerate(queries) if other == query]
        right = [relevance[place] for place in places]
        if len(places) > 1 and any(right):
            gains.append(float(ndcg_score([right], [[scores[place] for place in places]], k=10)))
    return sum(gains) / len(gains) if gains else float("nan")


def exact_match(answers: Sequence[str], found: str) -> bool:
    """Return whether the found answer is a right one, apart from case, punctuation and articles.

    This is SQuAD's own evaluation.
    """
    return any(_normal(found) == _normal(answer) for answer in answers)


def word_f1(answers: Sequence[str], found: str) -> float:
    """Return the best F1 of the words with one of the right answers, as in SQuAD's own evaluation."""
    best = 0.0
    for answer in answers:
        expected, words = _normal(answer).split(), _normal(found).split()
        common = sum((Counter(expected) & Counter(words)).values())
        if not expected or not words:
            best = max(best, float(expected == words))
        elif common:
            best = max(best, 2 * common / (len(expected) + len(words)))
    return best


def _normal(text: str) -> str:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def require(line: dict[str, Any], *fields: str) -> list[str]:
    """Return the values of text fields of one line.

    Raises:
        ValueError: A field is missing or holds no valid text. The message names the field.
    """
    values = []
    for field in fields:
        if not isinstance(line.get(field), str):
            raise ValueError(f"{field!r} is not there, or is no text")
        if not is_unicode(line[field]):
            raise ValueError(f"{field!r} holds half of a surrogate pair, which is no text")
        values.append(line[field])
    return values


def number(line: dict[str, Any], field: str) -> float:
    """Return the value of a number field. Raise ValueError if it is no finite number."""
    value = line[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field!r} is no finite number: {value!r}")
    return float(value)


def one_of(value: Any, labels: Sequence[str], field: str) -> str:
    """Return the value as one of the labels. Raise ValueError if it is none of them."""
    if value not in labels:
        raise ValueError(f"{field!r} is {value!r}, and the labels are {', '.join(labels[:20])}")
    return str(value)
