"""The store: work is done once, half-done work is never seen, damage is noticed."""

import ast
import io
import os
import signal
import subprocess
import sys
import time
import tokenize
from itertools import accumulate
from pathlib import Path

import pytest

from resources.artifacts import fingerprint as fingerprints
from resources.artifacts import hashes, records
from resources.artifacts import store as stores
from resources.artifacts.fingerprint import (
    Fingerprint,
    code_version,
    digest_of_files,
    file_versions,
    fingerprint,
    library_versions,
    pending,
)
from resources.artifacts.gc import DAY_SECONDS, collect
from resources.artifacts.records import Accuracy, BenchmarkReport, Engine, Record
from resources.artifacts.store import VERIFY_AGAIN_SECONDS, ArtifactStore
from resources.catalog.entries import Shape
from resources.engines.specs import ENGINES
from resources.errors import ArtifactError
from resources.storage.staging import WITHOUT_LOCK_SECONDS, leftovers


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


def remove_file(folder):
    (folder / "sub" / "model.onnx").unlink()


def truncate_file(folder):
    (folder / "sub" / "model.onnx").write_text("hell")


def file_for_folder(folder):
    remove_file(folder)
    (folder / "sub").rmdir()
    (folder / "sub").write_text("hello")


def older_record(folder):
    (folder / "record.json").write_text('{"digest": "x", "no_such_field": 1}')


def garbled_record(folder):
    (folder / "record.json").write_bytes(b"\xff\xfe")


def no_record(folder):
    (folder / "record.json").unlink()


def foreign_record(folder):
    (folder / "record.json").write_text(engine("a" * 32 + "b" * 32).model_dump_json())


@pytest.mark.parametrize(
    "damage", [remove_file, truncate_file, file_for_folder, older_record, garbled_record, no_record, foreign_record]
)
def test_damaged_artifacts_are_made_again(store, damage):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    damage(store.folder(record))
    assert store.find(Engine, "a" * 64) is None
    assert not store.get_or_make(Engine, "a" * 64, writer()).reused
    assert (store.folder(record) / "sub" / "model.onnx").read_text() == "hello"
    assert store.get_or_make(Engine, "a" * 64, never).reused
    assert list((store.root / "staging").iterdir()) == []


def flip(store, record, *, unseen=False):
    """One bit of the file. unseen: as a disk loses it, without another time or size."""
    file = store.folder(record) / "sub" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    if unseen:
        store._note_verified(store.folder(record), {"sub/model.onnx": hashes.signature(file)})


def test_a_changed_bit_is_seen_by_its_digest_and_said(store):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    store.point("engines/cpu/e/m", record)
    flip(store, record)
    with pytest.raises(ArtifactError, match=r"engines/cpu/e/m: sub/model.onnx in .* changed on the disk"):
        store.current(Engine, "engines/cpu/e/m")
    made = store.get_or_make(Engine, "a" * 64, writer())
    assert (made.reused, made.damaged) == (False, ("sub/model.onnx",))
    assert store.get_or_make(Engine, "a" * 64, never).damaged == ()


def test_files_are_read_when_they_changed_and_once_a_week(store, monkeypatch):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    read = []
    monkeypatch.setattr(stores, "sha256_file", lambda path: read.append(path.name) or records.sha256_file(path))
    assert store.find(Engine, "a" * 64) == record
    assert read == []
    file = store.folder(record) / "sub" / "model.onnx"
    os.utime(file, (1, 1))
    assert store.find(Engine, "a" * 64) == store.find(Engine, "a" * 64) == record
    assert read == ["model.onnx"]
    flip(store, record, unseen=True)
    assert store.find(Engine, "a" * 64) == record
    old = time.time() - VERIFY_AGAIN_SECONDS - 1
    os.utime(store.folder(record) / ".verified", (old, old))
    assert store.find(Engine, "a" * 64) is None
    assert read == ["model.onnx"] * 2


def test_what_something_is_made_from_is_read_whole_first(store, monkeypatch):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    other = store.get_or_make(Engine, "b" * 64, writer(record=engine("b" * 64))).record
    store.require_whole(record)
    read = []
    monkeypatch.setattr(stores, "sha256_file", lambda path: read.append(path.name) or records.sha256_file(path))
    store.require_whole(record)  # once a process
    assert read == []
    flip(store, other, unseen=True)
    with pytest.raises(ArtifactError, match=r"m: sub/model.onnx of the engine in .* optimize again"):
        store.require_whole(record, other)
    assert not store.get_or_make(Engine, "b" * 64, writer(record=engine("b" * 64))).reused


def test_digests_of_files_outside_are_remembered_while_they_do_not_change(tmp_path, monkeypatch):
    folder, memory = tmp_path / "checkpoint", tmp_path / "memory"
    folder.mkdir()
    old = time.time() - 60
    for name in ("old", "new"):
        (folder / name).write_text(name)
    os.utime(folder / "old", (old, old))
    # A file's time of change is the file system's: the clock is set ahead in place of waiting.
    later = time.time() + 60
    monkeypatch.setattr(hashes.time, "time", lambda: later)
    read = []
    monkeypatch.setattr(
        hashes, "hash_below", lambda folder, name: read.append(name) or (folder / name).read_text().ljust(64, "0")
    )
    first = hashes.hash_files(folder, ["old", "new"], memory)
    assert hashes.hash_files(folder, ["old", "new"], memory) == first
    assert read == ["old", "new"]
    (folder / "old").write_text("odd")
    os.utime(folder / "old", (old, old))  # of the same size and time: the time of its change tells
    assert hashes.hash_files(folder, ["old", "new"], memory)["old"].startswith("odd")
    assert read == ["old", "new", "old"]
    # What changed just now may change again within the same tick of the clock.
    later = (folder / "old").stat().st_ctime + 1
    (memory / next(memory.iterdir()).name).unlink()
    hashes.hash_files(folder, ["old"], memory)
    hashes.hash_files(folder, ["old"], memory)
    assert read[3:] == ["old", "old"]


def test_damage_stays_where_it_is_until_there_is_something_better(store):
    record = store.get_or_make(Engine, "a" * 64, writer()).record
    truncate_file(store.folder(record))

    def fail(folder):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        store.get_or_make(Engine, "a" * 64, fail)
    assert (store.folder(record) / "sub" / "model.onnx").read_text() == "hell"


def test_records_with_numbers_that_are_none_can_be_read_again(store):
    """NaN is what a broken engine answers: exactly the record somebody will want to read."""
    report = BenchmarkReport(
        digest="a" * 64,
        model="m",
        engine="e",
        engine_digest="b" * 64,
        baseline_digest="d" * 64,
        evaluation_digest="c" * 64,
        target="cpu",
        status="measured",
        accuracy=Accuracy(metrics={"cosine_mean": float("nan"), "norm_error": float("inf")}, texts=3),
    )
    store.get_or_make(BenchmarkReport, report.digest, lambda folder: report)
    found = store.find(BenchmarkReport, report.digest)
    assert repr(found.accuracy) == repr(report.accuracy)


def test_text_of_any_language_survives(store):
    named = engine(reason="zu wenig Speicher, 内存不足 🙂")
    store.get_or_make(Engine, "a" * 64, lambda folder: named)
    assert store.find(Engine, "a" * 64).reason == named.reason


def test_a_file_called_as_the_record_is_refused(store):
    def make(folder):
        (folder / "record.json").write_text("{}")
        return engine()

    with pytest.raises(ArtifactError, match=r"m: one of its files is called record\.json.*Rename"):
        store.get_or_make(Engine, "a" * 64, make)
    assert store.find(Engine, "a" * 64) is None


def test_a_record_under_another_digest_is_a_defect(store):
    with pytest.raises(AssertionError, match="never found"):
        store.get_or_make(Engine, "b" * 64, lambda folder: engine("a" * 64))


WORKER = """
import sys, time
from pathlib import Path
from resources.artifacts.store import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).staging() as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_in_which_somebody_works_stays_however_old_it_looks_and_goes_with_its_process(store):
    """A clock that is set ahead makes everything look old."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(store.root)], stdout=subprocess.PIPE, text=True)
    try:
        half = Path(worker.stdout.readline().strip()) / "half"
        long_ago = time.time() - 2 * WITHOUT_LOCK_SECONDS
        os.utime(half.parent, (long_ago, long_ago))
        assert list(leftovers(half.parents[1])) == []
        with store.staging():
            assert half.is_file()
        collect(store, (), used_since=time.time() - DAY_SECONDS - 1)
        assert half.is_file()
    finally:
        worker.kill()
        worker.communicate()
    assert list(leftovers(half.parents[1])) == [half.parent]
    with store.staging() as folder:
        assert {path.name for path in half.parents[1].iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert list(half.parents[1].iterdir()) == []


def test_what_a_killed_writer_of_an_earlier_version_left_is_swept_when_nobody_can_want_it(store):
    staging = store.root / "staging"
    for name, age in (("old", WITHOUT_LOCK_SECONDS + 60), ("young", 60)):
        (staging / name / "sub").mkdir(parents=True)
        (staging / name / "sub" / "file").write_text("x")
        os.utime(staging / name, (time.time() - age,) * 2)
    with store.staging() as folder:
        assert {path.name for path in staging.iterdir()} == {folder.name, f"{folder.name}.lock", "young"}


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


@pytest.mark.parametrize("text", ["", "[]", '"x"', "{}", '{"digest": "' + "f" * 64 + '"}'])
def test_unreadable_pointers_count_as_not_made(store, text):
    store.point("checkpoint/m", engine())
    (store.root / "current" / "checkpoint" / "m.json").write_text(text)
    with pytest.raises(ArtifactError, match="checkpoint/m has not been made yet"):
        store.current(Engine, "checkpoint/m")


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
    assert [path.name for path in (store.root / "staging").glob("*/*")] == ["model.onnx"]
    assert store.find(Engine, "a" * 64) is None
    assert not store.get_or_make(Engine, "a" * 64, writer()).reused


def test_what_an_artifact_is_made_of_is_kept_part_by_part(store):
    made_of = Fingerprint.of("engine", spec=ENGINES[0], items=["long"] * 100, files={"\udcff": "a"}, text="\ud83d")
    assert made_of.digest == fingerprint("engine", **made_of.parts)
    assert made_of.parts["spec"]["name"] == "torch"
    assert made_of.parts["items"].startswith("sha256:")
    store.get_or_make(Engine, made_of, lambda folder: engine(made_of.digest))
    found = store.find(Engine, made_of.digest)
    assert found.made_of == made_of.parts
    # Records of older versions have none, and can be read.
    assert engine().made_of == {}


def test_a_fingerprint_knows_what_it_waits_for():
    waiting = Fingerprint.of("k", a=1, b=[pending("x"), {"c": pending("y")}], d=["long"] * 100 + [pending("z")])
    assert waiting.awaits == ("x", "y", "z")
    assert Fingerprint.of("k", a="x").awaits == ()


def test_fingerprints_do_not_depend_on_order_and_do_on_everything_else():
    assert fingerprint("k", a=1, b=[2]) == fingerprint("k", b=[2], a=1)
    assert len({fingerprint("k", a=1), fingerprint("k", a=2), fingerprint("l", a=1), fingerprint("k", a="1")}) == 4


@pytest.mark.parametrize("value", [{1, 2}, object(), Shape(batch=1, sequence=8), int])
def test_what_reads_differently_in_every_process_is_no_part_of_a_fingerprint(value):
    with pytest.raises(TypeError, match="cannot be part of a fingerprint"):
        fingerprint("k", value=value)


def test_dataclasses_count_by_their_fields():
    assert len({fingerprint("engine", spec=spec) for spec in ENGINES}) == len(ENGINES)
    # Names of files may be any bytes.
    assert fingerprint("k", name="\udcff") != fingerprint("k", name="\udcfe")


def test_files_count_by_name_and_content_whatever_their_order():
    assert digest_of_files([("a", "1"), ("b", "2")]) == digest_of_files(iter([("b", "2"), ("a", "1")]))
    assert digest_of_files([("a", "1"), ("b", "2")]) != digest_of_files([("a", "2"), ("b", "1")])


def test_library_versions_name_what_is_not_there():
    assert library_versions("pytest", "no-such-package") == {"pytest": pytest.__version__, "no-such-package": "absent"}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Return a function that writes a file of a package and gives the package's versions, by code and by bytes."""
    monkeypatch.setattr(fingerprints, "_PACKAGE_ROOT", tmp_path)
    (tmp_path / "room" / "inner").mkdir(parents=True)
    for name in ("room/one.py", "room/inner/two.py"):
        (tmp_path / name).write_text("x = 1")

    def versions(name="room/one.py", text="x = 1"):
        (tmp_path / name).write_text(text)
        fingerprints._code_digest.cache_clear()
        return code_version.__wrapped__("room"), file_versions.__wrapped__("room")["room"]

    return versions


@pytest.mark.parametrize("changed", ["room/one.py", "room/inner/two.py"])
def test_code_versions_change_with_any_file_of_a_package(room, changed):
    before = room()
    assert room() == before
    assert room(changed, "x = 2")[0] != before[0]


#: With a string alone in its line behind a colon, a comment's sign in a string, and an empty line in another.
FUNCTION = '''def double(x):
    return {"a":
        "b # c"
        .strip(): x, "text": """one

two"""}
'''


@pytest.mark.parametrize(
    "text",
    [
        f'"""What it is for."""\n\n{FUNCTION}',
        FUNCTION.replace("    return", '    """Double.\n\n    Or not: "who" knows.\n    """\n    return'),
        FUNCTION.replace("    return", "    # as it is\n\n    return"),
        FUNCTION.replace('"a":', '"a":  # a table'),
        f"#!/bin/python\n\n\n{FUNCTION}\n\n",
    ],
)
def test_comments_docstrings_and_blank_lines_are_not_part_of_the_code(room, text):
    before, after = room(text=FUNCTION), room(text=text)
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("old", "new"),
    [("x,", "y,"), ("# c", "# d"), ("one\n\n", "one\n"), ("    return", "        return"), (".strip", "")],
)
def test_everything_else_is_part_of_the_code(room, old, new):
    assert old in FUNCTION
    assert room(text=FUNCTION)[0] != room(text=FUNCTION.replace(old, new))[0]


def test_what_is_left_out_is_what_python_calls_comments_and_docstrings():
    """In every file of the project, compared with Python's own tokenizer and parser."""
    root = Path(fingerprints.__file__).resolve().parents[2]
    files = [file for name in ("assets", "orchestration", "resources", "tests") for file in (root / name).rglob("*.py")]
    assert len(files) > 300
    for file in files:
        source = file.read_text(encoding="utf-8")
        found = {(begin, end) for begin, end, is_prose in fingerprints._long_strings_and_comments(source) if is_prose}
        assert found == comments_and_docstrings(source), file


def comments_and_docstrings(source):
    lines = source.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]
    found = {
        (starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            said = node.body[0].value
            # The parser counts bytes.
            begin = len(lines[said.lineno - 1].encode()[: said.col_offset].decode())
            end = len(lines[said.end_lineno - 1].encode()[: said.end_col_offset].decode())
            found.add((starts[said.lineno - 1] + begin, starts[said.end_lineno - 1] + end))
    return found


def test_every_kind_of_record_has_a_name_of_its_own():
    kinds = [kind.kind for kind in Record.__subclasses__()]
    assert len(kinds) == len(set(kinds)) >= 6


def test_code_versions_follow_the_source():
    assert code_version("resources.tasks") == code_version("resources.tasks")
    assert code_version("resources.tasks") != code_version("resources.export")
    with pytest.raises(FileNotFoundError):
        code_version("resources.nothing")
