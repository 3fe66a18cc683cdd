"""Plans of evaluation batches that cover every way in which requests reach a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: The texts are sorted by length. In each run of this many, one text is evaluated alone, one alone but padded, and one
#: in a mixed batch.
PERIOD = 8
MIXED_BATCH_SIZE = 8


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of an evaluation plan.

    Args:
        indices: The indices of the batch's texts.
        length: The number of tokens that every row is padded to.
    """

    indices: tuple[int, ...]
    length: int


def plan_batches(lengths: Sequence[int], bucket: Callable[[int], int], max_batch_size: int) -> list[PlannedBatch]:
    """Plan batches that cover every row once.

    Some rows are alone and unpadded, some are alone and padded to their bucket, some are in batches of mixed lengths,
    and the rest are in full batches of similar lengths. An answer must not depend on which of these ways a request
    took, and padding is where exported and quantized models go wrong first.

    Args:
        lengths: The number of tokens of each text.
        bucket: Returns the padded length for a number of tokens.
        max_batch_size: The largest number of rows in one batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    alone, bucketed, mixed = (order[offset::PERIOD] for offset in range(3))
    rest = [index for position, index in enumerate(order) if position % PERIOD > 2]
    plan = [PlannedBatch((index,), max(1, lengths[index])) for index in alone]
    plan += [PlannedBatch((index,), bucket(lengths[index])) for index in bucketed]
    # A stride over the sorted texts gives each mixed batch short and long texts.
    groups = -(-len(mixed) // min(MIXED_BATCH_SIZE, max_batch_size))
    plan += [_batch(mixed[start::groups], lengths, bucket) for start in range(groups)]
    plan += [
        _batch(rest[start : start + max_batch_size], lengths, bucket) for start in range(0, len(rest), max_batch_size)
    ]
    return plan


def plan_alone(
    lengths: Sequence[Sequence[int]], bucket: Callable[[int], int], max_batch_size: int
) -> list[PlannedBatch]:
    """Plan batches for requests that are answered one at a time, as an idle server answers them.

    The rows of one request share a batch if they have the same bucket. The indices in the plan count the rows of all
    requests.

    Args:
        lengths: The number of tokens of each row, grouped by request.
        bucket: Returns the padded length for a number of tokens.
        max_batch_size: The largest number of rows in one batch.
    """
    plan, first = [], 0
    for rows in lengths:
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(rows, start=first):
            buckets.setdefault(bucket(length), []).append(index)
        first += len(rows)
        plan += [
            PlannedBatch(tuple(members[start : start + max_batch_size]), size)
            for size, members in buckets.items()
            for start in range(0, len(members), max_batch_size)
        ]
    return plan


def _batch(indices: Sequence[int], lengths: Sequence[int], bucket: Callable[[int], int]) -> PlannedBatch:
    return PlannedBatch(tuple(indices), bucket(max(lengths[index] for index in indices)))


def equal_length_batches(lengths: Sequence[int], size: int) -> list[PlannedBatch]:
    """Plan batches whose texts all have the same length, at most `size` texts each.

    No row is padded, because the reference is the answer that each text gets alone.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return [
        PlannedBatch(tuple(group[start : start + size]), max(1, length))
        for length, group in sorted(groups.items())
        for start in range(0, len(group), size)
    ]
