"""Every text is evaluated once, and in every way in which requests reach a server."""

import pytest

from resources.accuracy.batches import equal_length_batches, plan_alone, plan_batches
from resources.pipelines.tokenization import buckets_up_to

BUCKETS = buckets_up_to(256)


def bucket(tokens: int) -> int:
    return next(size for size in BUCKETS if size >= tokens)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 64, 320])
@pytest.mark.parametrize("largest", [1, 3, 32])
def test_every_text_is_there_once_and_fits(count, largest):
    lengths = [(7 * index) % 200 + 1 for index in range(count)]
    plan = plan_batches(lengths, bucket, largest)
    assert sorted(index for batch in plan for index in batch.indices) == list(range(count))
    assert all(batch.length >= max(lengths[index] for index in batch.indices) for batch in plan)
    assert all(1 <= len(batch.indices) <= largest for batch in plan)


def test_plan_holds_every_kind_of_request():
    lengths = [(7 * index) % 200 + 1 for index in range(320)]
    plan = plan_batches(lengths, bucket, 32)
    alone = [batch for batch in plan if len(batch.indices) == 1]
    unpadded = [batch for batch in alone if batch.length == lengths[batch.indices[0]]]
    padded = [batch for batch in alone if batch.length > lengths[batch.indices[0]]]
    assert len(unpadded) >= 40
    assert len(padded) >= 30
    mixed = [
        b
        for b in plan
        if len(b.indices) == 8 and max(lengths[i] for i in b.indices) > 100 + min(lengths[i] for i in b.indices)
    ]
    assert len(mixed) == 5
    assert sum(len(batch.indices) == 32 for batch in plan) == 6


def test_reference_batches_pad_nothing():
    lengths = [3, 5, 3, 3, 9, 5]
    batches = equal_length_batches(lengths, 2)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(6))
    assert all(lengths[index] == batch.length for batch in batches for index in batch.indices)
    assert max(len(batch.indices) for batch in batches) == 2


@pytest.mark.parametrize("largest", [1, 2, 32])
def test_alone_no_batch_holds_rows_of_two_requests(largest):
    lengths = [[3], [40, 41, 42, 7], [], [16, 16, 16], [256]]
    owners = [number for number, rows in enumerate(lengths) for _ in rows]
    flat = [length for rows in lengths for length in rows]
    plan = plan_alone(lengths, bucket, largest)
    assert sorted(index for batch in plan for index in batch.indices) == list(range(len(flat)))
    for batch in plan:
        assert len({owners[index] for index in batch.indices}) == 1
        assert {bucket(flat[index]) for index in batch.indices} == {batch.length}
        assert 1 <= len(batch.indices) <= largest
