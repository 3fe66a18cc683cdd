"""Cleaning up the object storage that machines share: what anybody needs stays, and what is used in the meantime."""

import os
import time

import pytest

from orchestration.cli import gc as command
from resources.artifacts import remote_gc
from resources.artifacts.gc import DAY_SECONDS, collect
from resources.artifacts.records import Engine
from resources.artifacts.remote import RemoteArtifacts
from resources.artifacts.remote_gc import collect_remote
from resources.artifacts.store import ArtifactStore
from resources.errors import StorageError
from resources.settings.workspace import Workspace
from resources.storage import objects as storage
from resources.triton.layout import artifacts_of_releases
from tests.test_gc import digest, engine, make


@pytest.fixture
def remote(s3, tmp_path):
    return RemoteArtifacts(s3.place(tmp_path.name, tmp_path / "scratch"))


@pytest.fixture
def store(remote, tmp_path):
    return ArtifactStore(tmp_path / "one", remote)


def week(remote, *wanted, **options):
    return collect_remote(remote, wanted, used_since=time.time() - 7 * DAY_SECONDS, **options)


def there(remote):
    return {name.split("/")[1][0] for name in remote.root.listing() if name.startswith("engine/")}


def test_what_is_current_wanted_or_was_used_stays_with_what_it_was_made_from(store, remote, s3):
    recipe = f"RECIPE = {{'graph': '{digest('c')}'}}"
    records = {letter: make(store, letter, script=recipe if letter == "b" else "") for letter in "abcf0"}
    records["d"] = make(store, "d", reason=f"from {digest('e')}")
    records["e"] = make(store, "e")
    s3.age(remote.root, 30)
    store.point("engines/cpu/e/m", records["b"])
    s3.age(remote.root / "engine" / digest("b")[:32], 30)
    store.point("engines/cpu/e/n", records["f"])  # used
    store.forget("engines/cpu/e/n")
    done = week(remote, digest("d"), dry_run=True)
    assert done.removed["engine"].count == 2
    assert there(remote) == set(records)
    done = week(remote, digest("d"))
    assert there(remote) == {"b", "c", "d", "e", "f"}
    assert (done.removed["engine"].count, done.kept["engine"].count) == (2, 5)
    assert done.freed_bytes == done.removed["engine"].size_bytes > 2000
    other = ArtifactStore(store.root.parent / "two", remote)
    assert other.current(Engine, "engines/cpu/e/m") == records["b"]
    assert not other.damaged(records["b"])
    assert other.find(Engine, digest("a")) is None


def test_what_is_used_while_it_is_being_removed_stays(store, remote, s3, monkeypatch):
    records = {letter: make(store, letter) for letter in "ab"}
    s3.age(remote.root, 30)
    reachable = remote_gc.reachable

    def used_in_between(entries, wanted, used_since):
        kept = reachable(entries, wanted, used_since)
        assert remote.has(records["a"])
        return kept

    monkeypatch.setattr(remote_gc, "reachable", used_in_between)
    done = week(remote)
    assert there(remote) == {"a"}
    assert (done.removed["engine"].count, done.kept["engine"].count) == (1, 1)


def test_what_killed_machines_uploaded_goes_once_it_is_old(store, remote, s3):
    make(store, "a")
    place = remote.root / "engine"
    for name in (f"{digest('a')[:32]}/old/model.onnx", f"{digest('b')[:32]}/old/model.onnx"):
        (place / name).write_bytes(bytes(500))
    s3.age(remote.root, 30)
    store.point("engines/cpu/e/m", store.find(Engine, digest("a")))
    (place / digest("a")[:32] / "new" / "model.onnx").write_bytes(bytes(700))
    done = week(remote)
    assert (done.removed["unfinished work"].count, done.removed["unfinished work"].size_bytes) == (2, 1000)
    assert there(remote) == {"a"}
    assert len((place / digest("a")[:32]).listing()) == 3  # its record, its file, and what is being uploaded
    other = ArtifactStore(store.root.parent / "two", remote)
    assert not other.damaged(other.current(Engine, "engines/cpu/e/m"))


def test_what_only_another_version_reads_is_left_to_it(store, remote, s3):
    record = remote.root / "engine" / digest("a")[:32] / "record.json"
    make(store, "a")
    record.write_bytes(b'{"version": 2}')
    (record.parent / "other" / "model.onnx").write_bytes(bytes(500))
    s3.age(remote.root, 30)
    record.write_bytes(record.read_bytes())  # used
    assert not week(remote).removed
    assert len(record.parent.listing()) == 3


def test_many_names_may_take_long_to_be_listed(store, remote, s3, monkeypatch):
    make(store, "a")
    s3.age(remote.root, 30)
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.5)
    s3.refuses = lambda method, key: bool(not key and time.sleep(1.0))
    assert week(remote, dry_run=True).removed["engine"].count == 1
    assert artifacts_of_releases(remote.root) == set()


def test_releases_in_object_storage_keep_what_they_were_made_of(remote):
    for name in ("cpu/m/3/release.json", "unverified/cpu/m/m/4/release.json"):
        (remote.root / name).write_bytes(digest(name[0]).replace("u", "e").encode())
    assert artifacts_of_releases(remote.root) == {digest("c"), digest("e")}


def test_nothing_is_removed_that_a_step_may_be_using(remote):
    with pytest.raises(AssertionError):
        collect_remote(remote, (), used_since=time.time())


def test_a_store_that_refuses_is_named_and_nothing_is_lost(store, remote, s3):
    make(store, "a")
    s3.age(remote.root, 30)
    s3.refuses = lambda method, key: method == "DELETE"
    with pytest.raises(StorageError, match="refuses to remove"):
        week(remote)
    assert there(remote) == {"a"}


def test_the_command_cleans_what_machines_share_and_its_own_copies(remote, s3, tmp_path, capsys):
    workspace = Workspace(tmp_path / "home", tmp_path / "models.yaml", artifacts=remote.root)
    make(workspace.store, "a")
    s3.age(remote.root, 30)
    when = time.time() - 30 * DAY_SECONDS
    os.utime(workspace.store.folder(engine("a")) / "record.json", (when, when))
    cleaned = command.clean_stores(workspace, 7.0, None)
    assert {place: done.removed["engine"].count for place, done in cleaned.items()} == {
        str(remote.root): 1,
        str(workspace.store.root): 1,
    }
    assert there(remote) == set()
    assert not collect(workspace.store, (), used_since=when).removed
