"""Cleaning the store up: what anybody needs stays, and what is used in the meantime."""

import errno
import os
import subprocess
import sys
import time
from dataclasses import replace

import dagster as dg
import pytest

from orchestration.cli import gc as command
from orchestration.definitions import make_definitions
from resources.artifacts import gc
from resources.artifacts.gc import CACHE_SECONDS, DAY_SECONDS, collect
from resources.artifacts.records import Champion, Engine
from resources.artifacts.store import ArtifactStore
from resources.errors import ArtifactError
from resources.settings.workspace import Workspace
from resources.storage.staging import WITHOUT_LOCK_SECONDS
from resources.triton.publish import Steps, publish
from tests.releases import make_plan, unasked


def digest(letter):
    return letter * 64


def engine(letter, **fields):
    given = {"model": "m", "name": "e", "target": "cpu", "runtime": "onnxruntime", "precision": "fp32"}
    return Engine(**{**given, "status": "built", "digest": digest(letter), **fields})


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "store")


def make(store, letter, script="", **fields):
    def write(folder):
        (folder / "model.onnx").write_bytes(bytes(1000))
        if script:
            (folder / "rebuild.py").write_text(script)
        return engine(letter, **fields)

    return store.get_or_make(Engine, digest(letter), write).record


def age(store, record, days):
    when = time.time() - days * DAY_SECONDS
    os.utime(store.folder(record) / "record.json", (when, when))


def there(store):
    return {path.name[0] for path in (store.root / "engine").iterdir()}


def week(store, *wanted, **options):
    return collect(store, wanted, used_since=time.time() - 7 * DAY_SECONDS, **options)


def test_what_is_current_wanted_or_was_used_stays_with_what_it_was_made_from(store):
    records = {
        "a": make(store, "a"),
        "b": make(store, "b", script=f"RECIPE = {{'graph': '{digest('c')}'}}"),
        "c": make(store, "c"),
        "d": make(store, "d", reason=f"from {digest('e')}"),
        "e": make(store, "e"),
        "f": make(store, "f"),
        "0": make(store, "0"),
    }
    for record in records.values():
        age(store, record, 30)
    store.point("engines/cpu/e/m", records["b"])
    store.find(Engine, digest("f"))  # used
    done = week(store, digest("d"), dry_run=True)
    assert done.removed["engine"].count == 2
    assert there(store) == set(records)
    done = week(store, digest("d"))
    assert there(store) == {"b", "c", "d", "e", "f"}
    assert (done.removed["engine"].count, done.kept["engine"].count) == (2, 5)
    assert done.freed_bytes == done.removed["engine"].size_bytes > 2000
    assert not list((store.root / "staging").iterdir())
    assert {path.name[7] for path in (store.root / "locks").iterdir()} == {"b", "c", "d", "e", "f"}


def test_what_is_used_while_it_is_being_removed_is_put_back(store, monkeypatch):
    for letter in "ab":
        age(store, make(store, letter), 30)
    reachable = gc.reachable

    def used_in_between(entries, wanted, used_since):
        kept = reachable(entries, wanted, used_since)
        assert store.find(Engine, digest("a")) is not None
        return kept

    monkeypatch.setattr(gc, "reachable", used_in_between)
    done = week(store)
    assert there(store) == {"a"}
    assert (done.removed["engine"].count, done.kept["engine"].count) == (1, 1)
    assert store.get_or_make(Engine, digest("a"), lambda folder: None).reused
    assert not store.damaged(store.find(Engine, digest("a")), every_byte=True)


def test_nothing_is_removed_that_a_step_may_be_using(store):
    with pytest.raises(AssertionError):
        collect(store, (), used_since=time.time())


def test_leftovers_and_caches_that_nobody_reads_go(store):
    old, new = time.time() - CACHE_SECONDS - 1, time.time() - WITHOUT_LOCK_SECONDS + 60
    for name in ("staging/dead", "staging/alive", "caches/sources/old.json", "caches/sources/new.json"):
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("staging"):
            path.mkdir()
            (path / "half").write_bytes(bytes(500))
        else:
            path.write_bytes(bytes(300))
        os.utime(path, (old, old) if path.stem in ("dead", "old") else (new, new))
    done = week(store)
    assert done.removed["unfinished work"].size_bytes == 500
    assert done.removed["caches"].size_bytes == 300
    assert {path.name for path in (store.root / "staging").iterdir()} == {"alive"}
    assert {path.name for path in (store.root / "caches" / "sources").iterdir()} == {"new.json"}


@pytest.fixture(params=[Steps(prove=unasked), Steps()], ids=["published", "waiting"])
def published(tmp_path, triton_settings, request):
    """A workspace with a release, or one that waits for its proof, whose champion is not current any more."""
    workspace = Workspace(tmp_path / "home", tmp_path / "models.yaml", triton=triton_settings)
    plan = make_plan(tmp_path / "plans")
    plan = replace(plan, lineage={"refinery_champion": digest("9")})
    release = publish(plan, workspace.repository("cpu"), request.param).release
    made = Champion(
        digest=digest("9"), model="tiny", target="cpu", engine="e", engine_digest=release.engine_digest,
        evaluation_digest=digest("8"), objective="p50", score=1.0, reason="", verdicts=(),
    )  # fmt: skip
    workspace.store.get_or_make(Champion, made.digest, lambda folder: made)
    age(workspace.store, made, 30)
    for letter in "ab":
        age(workspace.store, make(workspace.store, letter), 30)
    return workspace


def test_releases_keep_what_they_were_made_of(published):
    """Also where another version has written their manifests."""
    for manifest in published.repositories.rglob("release.json"):
        manifest.write_text(manifest.read_text().replace("{", '{"unheard_of": 1,', 1))
    (done,) = command.clean_stores(published, 7.0, None).values()
    assert published.store.find(Champion, digest("9")) is not None
    assert done.removed["engine"].count == 2


def test_what_runs_under_way_use_stays_and_the_job_says_what_went(published):
    definitions = make_definitions(published)
    given = {"ops": {"collect_garbage": {"config": {"keep_days": 2.0}}}}
    with dg.instance_for_test() as instance:
        run = instance.create_run_for_job(definitions.get_job_def("gc"))
        under_way = command.oldest_run_under_way(instance)
        assert under_way.dagster_run.run_id == run.run_id
        for letter in "ab":
            age(published.store, engine(letter), 3)
        begun = under_way._replace(create_timestamp=under_way.create_timestamp.replace(year=2020))
        (done,) = command.clean_stores(published, 2.0, begun).values()
        assert not done.removed
        result = definitions.get_job_def("gc").execute_in_process(run_config=given, instance=instance)
        assert result.success
    assert there(published.store) == set()


def test_what_may_not_be_removed_is_named(store, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    age(store, make(store, "a"), 30)
    monkeypatch.setattr(gc, "file_lock", refuse)
    with pytest.raises(
        ArtifactError, match=rf"store {store.root} could not .*: Permission denied \(.*\.lock\)\. The user who"
    ):
        week(store)


USER = """
import random, sys, time
from pathlib import Path
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
def write(digest):
    def make(folder):
        (folder / "model.onnx").write_bytes(digest.encode() * 100)
        return Engine(digest=digest, model="m", name="e", target="cpu", runtime="onnxruntime", precision="fp32",
            status="built")
    return make
end = time.monotonic() + 3
while time.monotonic() < end:
    digest = f"{random.randrange(100):02x}" * 32
    found = store.get_or_make(Engine, digest, write(digest))
    time.sleep(random.random() / 20)
    assert (store.folder(found.record) / "model.onnx").read_bytes() == digest.encode() * 100
"""


def test_cleaning_up_beside_runs_loses_nothing_that_they_use(store, monkeypatch):
    """What nobody has used for a second goes; the others look and take within a twentieth of one."""
    monkeypatch.setattr(gc, "DAY_SECONDS", 1.0)
    command = [sys.executable, "-c", USER, str(store.root)]
    users = [subprocess.Popen(command, cwd=os.getcwd()) for _ in range(2)]
    removed = 0
    while any(user.poll() is None for user in users):
        done = collect(store, (), used_since=time.time() - 1.0)
        removed += done.removed["engine"].count if "engine" in done.removed else 0
    for user in users:
        user.wait(timeout=30)
    assert [user.returncode for user in users] == [0, 0]
    assert removed > 0
