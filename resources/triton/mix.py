"""The requests of a load: real texts, in the mix of lengths that the user's own have."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resources.artifacts.records import Checkpoint, EvaluationSet
    from resources.pipelines.base import Item

#: Requests of one round of a load; the rarest lengths that it can hold are one in so many.
ROUND = 256


def load_of(evaluation: EvaluationSet, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the mix depends on, for fingerprints."""
    lengths = checkpoint.lengths
    return {"evaluation": evaluation.digest, "lengths": None if lengths is None else lengths.model_dump()}


def request_mix(items: Sequence[Item], checkpoint: Checkpoint, folder: Path) -> list[Item]:
    """The items, each as often as the user's length profile says; without a profile as they are. folder: its files."""
    if checkpoint.lengths is None:
        return list(items)
    from resources.pipelines import open_pipeline

    pipeline = open_pipeline(str(folder))
    lengths = [max((row.tokens for row in rows), default=0) for rows in pipeline.rows(items)]
    return [items[index] for index in mix(lengths, checkpoint.lengths.counts, checkpoint.lengths.buckets)]


def mix(
    lengths: Sequence[int], counts: Sequence[tuple[int, int]], buckets: Sequence[int], size: int = ROUND
) -> list[int]:
    """Indices of items, about `size` of them, whose lengths fall into the buckets as often as those of `counts` do.

    lengths: of the items. counts: wanted lengths and how often. A bucket that no item falls into is given to the
    nearest that has some; within a bucket items come in turns. Every bucket that is wanted at all is there once.
    """

    def bucket(length: int) -> int:
        return min(bisect_left(buckets, length), len(buckets) - 1)

    there: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        there.setdefault(bucket(length), []).append(index)
    wanted: Counter[int] = Counter()
    for length, count in counts:
        nearest = min(there, key=lambda place: (abs(buckets[place] - buckets[bucket(length)]), place))
        wanted[nearest] += count
    total, chosen = wanted.total(), list[int]()
    for place, count in sorted(wanted.items()):
        found = there[place]
        chosen += [found[turn % len(found)] for turn in range(max(1, round(size * count / total)))]
    return chosen
