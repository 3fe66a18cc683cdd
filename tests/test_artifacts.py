"""The store: work is done once, half-done work is never seen, damage is noticed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from resources.artifacts.fingerprint import code_version, fingerprint
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
from resources.errors import ArtifactError


def engine(digest="a" * 64, **fields):
    settings = {"model": "m", "name": "e", "target": "cpu", "runtime": "onnxruntime", "precision": "fp32"}
    return Engine(**{**settings, "status": "built", "digest": digest, **fields})


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "store")


def writer(text="hello", record=None):
    def make(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "model.onnx").write_text(text)
        return record or engine()

    return make


def never(folder):
    raise AssertionError("made again")


def test_made_once_and_found_again(store):
    first = store.get_or_make(Engine, "a" * 64, writer())
    assert not first.reused
    assert first.record.files["sub/model.onnx"].size_bytes == 5
    second = store.get_or_make(Engine, "a" * 64, never)
    assert second.reused
    assert second.record == first.record
    assert (store.folder(second.record) / "sub" / "model.onnx").read_text() == "hello"


def test_content_digest_depends_on_content_alone(store):
    one = store.get_or_make(Engine, "a" * 64, writer("x")).record
    two = store.get_or_make(Engine, "b" * 64, writer("x", engine("b" * 64))).record
    three = store.get_or_make(Engine, "c" * 64, writer("y", engine("c" * 64))).record
    assert one.content_digest == two.content_digest != three.content_digest


def test_failed_making_leaves_nothing(store):
    def make(folder):
        (folder / "half").write_text("x")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        store.get_or_make(Engine, "a" * 64, make)
    assert not (store.root / "engine").exists()
    assert list((store.root / "staging").iterdir()) == []


@pytest.mark.parametrize("damage", ["remove", "truncate", "record"])
def test_damaged_artifacts_are_made_again(store, damage):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    path = store.folder(record) / "sub" / "model.onnx"
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_text("hell")
    else:
        (store.folder(record) / "record.json").write_text("{}")
    assert not store.get_or_make(Engine, "a" * 64, writer()).reused
    assert path.read_text() == "hello"


def test_changed_bytes_of_the_same_length_are_named(store):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    assert store.damaged(record) == []
    (store.folder(record) / "sub" / "model.onnx").write_text("jello")
    assert store.damaged(record) == ["sub/model.onnx"]


def test_failures_are_not_reused(store):
    failed = engine(status="failed", reason="out of memory")
    assert not store.get_or_make(Engine, "a" * 64, lambda folder: failed).reused
    again = store.get_or_make(Engine, "a" * 64, writer())
    assert not again.reused
    assert again.record.status == "built"
    assert store.get_or_make(Engine, "a" * 64, never).reused


def test_current_names_the_newest(store):
    with pytest.raises(ArtifactError, match="engines/cpu/e/m has not been made yet.*optimize"):
        store.current(Engine, "engines/cpu/e/m")
    for digest in ("a" * 64, "b" * 64):
        store.point("engines/cpu/e/m", store.get_or_make(Engine, digest, writer(record=engine(digest))).record)
    assert store.current(Engine, "engines/cpu/e/m").digest == "b" * 64


MAKER = """
import sys, time
from pathlib import Path
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
from tests.test_artifacts import engine
store = ArtifactStore(Path(sys.argv[1]))
def make(folder):
    (folder / "model.onnx").write_text("x")
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    time.sleep(float(sys.argv[3]))
    return engine()
print(store.get_or_make(Engine, "a" * 64, make).reused)
"""


def maker(store, log, seconds):
    command = [sys.executable, "-c", MAKER, str(store.root), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())


def test_two_processes_do_the_work_once(store, tmp_path):
    processes = [maker(store, tmp_path / "log", 1) for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert answers == ["False", "True"]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_killed_maker_leaves_no_artifact_and_no_lock(store, tmp_path):
    process = maker(store, tmp_path / "log", 60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert store.find(Engine, "a" * 64) is None
    assert not store.get_or_make(Engine, "a" * 64, writer()).reused


def test_fingerprints_do_not_depend_on_order_and_do_on_everything_else():
    assert fingerprint("k", a=1, b=[2]) == fingerprint("k", b=[2], a=1)
    assert len({fingerprint("k", a=1), fingerprint("k", a=2), fingerprint("l", a=1), fingerprint("k", a="1")}) == 4


def test_code_versions_follow_the_source():
    assert code_version("resources.tasks") == code_version("resources.tasks")
    assert code_version("resources.tasks") != code_version("resources.export")
    with pytest.raises(FileNotFoundError):
        code_version("resources.nothing")
