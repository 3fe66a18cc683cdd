"""The models file: every mistake is named with its file, model, field and remedy, before any work begins."""

import os
import re

import pytest
from pydantic import ValidationError

from resources.catalog.entries import BenchmarkSettings, ModelEntry, check_name
from resources.catalog.loading import load_catalog, write_entry
from resources.errors import CatalogError
from resources.settings.workspace import Workspace

MODEL = "  - name: m\n    source: org/model\n    task: embedding\n"


def load(tmp_path, text, additions=None):
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return load_catalog(path, additions)


def test_the_default_file_holds_the_real_checkpoint():
    from orchestration.settings import DEFAULT_CATALOG

    (entry,) = load_catalog(DEFAULT_CATALOG).models
    assert (entry.name, entry.task) == ("all-minilm-l6-v2", "embedding")
    assert entry.shapes is None
    assert entry.max_batch_size == 32
    assert entry.objective == "p50"
    assert entry.benchmark.seconds == 45
    gates = {"cosine_mean": 0.995, "cosine_worst": 0.99, "neighbours": 0.95, "norm_error": 0.1}
    assert entry.accuracy_gates().model_dump() == gates


@pytest.mark.parametrize(
    ("task", "options", "wrong"),
    [
        ("embedding", "{top_k: 3}", "options.top_k: no such field; there are pooling, normalize, max_tokens"),
        ("token-classification", "{aggregation_strategy: median}", "options.aggregation_strategy: .*'median'"),
        ("question-answering", "{stride: -1}", "options.stride: .*-1"),
        ("zero-shot-classification", "{hypothesis_template: it is}", "options.hypothesis_template: .*'it is'"),
        ("fill-mask", "{top_k: 0}", "options.top_k: .*0"),
    ],
)
def test_options_are_the_tasks_own(tmp_path, task, options, wrong):
    with pytest.raises(CatalogError, match=rf"model 'm': {wrong}"):
        load(tmp_path, "models:\n" + MODEL.replace("embedding", task) + f"    options: {options}\n")


def test_options_have_defaults(tmp_path):
    text = "models:\n" + MODEL.replace("embedding", "token-classification") + "    options: {stride: 8}\n"
    options = load(tmp_path, text).get("m").task_options()
    assert options.model_dump() == {
        "aggregation_strategy": "simple",
        "ignore_labels": ("O",),
        "stride": 8,
        "windows": 64,
    }


def test_every_field_can_be_given(tmp_path):
    text = (
        "models:\n" + MODEL + "    shapes: [1x8, 4x16]\n    max_batch_size: 4\n    gates: {cosine_worst: 0.9}\n"
        "    objective: memory\n    benchmark: {seconds: 3, threads: 1}\n    engines: [onnxruntime_fp32]\n"
        "    allow_pickle: true\n    trust_remote_code: true\n"
    )
    entry = load(tmp_path, text).get("m")
    assert [(shape.batch, shape.sequence) for shape in entry.shapes] == [(1, 8), (4, 16)]
    assert entry.accuracy_gates().model_dump()["cosine_worst"] == 0.9
    assert entry.competes("torch")
    assert entry.competes("onnxruntime_fp32")
    assert not entry.competes("onnxruntime_int8")
    # Written and read again, it is the same.
    write_entry(entry, tmp_path / "models.d")
    empty = tmp_path / "empty.yaml"
    empty.write_text("models: []\n")
    assert load_catalog(empty, tmp_path / "models.d").get("m") == entry


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("models:\n" + MODEL + "    shape: [1x8]\n", ["model 'm'", "shape: no such field"]),
        ("models:\n" + MODEL + "    max_batch_size: '32'\n", ["model 'm'", "max_batch_size", "'32'"]),
        ("models:\n" + MODEL + "    max_batch_size: 0\n", ["max_batch_size", "greater than or equal to 1"]),
        ("models:\n" + MODEL + "    shapes: [1x0]\n", ["shapes.0", "8x128"]),
        ("models:\n" + MODEL + "    shapes: []\n", ["shapes"]),
        ("models:\n" + MODEL + "    shapes: [1x8, 1x8]\n", ["listed twice"]),
        ("models:\n" + MODEL + "    shapes: [64x8]\n", ["64x8", "max_batch_size"]),
        ("models:\n" + MODEL + "    gates: {cosine: 0.9}\n", ["gates.cosine: no such field"]),
        ("models:\n" + MODEL + "    gates: {cosine_mean: 2}\n", ["gates.cosine_mean", "less than or equal to 1"]),
        ("models:\n" + MODEL + "    objective: speed\n", ["objective", "'p50'"]),
        ("models:\n" + MODEL + "    engines: [tensorflow]\n", ["engines", "'tensorflow'", "onnxruntime_fp32"]),
        ("models:\n" + MODEL + "    allow_pickle: 'yes'\n", ["allow_pickle", "boolean"]),
        ("models:\n  - name: m\n    task: embedding\n", ["source: is required"]),
        ("models:\n" + MODEL.replace("embedding", "poetry"), ["task: 'poetry'", "classification, embedding"]),
        ("models:\n" + MODEL + MODEL, ["model 'm'", "already in"]),
        ("models:\n" + MODEL.replace("name: m", "name: a/b"), ["name: 'a/b'", "Triton"]),
        ("models:\n" + MODEL.replace("name: m", "name: a|b"), ["name: 'a|b'"]),
        ("models:\n" + MODEL.replace("name: m", "name: a...b"), ["name: 'a...b'"]),
        ("models:\n" + MODEL.replace("name: m", "name: m__r3__pipeline"), ["__r<number>__"]),
        ("models:\n" + MODEL.replace("name: m", "name: 7"), ["model number 1", "name"]),
        ("models:\n" + MODEL + "    task: classification\n", ["task", "twice"]),
        ("models: 3\n", ["'models'", "list"]),
        ("model: []\n", ["'models'"]),
        ("", ["'models'"]),
        ("models: [\n", ["models.yaml, line 2: "]),
        ("models:\n" + MODEL + "\tshapes: [1x8]\n", ["models.yaml, line 5: ", "'\\t'"]),
        ("models:\n" + MODEL + "    ? [a]\n    : b\n", ["models.yaml, line 5: ", "unhashable"]),
        ("models:\n  - name: 2026-13-01\n", ["cannot be read", "month"]),
        ("models:\n" + MODEL + "    benchmark: {threads: 1, threads: 2}\n", ["line 5", "'threads'", "twice"]),
        ("models: []\nmodels: []\n", ["line 2", "'models'", "twice"]),
        ("models:\n" + MODEL + "    source: !!python/object:os.system x\n", ["line 5", "twice"]),
        ("models:\n" + MODEL.replace("org/model", "!!python/object:os.system x"), ["line 3", "constructor"]),
        ("models:\n" + MODEL.replace("name: m", "name: no"), ["name: must be text", "False", "in quotes"]),
        ("models:\n" + MODEL.replace("name: m", "name: 1.50"), ["name: must be text", "1.5", "in quotes"]),
        ("models:\n" + MODEL.replace("name: m", "name: m."), ["name: 'm.'", "ending with a dot"]),
        ("models:\n" + MODEL.replace("name: m", "name: ''"), ["name: ''"]),
        ("models:\n" + MODEL + MODEL.replace("name: m", "name: M"), ["model 'M'", "already in", "as 'm'"]),
        ("models:\n" + MODEL.replace("org/model", "''"), ["model 'm'", "source"]),
        ("models:\n" + MODEL.replace("org/model", "~no-such-user-here/x"), ["model 'm'", "source", "whole path"]),
        ("models:\n" + MODEL + "    shapes: [0x16]\n", ["shapes.0", "YAML reads 0x16 as the number 22", "8x128"]),
        ("models:\n" + MODEL + "    shapes: [8X128]\n", ["shapes.0", "'8X128' is not a shape"]),
        ("models:\n" + MODEL + "    shapes: 8x128\n", ["shapes: must be a list", "'8x128'"]),
        ("models:\n" + MODEL + "    max_batch_size: 8\n    shapes: [32x128]\n", ["32x128", "max_batch_size 8"]),
        ("models:\n" + MODEL + "    ladder: {tries: 3}\n", ["ladder.tries: no such field; there are trials, seconds"]),
        ("models:\n" + MODEL + "    ladder: {trials: -1}\n", ["ladder.trials", "given: -1"]),
        (
            "models:\n" + MODEL + "    tensorrt: {workspace: 4}\n",
            ["tensorrt.workspace: no such field; there are optimization_level, workspace_gb, profiles"],
        ),
        ("models:\n" + MODEL + "    tensorrt: {optimization_level: 6}\n", ["tensorrt.optimization_level", "given: 6"]),
        ("models:\n" + MODEL + "    tensorrt: {profiles: 0}\n", ["tensorrt.profiles", "given: 0"]),
        ("models:\n" + MODEL + "    max_batch_size: true\n", ["max_batch_size", "integer"]),
        ("models:\n" + MODEL + "    gates: {cosine_mean: '0.9'}\n", ["gates.cosine_mean", "number"]),
        ("models:\n" + MODEL + "    gates: {cosine_mean: .nan}\n", ["gates.cosine_mean", "finite"]),
        ("models:\n" + MODEL + "    gates: {norm_error: .inf}\n", ["gates.norm_error", "finite"]),
        ("models:\n" + MODEL + "    gates: {norm_error: -1}\n", ["gates.norm_error", "greater"]),
        ("models:\n" + MODEL + "    benchmark: {seconds: .inf}\n", ["benchmark.seconds"]),
        ("models:\n" + MODEL + "    benchmark: {second: 1}\n", ["benchmark.second: no such field"]),
        ("models:\n" + MODEL + "    engines: []\n", ["engines", "at least 1"]),
        ("models:\n" + MODEL + "    engines: onnxruntime_fp32\n", ["engines: must be a list"]),
        ("models:\n" + MODEL + "    gates: 0.9\n", ["gates: must be fields with values", "0.9"]),
        ("models:\n" + MODEL + "    benchmark: 45\n", ["benchmark: must be fields with values", "45"]),
        ("models:\n" + MODEL + "    extra: {a: 1}\n    shapes: [x]\n", ["extra: no such field", "shapes.0"]),
        ("models:\n  - just a name\n", ["model number 1", "mapping"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, parts):
    with pytest.raises(CatalogError) as caught:
        load(tmp_path, text)
    for part in [*parts, "models.yaml"]:
        assert part in str(caught.value)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_bytes(b"models: \xff\n")
    with pytest.raises(CatalogError, match=r"models\.yaml cannot be read: 'utf-8'"):
        load_catalog(path)


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("all-MiniLM-L6-v2.1_final", True),
        ("m__r3", True),
        ("0", True),
        ("a" * 100, True),
        ("a" * 101, False),
        ("-m", False),
        (".m", False),
        ("m\n", False),
        ("mödel", False),
        ("a b", False),
        ("a..b", True),
        ("x__r12__y", False),
    ],
)
def test_names(name, fine):
    if fine:
        check_name(name)
    else:
        with pytest.raises(ValueError, match="name: "):
            check_name(name)


def test_settings_can_be_shared_by_yaml_merging(tmp_path):
    text = "models:\n" + MODEL + "    gates: &strict {cosine_mean: 0.999, cosine_worst: 0.99}\n"
    second = MODEL.replace("name: m", "name: n") + "    gates: {<<: *strict, cosine_worst: 0.995}\n"
    assert load(tmp_path, text + second).get("n").gates == {"cosine_mean": 0.999, "cosine_worst": 0.995}


def test_whole_numbers_are_numbers(tmp_path):
    entry = load(tmp_path, "models:\n" + MODEL + "    gates: {cosine_mean: 1}\n    benchmark: {seconds: 7}\n").get("m")
    assert entry.accuracy_gates().model_dump()["cosine_mean"] == 1.0
    assert entry.benchmark == BenchmarkSettings(seconds=7.0)


def test_no_models_is_a_catalog_too(tmp_path):
    catalog = load(tmp_path, "models: []\n")
    with pytest.raises(CatalogError, match=r"no model named 'n' in the catalog \(there: none\)"):
        catalog.get("n")


def test_entries_made_in_python_are_checked_alike():
    with pytest.raises(ValidationError, match="gates.no_such: no such field"):
        ModelEntry(name="m", source="a/b", task="embedding", gates={"no_such": 1.0})


@pytest.mark.parametrize("name", ["no", "007", "1e3", "0x16", "8x128", "2026-01-01", "null", "m-1.0"])
def test_written_entries_are_read_as_they_were(tmp_path, name):
    entry = ModelEntry.model_validate(
        {
            "name": name,
            "source": "/a folder/mit Umlaut ä: [x] # no comment",
            "task": "classification",
            "shapes": ["1x8", "1x16"],
            "max_batch_size": 1,
            "gates": {"label_agreement": 1.0},
            "objective": "p90",
            "benchmark": {"seconds": 0.5},
            "engines": ["onnxruntime_int8", "onnxruntime_fp32"],
            "allow_pickle": True,
        }
    )
    path = write_entry(entry, tmp_path)
    assert path.name == f"{name}.yaml"
    assert load_catalog(path).models == (entry,)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_no_such_file(tmp_path):
    with pytest.raises(CatalogError, match=r"nothing\.yaml does not exist.*REFINERY_CATALOG"):
        load_catalog(tmp_path / "nothing.yaml")


def test_unknown_model_names_those_there_are(tmp_path):
    with pytest.raises(CatalogError, match=r"no model named 'n' in the catalog \(there: m\)"):
        load(tmp_path, "models:\n" + MODEL).get("n")


def test_relative_folders_are_beside_the_file(tmp_path):
    entry = load(tmp_path, "models:\n" + MODEL.replace("org/model", "./here")).get("m")
    assert entry.source == str(tmp_path / "here")


def test_one_name_in_two_files(tmp_path):
    write_entry(ModelEntry(name="m", source="a/b", task="embedding"), tmp_path / "models.d")
    catalog = load(tmp_path, "models:\n" + MODEL, tmp_path / "models.d")
    assert re.search(r"models\.d/m\.yaml: model 'm'.*already in .*models\.yaml", catalog.refused["m"])
    assert catalog.get("m").source == "org/model"


def test_defaults_are_not_written_down(tmp_path):
    path = write_entry(ModelEntry(name="m", source="a/b", task="embedding"), tmp_path)
    assert "shapes" not in path.read_text()
    assert load_catalog(path).get("m").shapes is None


def test_a_run_under_way_keeps_its_entry_while_somebody_edits_the_file(tmp_path):
    workspace = Workspace(tmp_path / "home", tmp_path / "models.yaml")
    text = "models:\n  - {name: tiny, source: ./tiny, task: embedding}\n"
    workspace.catalog_path.write_text(text)
    entry = workspace.entry("tiny")
    workspace.catalog_path.write_text(text.replace("task", "taks"))
    assert workspace.entry("tiny") == entry
    with pytest.raises(CatalogError, match="taks: no such field"):
        workspace.catalog()
    with pytest.raises(CatalogError, match="taks: no such field"):
        workspace.entry("another")
    workspace.catalog_path.write_text(text.replace("./tiny", "./other"))
    assert workspace.entry("tiny").source.endswith("other")


def test_limits_of_requests_leave_room_for_a_batch():
    fields = {"name": "m", "source": "a/b", "task": "embedding", "max_batch_size": 8}
    assert ModelEntry.model_validate({**fields, "limits": {"engine_rows": 8}}).limits.engine_rows == 8
    with pytest.raises(ValueError, match="engine_rows: 7 is less than max_batch_size"):
        ModelEntry.model_validate({**fields, "limits": {"engine_rows": 7}})


def no_utf8(path):
    path.write_bytes(b"models: [\xff\xfe")


def unreadable(path):
    path.symlink_to(path.with_name("nothing is there"))


#: What may lie in models.d in place of a file of models, after a crash or by mistake.
BAD = {
    "empty": lambda path: path.touch(),
    "no YAML": lambda path: path.write_text("models: [{"),
    "no UTF-8": no_utf8,
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a dead link": unreadable,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "too large": lambda path: path.open("wb").truncate(2**40),
    "too deep": lambda path: path.write_text("[" * 20000),
    "a wrong field": lambda path: path.write_text("models:\n" + MODEL.replace("task", "tusk")),
    "a name that is taken": lambda path: path.write_text("models:\n" + MODEL),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_addition_costs_itself_alone_and_is_named(tmp_path, bad):
    additions = tmp_path / "models.d"
    additions.mkdir()
    BAD[bad](additions / "bad.yaml")
    (additions / "z.yaml").write_text("models:\n" + MODEL.replace("name: m", "name: z"))
    catalog = load(tmp_path, "models:\n" + MODEL, additions)
    assert catalog.names == ["m", "z"]
    with pytest.raises(CatalogError, match=r"models\.d/bad\.yaml.*Correct that file, or remove it"):
        catalog.get("bad")
    assert len(str(catalog.refused["bad"])) < 600


def test_a_mistake_in_the_models_file_itself_stops_everything(tmp_path):
    with pytest.raises(CatalogError, match=r"models\.yaml"):
        load(tmp_path, "")


def test_a_bad_addition_is_said_and_takes_no_model_out(tmp_path, capsys, monkeypatch):
    """Not by the commands, and not by the sensor, which forgets models that are in the catalog no more."""
    from orchestration.cli import main

    (tmp_path / "models.yaml").write_text("models:\n" + MODEL)
    (tmp_path / "home" / "models.d").mkdir(parents=True)
    (tmp_path / "home" / "models.d" / "bad.yaml").touch()
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFINERY_CATALOG", str(tmp_path / "models.yaml"))
    assert main(["models"]) == 0
    assert "models.d/bad.yaml" in capsys.readouterr().err
    assert main(["optimize", str(tmp_path), "--name", "bad"]) == 1
    assert "Correct that file" in capsys.readouterr().err


def test_a_run_keeps_its_entry_while_its_file_is_broken(workspace):
    write_entry(ModelEntry(name="kept", source="org/model", task="embedding"), workspace.additions)
    workspace.catalog_path.write_text("models: []\n")
    entry = workspace.entry("kept")
    (workspace.additions / "kept.yaml").write_text("")
    assert workspace.entry("kept") == entry
    (workspace.additions / "kept.yaml").unlink()
    with pytest.raises(CatalogError, match="no model named 'kept'"):
        workspace.entry("kept")
