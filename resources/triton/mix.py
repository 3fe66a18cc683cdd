"""Choose the requests of a load: real texts, in the mix of lengths that the user's own texts have."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resources.artifacts.records import Checkpoint, EvaluationSet
    from resources.pipelines.base import Item

#: The requests in one round of a load. A length bucket's share of a round is at least one in this many.
ROUND = 256


def load_of(evaluation: EvaluationSet, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the inputs that the mix depends on, for fingerprints."""
    lengths = checkpoint.lengths
    return {"evaluation": evaluation.digest, "lengths": None if lengths is None else lengths.model_dump()}


def request_mix(items: Sequence[Item], checkpoint: Checkpoint, folder: Path) -> list[Item]:
    """Return items in the mix of the user's length profile. Without a profile, return the items as they are.

    Args:
        items: The items to choose from.
        checkpoint: The checkpoint, which has the profile.
        folder: The folder with the checkpoint's files.
    """
    if checkpoint.lengths is None:
        return list(items)
    from resources.pipelines import open_pipeline

    pipeline = open_pipeline(str(folder))
    lengths = [max((row.tokens for row in rows), default=0) for rows in pipeline.rows(items)]
    return [items[index] for index in mix(lengths, checkpoint.lengths.counts, checkpoint.lengths.buckets)]


def mix(
    lengths: Sequence[int], counts: Sequence[tuple[int, int]], buckets: Sequence[int], size: int = ROUND
) -> list[int]:
    """Return indices of items whose lengths fall into the buckets as often as the wanted lengths do.

    The share of a bucket without items goes to the nearest bucket that has some. The items of a bucket take turns.
    Every wanted bucket gets at least one item.

    Args:
        lengths: The lengths of the items.
        counts: The wanted lengths, each with its frequency.
        buckets: The buckets of lengths, given by their upper ends.
        size: The approximate number of indices to return.
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
