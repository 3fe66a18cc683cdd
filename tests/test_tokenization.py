"""Tokens with the `tokenizers` library alone are the tokens of transformers."""

import numpy as np
import pytest

from resources.errors import EngineError
from resources.evaluation.texts import batch_of_shape, load_texts
from resources.tokenization import LENGTH_BUCKETS, TextEncoder, buckets_up_to

TEXTS = [
    "",
    " ",
    "A short one.",
    "é́ 🙂 你好 مرحبا",
    "nul \x00 inside",
    "word " * 1000,
    "\n\t",
    "UPPER lower 123,456.78",
]


@pytest.fixture(scope="module")
def encoder(minilm):
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    return TextEncoder(str(minilm / "tokenizer.json"), max_tokens=256, inputs=inputs, pad_id=0)


def test_same_ids_as_transformers(encoder, minilm):
    from transformers import AutoTokenizer

    texts = TEXTS + load_texts()
    expected = AutoTokenizer.from_pretrained(minilm)(texts, truncation=True, max_length=256)["input_ids"]
    assert [encoding.ids for encoding in encoder.tokens(texts)] == expected


def test_rows_are_padded_to_the_bucket_of_the_longest(encoder):
    batch = encoder.encode(["one", "a somewhat longer text with more than sixteen tokens in it, by some words"])
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(encoder.inputs, (2, 32))
    assert all(array.dtype == np.int64 for array in batch.values())
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 18]
    assert batch["input_ids"][0, 3:].tolist() == [0] * 29


def test_pad_id_fills_and_is_masked(minilm):
    encoder = TextEncoder(str(minilm / "tokenizer.json"), max_tokens=64, inputs=["input_ids"], pad_id=7)
    assert encoder.encode(["one"])["input_ids"][0, 3:].tolist() == [7] * 13


@pytest.mark.parametrize("limit", [5, 16, 17, 256, 512, 8192])
def test_buckets_end_at_the_limit(limit):
    buckets = buckets_up_to(limit)
    assert buckets[-1] == limit
    assert list(buckets) == sorted(set(buckets))
    assert set(buckets[:-1]) <= set(LENGTH_BUCKETS)


def test_longest_text_is_cut_to_the_limit(encoder):
    assert encoder.encode(["word " * 1000])["input_ids"].shape == (1, 256)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (8, 128), (3, 256), (2, 3)])
def test_benchmark_batches_are_real_text_of_the_exact_shape(encoder, rows, tokens):
    batch = batch_of_shape(load_texts(), encoder, rows, tokens)
    assert batch["input_ids"].shape == (rows, tokens)
    assert batch["attention_mask"].all()
    if tokens >= 16:
        assert len({tuple(row) for row in batch["input_ids"].tolist()}) == rows
        assert len(np.unique(batch["input_ids"])) > 10


def test_rows_without_room_for_a_word_are_refused(encoder):
    with pytest.raises(EngineError, match="longer shape"):
        batch_of_shape(load_texts(), encoder, 1, 1)


def test_sample_texts_are_varied(encoder):
    texts = load_texts()
    lengths = [len(encoding.ids) for encoding in encoder.tokens(texts)]
    assert len(texts) == len(set(texts)) >= 300
    assert min(lengths) <= 5
    assert sum(length == 256 for length in lengths) >= 5
    assert sum(not text.isascii() for text in texts) >= 25
