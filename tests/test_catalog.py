"""The models file: every mistake is named with its file, model, field and remedy, before any work begins."""

import pytest

from resources.catalog import DEFAULT_SHAPES, ModelEntry, load_catalog, write_entry
from resources.errors import CatalogError

MODEL = "  - name: m\n    source: org/model\n    task: embedding\n"


def load(tmp_path, text, additions=None):
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return load_catalog(path, additions)


def test_the_default_file_holds_the_real_checkpoint():
    from orchestration.settings import DEFAULT_CATALOG

    (entry,) = load_catalog(DEFAULT_CATALOG).models
    assert (entry.name, entry.task) == ("all-minilm-l6-v2", "embedding")
    assert [str(shape) for shape in entry.shapes] == ["1x16", "1x128", "8x128", "32x128"]
    assert entry.max_batch_size == 32
    assert entry.objective == "p50"
    assert entry.benchmark.seconds == 45
    assert entry.accuracy_gates().model_dump() == {"cosine_mean": 0.995, "cosine_worst": 0.99, "norm_error": 0.1}


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
        ("models:\n" + MODEL.replace("name: m", "name: m__r3__engine"), ["__r<number>__"]),
        ("models:\n" + MODEL.replace("name: m", "name: 7"), ["model number 1", "name"]),
        ("models:\n" + MODEL + "    task: classification\n", ["task", "twice"]),
        ("models: 3\n", ["'models'", "list"]),
        ("model: []\n", ["'models'"]),
        ("", ["'models'"]),
        ("models: [\n", ["cannot be read"]),
        ("models:\n  - just a name\n", ["model number 1", "mapping"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, parts):
    with pytest.raises(CatalogError) as caught:
        load(tmp_path, text)
    for part in [*parts, "models.yaml"]:
        assert part in str(caught.value)


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
    with pytest.raises(CatalogError, match=r"models\.d/m\.yaml: model 'm'.*already in .*models\.yaml"):
        load(tmp_path, "models:\n" + MODEL, tmp_path / "models.d")


def test_defaults_are_not_written_down(tmp_path):
    path = write_entry(ModelEntry(name="m", source="a/b", task="embedding"), tmp_path)
    assert "shapes" not in path.read_text()
    assert load_catalog(path).get("m").shapes == DEFAULT_SHAPES
