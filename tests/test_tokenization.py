"""Tokens with the `tokenizers` library alone are the tokens of transformers."""

import json

import numpy as np
import pytest

from resources.benchmark.texts import batch_of_shape
from resources.errors import EngineError
from resources.pipelines.tokenization import LENGTH_BUCKETS, TextEncoder, buckets_up_to
from resources.tasks.samples import sample_texts

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


SETTINGS = {"max_tokens": 256, "inputs": ["input_ids", "attention_mask", "token_type_ids"], "pad_id": 0}


@pytest.fixture(scope="module")
def encoder(minilm):
    return TextEncoder(str(minilm / "tokenizer.json"), **SETTINGS)


def test_same_ids_as_transformers(encoder, minilm):
    from transformers import AutoTokenizer

    texts = TEXTS + list(sample_texts())
    expected = AutoTokenizer.from_pretrained(minilm)(texts, truncation=True, max_length=256)["input_ids"]
    assert [encoding.ids for encoding in encoder.tokens(texts)] == expected


def test_truncation_and_padding_baked_into_the_file_are_cleared(encoder, minilm, tmp_path):
    from tokenizers import Tokenizer

    baked = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    baked.enable_truncation(8, stride=2, direction="left")
    baked.enable_padding(direction="left", length=64, pad_id=5)
    baked.save(str(tmp_path / "tokenizer.json"))
    read = TextEncoder(str(tmp_path / "tokenizer.json"), **SETTINGS)
    assert [item.ids for item in read.tokens(TEXTS)] == [item.ids for item in encoder.tokens(TEXTS)]


def test_settings_are_read_from_the_folder_they_were_written_to(encoder, minilm, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((minilm / "tokenizer.json").read_bytes())
    settings = {**SETTINGS, "strategy": "only_first", "stride": 7, "buckets": [24, 256]}
    (tmp_path / "encoder.json").write_text(json.dumps(settings))
    read = TextEncoder.from_folder(str(tmp_path))
    assert {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(read).items()
        if name in settings
    } == settings
    assert [read.bucket(tokens) for tokens in (1, 24, 25, 256)] == [24, 24, 256, 256]
    assert read.vocabulary_size == 30522


def test_the_limit_can_be_another_for_exact_shapes(encoder):
    short = encoder.shortened(8)
    assert [len(item.ids) for item in short.tokens(["word " * 100, "one"])] == [8, 3]
    assert short.buckets == (8,)
    assert [len(item.ids) for item in encoder.tokens(["word " * 100])] == [102]


def test_no_texts_make_arrays_of_no_rows(encoder):
    assert {name: array.shape for name, array in encoder.encode([]).items()} == dict.fromkeys(encoder.inputs, (0, 16))


def test_half_a_surrogate_pair_is_no_text(encoder):
    with pytest.raises(TypeError):
        encoder.tokens(["fine", "\ud83d"])


@pytest.mark.parametrize(
    ("tokens", "size"), [(0, 16), (1, 16), (16, 16), (17, 32), (96, 96), (97, 128), (193, 256), (256, 256)]
)
def test_bucket_is_the_next_larger(encoder, tokens, size):
    assert encoder.bucket(tokens) == size


def test_segments_follow_the_inputs_that_the_model_takes(minilm):
    encoder = TextEncoder(
        str(minilm / "tokenizer.json"), max_tokens=64, inputs=["attention_mask", "token_type_ids"], pad_id=7
    )
    batch = encoder.encode(["one"])
    assert list(batch) == ["attention_mask", "token_type_ids"]
    assert batch["attention_mask"][0].tolist() == [1] * 3 + [0] * 13
    assert not batch["token_type_ids"].any()


def test_rows_are_padded_to_the_bucket_of_the_longest(encoder):
    batch = encoder.encode(["one", "a somewhat longer text with more than sixteen tokens in it, by some words"])
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(encoder.inputs, (2, 32))
    assert all(array.dtype == np.int64 for array in batch.values())
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 18]
    assert batch["input_ids"][0, 3:].tolist() == [0] * 29


def test_pad_id_fills_and_is_masked(minilm):
    encoder = TextEncoder(str(minilm / "tokenizer.json"), max_tokens=64, inputs=["input_ids"], pad_id=7)
    assert encoder.encode(["one"])["input_ids"][0, 3:].tolist() == [7] * 13


def test_buckets_in_steps_unless_they_were_chosen(minilm):
    usual = TextEncoder(str(minilm / "tokenizer.json"), **{**SETTINGS, "max_tokens": 30})
    usual.set_length_step(8)
    assert usual.buckets == (8, 16, 24, 30)
    chosen = TextEncoder(str(minilm / "tokenizer.json"), **SETTINGS, buckets=[24, 256])
    chosen.set_length_step(8)
    assert chosen.buckets == (24, 256)


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
    batch = batch_of_shape(list(sample_texts()), encoder, rows, tokens)
    assert batch["input_ids"].shape == (rows, tokens)
    assert batch["attention_mask"].all()
    if tokens >= 16:
        assert len({tuple(row) for row in batch["input_ids"].tolist()}) == rows
        assert len(np.unique(batch["input_ids"])) > 10


def test_rows_without_room_for_a_word_are_refused(encoder):
    with pytest.raises(EngineError, match="longer shape"):
        batch_of_shape(list(sample_texts()), encoder, 1, 1)


def test_sample_texts_are_varied(encoder):
    texts = list(sample_texts())
    lengths = [len(encoding.ids) for encoding in encoder.tokens(texts)]
    assert len(texts) == len(set(texts)) >= 300
    assert min(lengths) <= 5
    assert sum(length == 256 for length in lengths) >= 5
    assert sum(not text.isascii() for text in texts) >= 25
