"""A disk that is full: commands say so with the file and the remedy, leave nothing, and `refinery gc` makes room."""

import errno
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from orchestration.cli.optimize import _of_the_system
from orchestration.runs.instance import prepare_instance
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
from resources.errors import disk_trouble
from resources.settings.workspace import Workspace
from tests.test_artifacts import engine

REFINERY = str(Path(sys.executable).with_name("refinery"))


def refinery(home, *arguments):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
    variables = {**clean, "REFINERY_HOME": str(home), "COLUMNS": "200"}
    return subprocess.run([REFINERY, *arguments], env=variables, capture_output=True, text=True, timeout=200)


def fill(folder):
    """Leave neither a byte nor a file."""
    with pytest.raises(OSError, match="No space"), (folder / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**20))
    with pytest.raises(OSError, match="No space"):
        for number in range(100_000):
            (folder / f"filler {number}").touch()


def names_in(folder):
    return {str(path) for path in folder.rglob("*") if not path.name.endswith((".db", ".db-wal", ".db-shm"))}


@pytest.fixture
def home(small_disk, monkeypatch):
    """A home on a small disk, with Dagster's instance, an artifact that nobody needs, and one that is current."""
    folder, mount = small_disk
    mount(20 * 2**20, 400)
    home = folder / "home"
    store = ArtifactStore(home / "artifacts")
    for letter in "ab":
        made = store.get_or_make(Engine, letter * 64, lambda place, letter=letter: make(place, letter))
    store.point("engines/cpu/e/m", made.record)
    (store.root / "staging").rmdir()
    long_ago = time.time() - 30 * 24 * 3600
    for record in (store.root / "engine").glob("*/record.json"):
        os.utime(record, (long_ago, long_ago))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    prepare_instance(Workspace(home=home, catalog_path=home / "models.yaml"))
    with dg.DagsterInstance.get() as instance:
        instance.get_runs()
    os.environ.pop("DAGSTER_HOME")
    fill(folder)
    return home


def make(place, letter):
    (place / "model.onnx").write_bytes(bytes(2**20))
    return engine(letter * 64)


def test_gc_makes_room_on_a_full_disk(home):
    configuration = home / "dagster" / "dagster.yaml"
    before = configuration.stat()
    done = refinery(home, "gc")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (home / "artifacts" / "engine").iterdir()] == ["b" * 32]
    assert configuration.stat().st_mtime_ns == before.st_mtime_ns
    assert not list((home / "artifacts").rglob("*.lock")) or not (home / "artifacts" / "staging").exists()
    assert os.statvfs(home).f_bavail * os.statvfs(home).f_bsize > 2**19


def test_optimize_says_what_is_full_and_leaves_nothing(home, made_checkpoint):
    before = names_in(home)
    done = refinery(home, "optimize", str(made_checkpoint()), "--name", "new", "--serving-seconds", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device. Make room there" in done.stderr
    assert names_in(home) == before


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "Make room there"),
        (errno.EDQUOT, "Make room there"),
        (errno.EROFS, "needs permission to read and write there"),
        (errno.EIO, "Check that disk"),
        (errno.ENOENT, ""),
    ],
)
def test_what_the_system_says_of_a_disk_becomes_ours_with_file_and_remedy(number, said):
    error = OSError(number, os.strerror(number), "/place/file")
    outer = ValueError("a library's own")
    outer.__cause__ = error
    unrelated = ValueError("mended already")
    unrelated.__context__, unrelated.__suppress_context__ = error, True
    assert disk_trouble(unrelated) == ""
    for one in (error, outer):
        assert (said in disk_trouble(one)) and ("/place/file" in disk_trouble(one)) == bool(said)
    text = _of_the_system(["ValueError: x\n", f"{type(error).__name__}: {error}\n"])
    assert (said in text) and ("/place/file" in text) == bool(said)


@pytest.mark.parametrize("form", ["sqlite3.OperationalError: {}", "(sqlite3.OperationalError) {}"])
@pytest.mark.parametrize(
    ("code", "said", "remedy"),
    [
        ("SQLITE_IOERR_WRITE", "disk I/O error", "Make room there and"),
        ("SQLITE_FULL", "database or disk is full", "Make room there and"),
        (
            "SQLITE_CANTOPEN",
            "unable to open database file",
            "Make room there, or let the user who runs this write there",
        ),
        (
            "SQLITE_READONLY_DIRECTORY",
            "attempt to write a readonly database",
            "Make room there, or let the user who runs this write there",
        ),
    ],
)
def test_what_sqlite_says_of_a_disk_becomes_ours_with_its_remedy(form, code, said, remedy):
    expected = f"A database below REFINERY_HOME: {said}. {remedy}"
    assert _of_the_system(["a library's own", form.format(said)]).startswith(expected)
    error = sqlite3.OperationalError(said)
    error.sqlite_errorname = code
    assert disk_trouble(error).startswith(expected)


def test_another_error_of_sqlite_is_no_matter_of_the_disk():
    assert _of_the_system(["sqlite3.OperationalError: no such table: runs"]) == ""
