"""Who may write in the artifact store does not decide what code runs: only the catalog's entry does."""

import json
import os
import pickle
import time
from contextlib import suppress

import numpy as np
import pytest

from resources.accuracy.evaluation_set import BASELINE_NUMBERS, ITEMS_FILE, read_evaluation_set
from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.gc import DAY_SECONDS, collect
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph, StoredFile, sha256_file
from resources.artifacts.store import ArtifactStore
from resources.catalog.entries import ModelEntry
from resources.engines.interface import Sources, load
from resources.engines.onnxruntime.tensorrt_provider import SETTINGS, read_settings
from resources.engines.specs import BASELINE, engine_spec
from resources.errors import ArtifactError, CheckpointError, RefineryError
from resources.processes.isolation import run_isolated
from resources.settings.workspace import Workspace
from tests.checkpoints import edit_json
from tests.conftest import entry_for
from tests.making import collect_checkpoint, make_engine, make_evaluation_set, make_graph, make_reference, sources_of


@pytest.fixture
def forged(workspace, made_checkpoint, tmp_path):
    """An entry, the record of its checkpoint into which somebody put code of their own, and where that would write."""
    entry = entry_for(made_checkpoint())
    record = collect_checkpoint(entry, workspace.store, workspace.limits).record
    workspace.store.point(f"checkpoint/{entry.name}", record)
    ran = tmp_path / "ran"
    return entry, forge(workspace.store, record, f"open({str(ran)!r}, 'a').close()"), ran


def forge(store: ArtifactStore, record: Checkpoint, code: str) -> Checkpoint:
    """Put code beside the checkpoint, and say in its record that the code may run."""
    folder = store.folder(record)
    classes = (
        "from transformers import BertConfig, BertModel\nclass Config(BertConfig): pass\nclass Model(BertModel): pass"
    )
    (folder / "own.py").write_text(f"{code}\n{classes}\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Config", None]})
    names = {*record.files, "own.py", "tokenizer_config.json"}
    files = {
        name: StoredFile(sha256=sha256_file(folder / name), size_bytes=(folder / name).stat().st_size) for name in names
    }
    made = record.model_copy(update={"files": files, "trust_remote_code": True, "allow_pickle": True})
    (folder / "record.json").write_text(made.model_dump_json())
    assert store.find(Checkpoint, record.digest) == made
    return made


def run_baseline(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint) -> None:
    graph = OnnxGraph.model_construct(digest="", inputs=(), output="", width=0, checker="", parity_misses=())
    sources = sources_of(workspace, entry, checkpoint, graph)
    engine = make_engine(workspace, entry, engine_spec(BASELINE), "cpu", sources).record
    run_isolated(_load, engine, sources, limits=workspace.limits, what="PyTorch")


def _load(engine: Engine, sources: Sources) -> None:
    load(engine, sources.checkpoint_folder, sources, 1)


def compare_with_the_library(workspace, entry, checkpoint):
    evaluation = EvaluationSet.model_construct(digest="e", files={})
    make_reference(workspace, entry, checkpoint, evaluation)


@pytest.mark.parametrize(
    "step",
    [
        run_baseline,
        pytest.param(make_evaluation_set, marks=pytest.mark.whole),
        pytest.param(make_graph, marks=pytest.mark.whole),
        pytest.param(compare_with_the_library, marks=pytest.mark.whole),
    ],
)
def test_code_that_somebody_put_into_the_store_does_not_run(workspace, forged, step):
    entry, checkpoint, ran = forged
    with suppress(RefineryError):
        step(workspace, entry, checkpoint)
    assert not ran.exists()


def test_a_copy_that_is_not_the_source_is_refused_and_made_anew(workspace, forged):
    entry, _, _ = forged
    with pytest.raises(ArtifactError, match=r"config\.json of the stored copy in .* differs from the source"):
        collect_checkpoint(entry, workspace.store, workspace.limits)
    made = collect_checkpoint(entry, workspace.store, workspace.limits)
    assert not made.reused
    assert "own.py" not in made.record.files


def test_pickles_in_the_store_are_not_loaded(workspace, made_checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    entry = entry_for(made_checkpoint())
    record = collect_checkpoint(entry, workspace.store, workspace.limits).record
    folder = workspace.store.folder(record)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    files = {name: file for name, file in record.files.items() if name != "model.safetensors"}
    forged = record.model_copy(update={"allow_pickle": True, "files": files})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run_baseline(workspace, entry, forged)
    np.save(tmp_path / BASELINE_NUMBERS, np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / ITEMS_FILE).write_text("{}")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_evaluation_set(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_settings_of_the_provider_name_no_libraries(tmp_path):
    path = tmp_path / "provider.json"
    path.write_text(json.dumps({"trt_fp16_enable": "1", "trt_extra_plugin_lib_paths": "evil.so"}))
    with pytest.raises(ValueError, match="trt_extra_plugin_lib_paths"):
        read_settings(path)
    path.write_text(json.dumps(dict.fromkeys(SETTINGS, "1")))
    assert set(read_settings(path)) == set(SETTINGS)


@pytest.fixture
def made(tmp_path):
    """A store, an engine in it, and a function that changes its record."""
    store, made_of = ArtifactStore(tmp_path / "store"), Fingerprint.of("engine", code="1", spec=["long"] * 100)
    fields = {"model": "m", "name": "e", "target": "cpu", "runtime": "onnxruntime", "precision": "fp32"}
    record = store.get_or_make(
        Engine, made_of, lambda _: Engine(**fields, status="built", digest=made_of.digest)
    ).record

    def change(**parts):
        path = store.folder(record) / "record.json"
        path.write_text(record.model_copy(update={"made_of": parts}).model_dump_json())

    return store, record, change


def test_a_record_that_does_not_fit_its_digest_is_damaged(made):
    store, record, change = made
    store.point("engines/cpu/e/m", record)
    assert store.current(Engine, "engines/cpu/e/m") == record
    for wrong in ({**record.made_of, "code": "2"}, {**record.made_of, "kind": "engine"}):
        change(**wrong)
        assert store.look(Engine, record.digest) == (None, ("record.json",))
        assert store.record(Engine, record.digest) is None
        with pytest.raises(ArtifactError, match=r"record\.json in .* changed on the disk"):
            store.current(Engine, "engines/cpu/e/m")
    again = store.get_or_make(Engine, Fingerprint("engine", record.digest, record.made_of), lambda _: record)
    assert (again.reused, again.damaged) == (False, ("record.json",))


def test_a_record_names_no_file_outside_of_its_folder(made, tmp_path):
    store, record, _ = made
    (tmp_path / "outside").write_text("x")
    name = f"{'../' * len(store.folder(record).parts)}{tmp_path / 'outside'}"
    file = StoredFile(sha256=sha256_file(tmp_path / "outside"), size_bytes=1)
    for wrong in ({"files": {name: file}}, {"entry_file": name}):
        (store.folder(record) / "record.json").write_text(record.model_copy(update=wrong).model_dump_json())
        assert store.look(Engine, record.digest)[0] is None


def test_records_of_earlier_versions_are_read_as_long_as_nobody_asks_for_just_them(made):
    """They hold parts of which the digest cannot be computed again, or none."""
    store, record, change = made
    for earlier in ({**record.made_of, "spec": f"sha256:{'a' * 16}"}, {}):
        change(**earlier)
        assert store.find(Engine, record.digest).made_of == earlier
    again = store.get_or_make(Engine, Fingerprint("engine", record.digest, record.made_of), lambda _: record)
    assert not again.reused


def no_room(record):
    with record.open("wb") as stream:
        stream.truncate(10**12)  # it takes no room


@pytest.mark.parametrize("put", [os.mkfifo, no_room, lambda record: record.symlink_to("/dev/zero")])
def test_records_and_pointers_that_have_no_end_are_not_read(made, put):
    store, record, _ = made
    store.point("e", record)
    for path in (store.folder(record) / "record.json", store.root / "current" / "e.json"):
        path.unlink()
        put(path)
    assert store.look(Engine, record.digest) == (None, ("record.json",))
    assert store.record(Engine, record.digest) is None
    assert store.pointed("e") == ""
    assert collect(store, (), used_since=time.time() - DAY_SECONDS).removed == {}
