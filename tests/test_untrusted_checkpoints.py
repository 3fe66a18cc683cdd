"""Checkpoints whose author means harm: no code runs, no file of elsewhere is read, and nothing hangs or ends in a
traceback. Each is refused with a CheckpointError that names the file.
"""

import json
import os
import pickle
import shutil
import socket

import pytest

from orchestration.cli.model_argument import _guess_task
from resources.artifacts.store import ArtifactStore
from resources.boundary.addresses import Address
from resources.checkpoints.collect import copy_unchanged
from resources.checkpoints.sources import registry
from resources.checkpoints.sources.locating import locate
from resources.checkpoints.tokenizer import prepare_tokenizer
from resources.checkpoints.validation import validate
from resources.checkpoints.watch.probe import look
from resources.errors import CheckpointError
from resources.processes.isolation import Limits, run_isolated
from resources.settings.sources import SourceSettings
from tests.checkpoints import edit_json
from tests.conftest import entry_for
from tests.making import collect_checkpoint
from tests.sources import write_checkpoint
from tests.twins import pooled

LIMITS = Limits(timeout_s=120, memory_bytes=4 * 10**9)


@pytest.fixture
def folder(tmp_path):
    """The smallest that passes for a checkpoint."""
    return write_checkpoint(tmp_path / "checkpoint")


def refusal(folder, **fields):
    """What planning, and what the sensor says of the folder, which is the same."""
    entry = entry_for(folder, **fields)
    with pytest.raises(CheckpointError) as caught:
        validate(entry, folder)
    seen = look(entry, None, SourceSettings(folder.parent / "sources"), interval_s=0)
    assert str(caught.value)[:200] in seen.problem or "a background process" in seen.waiting
    return str(caught.value)


def test_the_smallest_checkpoint_passes(folder):
    assert validate(entry_for(folder), folder).max_tokens == 64


# Code


class Boom:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_weights_are_never_unpickled_by_their_name(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "weights.txt").write_bytes(pickle.dumps(Boom(tmp_path / "ran")))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "weights.txt"}}))
    assert "'weights.txt', but the names of weights end in .safetensors" in refusal(folder)
    index.rename(folder / "pytorch_model.bin.index.json")
    assert "end in .bin" in refusal(folder, allow_pickle=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"])
def test_pickles_beside_the_weights_do_not_come_along(folder, name):
    (folder / name).write_bytes(b"a pickle")
    assert name not in validate(entry_for(folder), folder).files


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("attn_implementation", "someone/kernels", "native code"),
        ("_attn_implementation", "someone/kernels@v1:attention", "native code"),
        ("_attn_implementation_internal", "someone/kernels", "native code"),
        ("attn_implementation", {"": "eager", "text_config": "someone/kernels"}, "native code"),
        ("attn_implementation", "paged|someone/kernels", "native code"),
        ("attn_implementation", "flash_attention_2", "native code"),
        ("attn_implementation", [["someone/kernels"]], "attn_implementation"),
        ("text_config", {"_attn_implementation": "someone/kernels"}, "native code"),
        ("experts_implementation", "sonicmoe", "native code"),
        ("auto_map", {"AutoModel": "someone/code--modeling.Model"}, "trust_remote_code: true"),
        ("vision_config", {"auto_map": {"AutoModel": "modeling.Model"}}, "trust_remote_code: true"),
        ("quantization_config", {"quant_method": "fp8"}, "full precision"),
        ("text_config", {"quantization_config": {"quant_method": "mxfp4"}}, "full precision"),
        ("compression_config", {"format": "pack"}, "full precision"),
        ("configuration_files", ["config.4.0.0.json"], "other files"),
        ("transformers_weights", "adapter_model.bin", "other files"),
        ("backbone", "someone/model", "second model"),
        ("use_timm_backbone", True, "second model"),
        ("model_type", "timm_wrapper", "second model"),
        ("torch_dtype", "load", "is not a type of weights"),
    ],
)
def test_fields_that_lead_to_code_or_to_other_files(folder, field, value, expected):
    edit_json(folder / "config.json", **{field: value})
    message = refusal(folder)
    assert message.startswith("tiny: config.json")
    assert expected in message


@pytest.mark.parametrize("value", [None, "eager", "sdpa", {"": "sdpa"}])
def test_attention_of_transformers_own(folder, value):
    edit_json(folder / "config.json", attn_implementation=value, torch_dtype="float16", quantization_config={})
    validate(entry_for(folder), folder)


def test_labels_may_be_called_as_fields_are(folder):
    edit_json(
        folder / "config.json", id2label={"0": "backbone", "1": "layers"}, label2id={"backbone": 3, "layers": 600}
    )
    validate(entry_for(folder), folder)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("auto_map", {"AutoTokenizer": ["tokenizing.Own", None]}, "trust_remote_code: true"),
        ("fast_tokenizer_files", ["../../tokenizer.4.0.0.json"], "other files"),
        ("gguf_file", "../model.gguf", "other files"),
    ],
)
def test_fields_of_the_tokenizer_that_lead_to_code_or_to_other_files(folder, field, value, expected):
    (folder / "tokenizer_config.json").write_text(json.dumps({field: value}))
    assert expected in refusal(folder)


def test_a_vocabulary_of_elsewhere(folder):
    """Saved tokenizers name the paths they had; only without a tokenizer.json is one opened."""
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"vocab_file": "/etc/passwd", "special_tokens_map_file": "/root/x"})
    )
    validate(entry_for(folder), folder)
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    assert "tokenizer_config.json, vocab_file" in refusal(folder)


def child_settings():
    """What a child that reads checkpoints may fetch."""
    from huggingface_hub import constants
    from transformers.integrations import hub_kernels

    return constants.HF_HUB_OFFLINE, hub_kernels._kernels_enabled


def test_children_fetch_nothing():
    settings, _ = run_isolated(child_settings, limits=LIMITS, what="asking")
    assert settings == (True, False)


# Files of elsewhere


def test_links_to_elsewhere_are_not_copied(folder, tmp_path):
    (tmp_path / "secret").write_text("of somebody else")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    assert "notes.txt is a link that leads out of its folder" in refusal(folder)
    with pytest.raises(CheckpointError, match="leads out"):
        copy_unchanged("tiny", folder, "notes.txt", tmp_path / "copy", "")
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to("tokenizer.json")
    validate(entry_for(folder), folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "a.txt"]
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "zero", "link"])
def test_what_is_no_regular_file_is_not_opened(folder, tmp_path, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # a socket's path is short
            listener.bind(name)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        (tmp_path / "elsewhere").write_text("{}")
        path.symlink_to(tmp_path / "elsewhere")
    message = refusal(folder)
    assert name in message
    assert "is not a regular file" in message or "leads out" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json", "a.txt"])
def test_files_without_end(folder, name):
    with (folder / name).open("ab") as stream:
        stream.truncate(10**12)  # it takes no room
    assert "is larger than" in refusal(folder)


def test_a_module_in_a_folder_of_elsewhere(folder, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "1_Pooling").symlink_to(tmp_path / "1_Pooling")
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert "leads out" in refusal(folder)


def test_keys_of_a_bucket_that_lead_out_of_the_copy(s3, folder, tmp_path):
    victim = tmp_path / "victim.json"
    for key in (str(victim), "../victim.json", "a/../../victim.json", "./x.json"):
        place = s3.place("ckpt", tmp_path)
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        (place / key).write_bytes(b"{}")
        settings = SourceSettings(tmp_path / "sources")
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            locate(str(place), settings=settings)
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            look(entry_for(str(place)), None, settings, interval_s=0)
        assert not victim.exists()
        place.remove([key])


def test_names_of_a_registry_that_lead_out_of_the_copy(tmp_path, monkeypatch):
    from mlflow.entities import FileInfo
    from mlflow.store.artifact import artifact_repository_registry

    class Store:
        def list_artifacts(self, path):
            return [FileInfo("ok/x", False, 1), FileInfo("../../victim.json", False, 1)]

    monkeypatch.setattr(artifact_repository_registry, "get_artifact_repository", lambda *args, **kwargs: Store())
    with pytest.raises(registry.ForeignError, match="leads out"):
        registry._check_listing("anything", Address("sqlite://"))


def test_links_of_a_version_that_lead_out_of_its_folder(folder, tmp_path, monkeypatch):
    """In an artifact store that is a folder of this machine, whose files MLflow copies with what they link to."""
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    registry._check_listing(folder.as_uri(), Address("sqlite://"))
    (tmp_path / "secret").write_text("of somebody else")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    leads_here = lambda uri: ("m", "1", folder.as_uri())  # noqa: E731
    monkeypatch.setattr(ModelsArtifactRepository, "_get_model_uri_infos", leads_here)
    for address in (folder.as_uri(), "models:/m/1"):
        with pytest.raises(registry.ForeignError, match="leads out"):
            registry._check_listing(address, Address("sqlite://"))


def test_a_description_of_a_registry_that_has_no_end(tmp_path):
    """YAML nests, and its aliases multiply."""
    bomb = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))])
    merged = "\n".join(
        ["a0: &a0 {k: v}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9))]
    )
    for text in ("[" * 20_000, merged, bomb + "\nflavors: {transformers: {model_binary: *a39, components: [*a39]}}"):
        (tmp_path / "MLmodel").write_text(text)
        try:
            registry._join_tokenizers(tmp_path)
        except CheckpointError as error:
            assert len(str(error)) < 1000
    (tmp_path / "MLmodel").unlink()
    os.mkfifo(tmp_path / "MLmodel")
    registry._join_tokenizers(tmp_path)


def test_a_description_whose_model_is_a_file(tmp_path):
    (tmp_path / "components" / "tokenizer").mkdir(parents=True)
    (tmp_path / "components" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "MLmodel").write_text("flavors: {transformers: {model_binary: MLmodel, components: [tokenizer]}}")
    with pytest.raises(CheckpointError, match="Log the model again"):
        registry._join_tokenizers(tmp_path)


# Sizes


@pytest.mark.parametrize(
    "fields",
    [
        '"num_labels": 4000000000',
        '"num_labels": 1e308',
        '"num_labels": "12"',
        '"num_labels": Infinity',
        '"num_labels": true',
        '"id2label": 7',
        '"id2label": {"0": {"a": []}}',
        '"id2label": {"0": "\\ud800"}',
        '"architectures": 1.5',
        '"architectures": {"0": "BertModel"}',
        '"vocab_size": "12"',
        '"num_hidden_layers": 1000000000',
        '"num_hidden_layers": 2001',
        '"num_feedforward_networks": 1000000000',
        '"hidden_size": 1e308',
        '"hidden_size": Infinity',
        '"max_position_embeddings": 1',
    ],
)
def test_fields_that_no_model_has_are_refused(folder, fields):
    """They are appended, and the last of two fields of the same name is the one that counts."""
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f"{text}, {fields}}}")
    name, said = fields.split('"')[1], refusal(folder)
    assert f"config.json, {name}: " in said or "surrogate pair" in said or "a limit of 1 tokens is too low" in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"model_type": "roberta", "max_position_embeddings": 64, "pad_token_id": 100000000}'),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": "bert", "a": ' + "[" * 900 + "]" * 900 + "}"),
        ("config.json", '{"model_type": "bert", "a": ' + "1" * 5000 + "}"),
        ("config.json", '{"model_type": "bert", "a": [' + "{}," * 600_000 + "1]}"),
        ("modules.json", '[{"path": ["a"], "type": "sentence_transformers.models.Pooling"}]'),
        ("modules.json", '[{"path": "1_Pooling\\u0000", "type": "sentence_transformers.models.Pooling"}]'),
        ("modules.json", '[{"path": "", "type": ["a"]}]'),
        ("modules.json", "[" * 100_000),
        ("modules.json", "7"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "a", "prompts": [1]}'),
        ("sentence_bert_config.json", "[1]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"vocab": "abc"}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1e300}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [1]}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": 5}'),
        ("tokenizer_config.json", "[" * 100_000),
        ("model.safetensors", "\2\0\0\0\0\0\0\0[]"),
        ("model.safetensors", "\xff\xff\xff\xff\xff\xff\xff\xff{}"),
    ],
)
def test_what_nobody_can_take_is_refused(folder, name, text):
    if name == "sentence_bert_config.json":  # which is read beside modules.json alone
        pooled(folder, "mean")
    (folder / name).write_text(text, encoding="utf-8")
    assert name.split(".", maxsplit=1)[0] in refusal(folder).replace("a limit of", "config")


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "tokenizer_config.json"])
def test_a_length_that_no_float_holds_is_none(folder, name):
    pooled(folder, "mean")
    (folder / name).write_text(f'{{"max_seq_length": 1{"0" * 400}, "model_max_length": 1{"0" * 400}}}')
    assert validate(entry_for(folder), folder).max_tokens == 64


@pytest.mark.parametrize("config", ['{"architectures": 1.5}', "[" * 100_000, '{"architectures": []}', "7", ""])
def test_guessing_a_task_of_what_cannot_be_read(folder, config):
    (folder / "config.json").write_text(config)
    assert _guess_task({"source": str(folder)}, SourceSettings()) == "embedding"


def test_headers_whose_tensors_are_not_in_the_file(folder):
    import struct

    for tensor in (
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2] * 1000, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**70]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        [],
    ):
        header = json.dumps({"w": tensor}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"8 bytes.")
        assert "is not a safetensors file" in refusal(folder)


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "artifacts")


def collected(entry, store):
    with pytest.raises(CheckpointError) as caught:
        collect_checkpoint(entry, store, LIMITS)
    assert not (store.root / "checkpoint").exists()
    return str(caught.value)


def test_a_model_that_is_larger_than_its_weights(own_checkpoint, store):
    folder = own_checkpoint()
    edit_json(folder / "config.json", hidden_size=2**20, intermediate_size=2**20)
    assert "describes a model of" in collected(entry_for(folder), store)


def test_a_tokenizer_that_makes_the_library_panic(own_checkpoint, store):
    """The answer of tokenizers 0.23 to such a table is no Exception."""
    folder = own_checkpoint()
    edit_json(folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    assert "transformers cannot read its tokenizer (tokenizer.json)" in collected(entry_for(folder), store)


def crashing(*args):
    del args
    os.abort()


def test_a_library_that_crashes_costs_the_checkpoint_alone(own_checkpoint, store, monkeypatch):
    monkeypatch.setattr("resources.checkpoints.collect.prepare_tokenizer", crashing)
    assert "ended by SIGABRT" in collected(entry_for(own_checkpoint()), store)
    assert prepare_tokenizer is not crashing


# Adapters


def test_an_adapter_is_to_be_merged_first(folder, s3, tmp_path):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "it is an adapter, which has to be merged into its base model first" in refusal(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        assert "it is an adapter, which has to be merged into its base model first" in refusal(folder)
    place = s3.place("adapter", tmp_path)
    (place / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="it is an adapter, which has to be merged into its base model first"):
        look(entry_for(str(place)), None, SourceSettings(tmp_path / "sources"), interval_s=0)
    logged = tmp_path / "logged"
    shutil.copytree(folder, logged / "model")
    with pytest.raises(CheckpointError, match="it is an adapter, which has to be merged into its base model first"):
        registry._checkpoint_in("models:/a/1", logged)


def test_refusals_are_short(folder):
    edit_json(folder / "config.json", architectures=["x" * 10**6])
    assert len(refusal(folder, task="classification")) < 3000
