"""Buckets and shapes follow from the lengths of a user's texts, and the figures about padding are true."""

import json
from itertools import combinations

import numpy as np
import pytest

from resources.artifacts.records import Checkpoint, LengthProfile
from resources.checkpoints.lengths import MOST_BUCKETS, PADDING_WANTED, choose_buckets, padding_share
from resources.checkpoints.shapes import shapes_of
from resources.errors import CatalogError, CheckpointError
from resources.pipelines import open_pipeline
from tests.conftest import entry_for
from tests.making import collect_checkpoint

SHORT, LONG = "the night", "the night train to Lisbon leaves from platform nine and stops twice on the way"


def counts_of(lengths):
    values, rows = np.unique(lengths, return_counts=True)
    return tuple(zip(values.tolist(), rows.tolist(), strict=True))


def test_padding_is_counted_in_tokens():
    # 3 rows of 10 padded to 16, 1 row of 40 padded to 64: 70 of 112 are real.
    assert padding_share([(10, 3), (40, 1)], (16, 64)) == pytest.approx(1 - 70 / 112)
    assert padding_share([(16, 5)], (16, 64)) == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_of_as_many_buckets_pads_less(seed):
    rng = np.random.default_rng(seed)
    counts = counts_of(rng.integers(1, 97, size=200))
    buckets = choose_buckets(counts, 96)
    assert buckets[-1] == 96
    others = range(8, 96, 8)
    best = min(padding_share(counts, (*some, 96)) for some in combinations(others, len(buckets) - 1))
    assert padding_share(counts, buckets) == pytest.approx(best)
    # And fewer would not have been enough.
    if len(buckets) > 1:
        assert (
            min(padding_share(counts, (*some, 96)) for some in combinations(others, len(buckets) - 2)) > PADDING_WANTED
        )


def test_texts_of_two_lengths_get_two_buckets():
    counts = counts_of([12] * 900 + [200] * 80 + [300])
    assert choose_buckets(counts, 512)[:2] == (16, 200)


def test_many_lengths_get_no_more_than_eight_buckets():
    counts = counts_of(np.random.default_rng(0).geometric(0.01, size=5000).clip(3, 4096))
    buckets = choose_buckets(counts, 8192)
    assert len(buckets) <= MOST_BUCKETS
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == 8192


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 64])
def test_one_length_and_short_limits(limit):
    buckets = choose_buckets([(min(5, limit), 30)], limit)
    assert buckets[-1] == limit
    assert padding_share([(min(5, limit), 30)], buckets) < 1


def checkpoint_of(max_tokens, lengths=None):
    fields = dict.fromkeys(("digest", "source", "revision", "architecture", "weights_digest", "tokenizer_digest"), "x")
    more = {"labels_digest": "x", "pipeline_digest": "x", "output": "x", "settings": {}, "weights_bytes": 1}
    return Checkpoint(model="m", task="embedding", max_tokens=max_tokens, lengths=lengths, **fields, **more)


def profile_of(counts, buckets):
    shares = dict.fromkeys(("padding", "padding_of_standard_buckets", "padding_of_one_length"), 0.1)
    return LengthProfile(requests=1, counts=counts, buckets=buckets, **shares)


def test_shapes_follow_from_the_lengths():
    # Median 20, 95th percentile 100.
    lengths = profile_of(((20, 60), (100, 36), (240, 4)), (24, 104, 256))
    shapes = shapes_of(entry_for("/x", shapes=None, max_batch_size=16), checkpoint_of(256, lengths))
    assert [str(shape) for shape in shapes] == ["1x24", "1x104", "8x24", "16x104"]
    own = shapes_of(entry_for("/x", shapes=["2x9"]), checkpoint_of(256, lengths))
    assert [str(shape) for shape in own] == ["2x9"]


@pytest.mark.parametrize(
    ("batch", "tokens", "shapes"),
    [
        (32, 512, ["1x16", "1x128", "8x128", "32x128"]),
        (4, 512, ["1x16", "1x128", "4x128"]),
        (32, 64, ["1x16", "1x64", "8x64", "32x64"]),
        (1, 12, ["1x12"]),
    ],
)
def test_the_usual_shapes_stay_within_what_is_served(batch, tokens, shapes):
    entry = entry_for("/x", shapes=None, max_batch_size=batch)
    assert [str(shape) for shape in shapes_of(entry, checkpoint_of(tokens))] == shapes


def test_a_shape_that_was_asked_for_is_not_shortened():
    with pytest.raises(CheckpointError, match=r"tiny: shapes: 1x65 is longer than this checkpoint takes \(64 tokens\)"):
        shapes_of(entry_for("/x", shapes=["1x65"]), checkpoint_of(64))


def write_sample(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


def test_a_sample_decides_what_rows_are_padded_to(made_checkpoint, workspace, tmp_path):
    sample = tmp_path / "mine.jsonl"
    write_sample(sample, [SHORT] * 80 + [LONG] * 20)
    entry = entry_for(made_checkpoint(), sample=str(sample), shapes=None)
    record = collect_checkpoint(entry, workspace.store, workspace.limits).record
    pipeline = open_pipeline(str(workspace.store.folder(record)))
    items = [{"TEXT": SHORT}] * 80 + [{"TEXT": LONG}] * 20
    assert record.lengths is not None
    assert record.lengths.counts == counts_of([row.tokens for (row,) in pipeline.rows(items)])
    assert record.lengths.padding < record.lengths.padding_of_standard_buckets < record.lengths.padding_of_one_length
    # What serves pads to the same.
    assert pipeline.encoder.buckets == record.lengths.buckets
    encoded = pipeline.encoder.encode([SHORT])["input_ids"]
    assert encoded.shape == (1, record.lengths.buckets[0])

    # Other texts are another checkpoint, with the same weights.
    write_sample(sample, [LONG] * 100)
    again = collect_checkpoint(entry, workspace.store, workspace.limits).record
    assert again.digest != record.digest
    assert again.weights_digest == record.weights_digest
    assert again.tokenizer_digest != record.tokenizer_digest


def test_a_sample_that_is_not_there(made_checkpoint, workspace, tmp_path):
    entry = entry_for(made_checkpoint(), sample=str(tmp_path / "absent.jsonl"))
    with pytest.raises(CatalogError, match=r"tiny: sample: .*absent\.jsonl cannot be read"):
        collect_checkpoint(entry, workspace.store, workspace.limits)
