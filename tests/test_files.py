"""What is kept reaches the disk before its name does, and what cannot be written leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
from resources.catalog.entries import ModelEntry
from resources.catalog.loading import write_entry
from resources.checkpoints.sources.copies import kept_copy
from resources.storage import atomic as files
from resources.storage.atomic import write_whole
from resources.triton.files import remember_number
from tests.test_artifacts import engine


@pytest.fixture
def order(monkeypatch):
    """What is synced and renamed, in order, by names; drafts as they were called."""
    seen = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record(kind, done):
        def call(source, *target, **more):
            path = Path(f"/proc/self/fd/{source}").resolve() if isinstance(source, int) else Path(source)
            seen.append((kind, str(path), *map(str, target)))
            return done(source, *target, **more)

        return call

    monkeypatch.setattr(os, "fsync", record("sync", fsync))
    monkeypatch.setattr(os, "rename", record("rename", rename))
    monkeypatch.setattr(os, "replace", record("rename", replace))
    return seen


def keep_pointer(folder):
    store, made_of = ArtifactStore(folder), Fingerprint.of("engine", a=1)
    store.point("engines/cpu/e/m", store.get_or_make(Engine, made_of, lambda _: engine(made_of.digest)).record)
    return folder / "current" / "engines" / "cpu" / "e" / "m.json"


def keep_artifact(folder):
    made_of = Fingerprint.of("engine", a=1)

    def make(place):
        (place / "model.onnx").write_text("x")
        return engine(made_of.digest)

    store = ArtifactStore(folder)
    return store.folder(store.get_or_make(Engine, made_of, make).record)


def keep_entry(folder):
    return write_entry(ModelEntry(name="m", source="org/model", task="embedding"), folder)


def keep_copy(folder):
    return kept_copy(folder, "s3://bucket/m", "1", lambda place: (place / "config.json").write_text("{}"))


def keep_number(folder):
    remember_number(folder / "cpu", "m", 3)
    return folder / ".cpu.numbers" / "m"


def keep_file(folder):
    write_whole(folder / "file", "text")
    return folder / "file"


@pytest.mark.parametrize("keep", [keep_pointer, keep_artifact, keep_entry, keep_copy, keep_number, keep_file])
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_it_counts(tmp_path, order, keep):
    place = keep(tmp_path / "kept")
    ((index, draft),) = [
        (at, step[1]) for at, step in enumerate(order) if step[0] == "rename" and step[2] == str(place)
    ]
    synced = {step[1] for step in order[:index] if step[0] == "sync"}
    inside = [path.relative_to(place) for path in place.rglob("*")] if place.is_dir() else []
    assert {draft, *(str(Path(draft) / name) for name in inside)} <= synced
    assert ("sync", str(place.parent)) in order[index:]


@pytest.mark.parametrize("fails", ["write", "sync", "rename"])
def test_what_cannot_be_written_leaves_what_was_there_and_no_draft(tmp_path, monkeypatch, fails):
    write_whole(tmp_path / "file", "before")

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = {"write": (Path, "write_bytes"), "sync": (files, "sync"), "rename": (Path, "replace")}[fails]
    monkeypatch.setattr(*where, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", "after")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"
