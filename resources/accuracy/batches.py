"""Which texts are evaluated together, and how: every way in which requests reach a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Of every so many texts in order of length, one goes alone, one alone but padded, one into a mixed batch.
PERIOD = 8
MIXED_BATCH_SIZE = 8


@dataclass(frozen=True)
class PlannedBatch:
    """Texts by index, and the tokens every row is padded to."""

    indices: tuple[int, ...]
    length: int


def plan_batches(lengths: Sequence[int], bucket: Callable[[int], int], max_batch_size: int) -> list[PlannedBatch]:
    """Cover every row once: alone and unpadded, alone in its bucket, in mixed company, in full batches by length.

    lengths: tokens of each text; bucket: the padded length for so many tokens. An answer must not depend on which of
    these a request happened to be, and padding is where exported and quantized models go wrong first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    alone, bucketed, mixed = (order[offset::PERIOD] for offset in range(3))
    rest = [index for position, index in enumerate(order) if position % PERIOD > 2]
    plan = [PlannedBatch((index,), max(1, lengths[index])) for index in alone]
    plan += [PlannedBatch((index,), bucket(lengths[index])) for index in bucketed]
    # Dealt like cards, so that each mixed batch gets short and long texts.
    groups = -(-len(mixed) // min(MIXED_BATCH_SIZE, max_batch_size))
    plan += [_batch(mixed[start::groups], lengths, bucket) for start in range(groups)]
    plan += [
        _batch(rest[start : start + max_batch_size], lengths, bucket) for start in range(0, len(rest), max_batch_size)
    ]
    return plan


def plan_alone(
    lengths: Sequence[Sequence[int]], bucket: Callable[[int], int], max_batch_size: int
) -> list[PlannedBatch]:
    """Each request by itself, as a server gets it that has nothing else to do: its rows by the buckets they fall into.

    lengths: tokens of each row, by request. Indices count the rows of all requests.
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
    """Batches of texts of one length, so that nothing is padded: the reference is what each text alone gives."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return [
        PlannedBatch(tuple(group[start : start + size]), max(1, length))
        for length, group in sorted(groups.items())
        for start in range(0, len(group), size)
    ]
