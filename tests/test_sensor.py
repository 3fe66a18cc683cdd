"""The sensor: what is new is optimized once, what failed is tried again, and nobody's trouble is anybody else's."""

import json
import os
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from uuid import uuid4

import dagster as dg
import pytest

from orchestration.automation import sensors
from orchestration.automation.sensor_state import (
    LAUNCH_SECONDS,
    RETRY_SECONDS,
    Cursor,
    Memory,
    Newest,
    decide,
    is_due,
    saw,
)
from orchestration.definitions import make_definitions
from orchestration.settings import read_workspace
from resources.artifacts.records import Checkpoint, StoredFile
from resources.artifacts.store import ArtifactStore
from resources.boundary.addresses import Address
from resources.catalog.entries import ModelEntry
from resources.catalog.loading import write_entry
from resources.checkpoints.watch.probe import Seen
from resources.errors import CatalogError, CheckpointError, StorageError
from resources.settings.sources import Access
from tests.performance.ticks import run_ticks
from tests.pipeline import instance as real_instance
from tests.sources import COMMIT, collect, serving, write_checkpoint, write_weights

RUN = dg.DagsterRunStatus


class Daemon:
    """Evaluates the sensor and does with the result what Dagster's daemon does, but for starting runs."""

    def __init__(self, workspace, instance):
        self.workspace, self.instance = workspace, instance
        self.restart()
        self.cursor = None

    def restart(self):
        self.repository = make_definitions(self.workspace).get_repository_def()

    def tick(self):
        context = dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursor,
            repository_def=self.repository,
            sensor_name=sensors.SENSOR,
            resources={"workspace": self.workspace},
        )
        result = self.repository.get_sensor_def(sensors.SENSOR).evaluate_tick(context)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        for request in result.dynamic_partitions_requests:
            if isinstance(request, dg.AddDynamicPartitionsRequest):
                self.instance.add_dynamic_partitions("model", request.partition_keys)
            else:
                for name in request.partition_keys:
                    self.instance.delete_dynamic_partition("model", name)
        self.cursor = result.cursor
        self.said = result.skip_message
        return list(result.run_requests or ())

    def run_keys(self):
        return [request.run_key for request in self.tick()]

    def run(self, request, status):
        """A run as the daemon makes it of a request, which has come to that."""
        tags = {**request.tags, "dagster/run_key": request.run_key}
        run = dg.DagsterRun(job_name="optimize", run_id=str(uuid4()), status=status, tags=tags)
        self.instance.add_run(run)
        return run

    def observed(self, model):
        """What the model's partition of the asset was told, newest first."""
        records = self.instance.fetch_observations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey("checkpoint"), asset_partitions=[model]), limit=20
        ).records
        return [record.asset_observation.description for record in records]


@pytest.fixture
def daemon(workspace):
    """With an empty catalog; folders need not be still."""
    write_catalog(workspace, {})
    with dg.DagsterInstance.ephemeral() as instance:
        yield Daemon(replace(workspace, watch_seconds=0), instance)


def write_catalog(workspace, sources):
    entries = [{"name": name, "source": str(source), "task": "embedding"} for name, source in sources.items()]
    workspace.catalog_path.write_text(json.dumps({"models": entries}))


def succeed(daemon, request, source):
    collect(daemon.workspace, request.partition_key, source, request.tags[sensors.REVISION_TAG])
    return daemon.run(request, RUN.SUCCESS)


def test_the_sensor_is_on_unless_it_is_turned_off(daemon):
    sensor = daemon.repository.get_sensor_def(sensors.SENSOR)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    assert [target.job_name for target in sensor.targets] == ["optimize"]
    workspace = read_workspace({"REFINERY_WATCH_SECONDS": "90"})
    sensor = make_definitions(workspace).get_repository_def().get_sensor_def(sensors.SENSOR)
    assert sensor.minimum_interval_seconds == 90


def test_a_new_model_is_a_partition_and_optimized_in_the_same_tick(daemon, tmp_path):
    assert daemon.run_keys() == []
    folder = write_checkpoint(tmp_path / "a")
    write_catalog(daemon.workspace, {"a": folder})
    (request,) = daemon.tick()
    revision = request.tags[sensors.REVISION_TAG]
    assert daemon.instance.get_dynamic_partitions("model") == ["a"]
    assert (request.run_key, request.partition_key) == (f"a:{revision}:1", "a")
    assert request.tags["dagster/partition"] == "a"
    assert request.tags[sensors.REASON_TAG] == "new"
    assert daemon.run_keys() == []
    succeed(daemon, request, folder)
    assert daemon.run_keys() == []
    assert "1 models, nothing new" in daemon.said


def test_what_was_optimized_before_there_was_a_sensor_is_not_again(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    write_catalog(daemon.workspace, {"a": folder})
    (request,) = daemon.tick()
    succeed(daemon, request, folder)
    daemon.cursor = None
    assert daemon.run_keys() == []
    # What another source's checkpoint is called says nothing about this one's.
    moved = shutil.copytree(folder, tmp_path / "moved")
    write_catalog(daemon.workspace, {"a": moved})
    assert [request.run_key for request in daemon.tick()] == [f"a:{request.tags[sensors.REVISION_TAG]}:2"]


def test_a_new_revision_and_an_older_one_again(daemon, tmp_path):
    """Dagster remembers run keys for ever, so the older revision needs another one."""
    folder = write_checkpoint(tmp_path / "a", seed=1)
    write_catalog(daemon.workspace, {"a": folder})
    asked = []
    for seed in (1, 2, 1):
        write_weights(folder, seed)
        (request,) = daemon.tick()
        asked.append(request)
        succeed(daemon, request, folder)
    revisions = [request.tags[sensors.REVISION_TAG] for request in asked]
    assert revisions[0] == revisions[2] != revisions[1]
    assert [request.run_key for request in asked] == [f"a:{one}:{n}" for n, one in enumerate(revisions, start=1)]
    assert asked[2].tags[sensors.REASON_TAG] == f"{revisions[1]} -> {revisions[0]}"


def test_an_older_revision_again_after_the_newer_one_failed(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "a", seed=1)
    write_catalog(daemon.workspace, {"a": folder})
    (first,) = daemon.tick()
    succeed(daemon, first, folder)
    write_weights(folder, 2)
    (second,) = daemon.tick()
    collect(daemon.workspace, "a", folder, second.tags[sensors.REVISION_TAG])
    daemon.run(second, RUN.FAILURE)
    assert daemon.run_keys() == []
    revision = second.tags[sensors.REVISION_TAG]
    assert f"a: revision {revision} is not optimized yet after try 1 of 3" in daemon.said
    write_weights(folder, 1)
    (third,) = daemon.tick()
    assert third.run_key == f"a:{first.tags[sensors.REVISION_TAG]}:3"


@pytest.mark.parametrize("status", [RUN.NOT_STARTED, RUN.STARTED, RUN.CANCELING])
def test_a_model_that_is_being_optimized_is_not_submitted_twice(daemon, tmp_path, status):
    folder = write_checkpoint(tmp_path / "a")
    write_catalog(daemon.workspace, {"a": folder})
    by_hand = dg.DagsterRun(job_name="optimize", run_id=str(uuid4()), status=status, tags={"dagster/partition": "a"})
    daemon.instance.add_run(by_hand)
    assert daemon.run_keys() == []
    daemon.instance.delete_run(by_hand.run_id)
    assert len(daemon.run_keys()) == 1


def test_what_a_command_has_just_added_is_left_to_it(daemon, tmp_path):
    """Its run is there some seconds later; where it does not come, the command was killed."""
    entry = ModelEntry(name="a", source=str(write_checkpoint(tmp_path / "a")), task="embedding")
    path = write_entry(entry, daemon.workspace.additions)
    assert daemon.run_keys() == []
    before = time.time() - sensors.ADDED_SECONDS
    os.utime(path, (before, before))
    assert len(daemon.run_keys()) == 1


def test_what_fails_is_told_where_people_look_and_costs_nobody_else(daemon, tmp_path):
    good, nowhere = write_checkpoint(tmp_path / "good"), tmp_path / "nowhere"
    write_catalog(daemon.workspace, {"bad": nowhere, "good": good, "wrong": "no such: source"})
    assert [request.partition_key for request in daemon.tick()] == ["good"]
    assert daemon.tick() == []
    (told,) = daemon.observed("bad")
    assert f"the folder {nowhere} does not exist" in told
    assert "has none of the forms of a source" in daemon.observed("wrong")[0]
    assert "; 2 with a problem" in daemon.said
    write_checkpoint(nowhere)
    assert [request.partition_key for request in daemon.tick()] == ["bad"]
    assert daemon.observed("bad") == ["The problem is gone.", told]
    assert daemon.observed("good") == []


def test_a_model_that_is_taken_out_is_retired(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    write_catalog(daemon.workspace, {"a": folder, "b": write_checkpoint(tmp_path / "b", seed=1)})
    for request in daemon.tick():
        succeed(daemon, request, tmp_path / request.partition_key)
    assert daemon.run_keys() == []
    release = daemon.workspace.repository("cpu") / "a" / "config.pbtxt"
    release.parent.mkdir(parents=True)
    release.touch()
    write_catalog(daemon.workspace, {"b": tmp_path / "b"})
    assert daemon.run_keys() == []
    assert daemon.instance.get_dynamic_partitions("model") == ["b"]
    assert "a: The model left the catalog. Its releases stay and are served." in daemon.said
    assert daemon.observed("a") == ["The model left the catalog. Its releases stay and are served."]
    assert release.exists()
    write_catalog(daemon.workspace, {"a": folder, "b": tmp_path / "b"})
    assert daemon.run_keys() == []  # it is as it was
    assert set(daemon.instance.get_dynamic_partitions("model")) == {"a", "b"}
    write_catalog(daemon.workspace, {"b": tmp_path / "b"})
    daemon.tick()
    write_catalog(daemon.workspace, {"a": folder, "b": tmp_path / "b"})
    write_weights(folder, seed=9)
    assert [request.run_key[-2:] for request in daemon.tick()] == [":2"]


def test_a_catalog_that_cannot_be_read_retires_nobody(daemon, tmp_path):
    write_catalog(daemon.workspace, {"a": write_checkpoint(tmp_path / "a")})
    daemon.tick()
    before = daemon.cursor
    daemon.workspace.catalog_path.write_text("models: [")
    with pytest.raises(CatalogError, match=str(daemon.workspace.catalog_path)):
        daemon.tick()
    assert daemon.instance.get_dynamic_partitions("model") == ["a"]
    assert daemon.cursor == before


def test_a_lost_cursor_does_not_bring_back_a_run_key(daemon, tmp_path):
    write_catalog(daemon.workspace, {"a": write_checkpoint(tmp_path / "a")})
    (request,) = daemon.tick()
    daemon.run(request, RUN.FAILURE)
    for lost in (None, "of another version"):
        daemon.cursor = lost
        (again,) = daemon.tick()
        assert again.run_key != request.run_key
        daemon.run(again, RUN.FAILURE)
        request = again


def test_the_hub_is_asked_of_so_many_models_at_once_and_of_the_others_next(daemon, monkeypatch, tmp_path):
    monkeypatch.setattr(sensors, "MOST_REMOTE", 3)
    write_catalog(daemon.workspace, {f"m{number}": f"org/m{number}" for number in range(5)})
    with serving(lambda path: (503 if "m0" in path else 200, {"sha": COMMIT}, {})) as (address, asked):
        daemon.workspace = replace(daemon.workspace, access=Access(hub_endpoint=Address(address)), watch_seconds=30)
        assert len(daemon.run_keys()) == 2
        assert len(asked) == 3
        assert sorted(key.split(":")[0] for key in daemon.run_keys()) == ["m3", "m4"]  # the clock decides who is first
        assert len({path for path, _ in asked}) == 5
    assert "503" in daemon.observed("m0")[0]


def test_commits_that_nobody_is_asked_for_are_in_nobodys_way(daemon, monkeypatch):
    monkeypatch.setattr(sensors, "MOST_REMOTE", 1)
    pinned = {f"m{number}": f"org/m{number}@{COMMIT}" for number in range(3)}
    write_catalog(daemon.workspace, {**pinned, "moves": "org/m"})
    with serving(lambda path: (200, {"sha": COMMIT}, {})) as (address, _):
        daemon.workspace = replace(daemon.workspace, access=Access(hub_endpoint=Address(address)), watch_seconds=30)
        assert len(daemon.tick()) == 4


def test_files_of_what_was_optimized_are_not_looked_at(daemon, tmp_path):
    """They may be gigabytes, or on another machine; what lost one is made again by the schedule."""
    folder = write_checkpoint(tmp_path / "a")
    write_catalog(daemon.workspace, {"a": folder})
    (request,) = daemon.tick()
    succeed(daemon, request, folder)
    store = daemon.workspace.store
    record = store.current(Checkpoint, "checkpoint/a")
    lost = record.model_copy(update={"files": {"model.safetensors": StoredFile(sha256="0" * 64, size_bytes=1)}})
    (store.folder(record) / "record.json").write_text(lost.model_dump_json())
    assert daemon.run_keys() == []
    assert "nothing new" in daemon.said


def test_an_artifact_store_that_is_away_is_waited_for(daemon, tmp_path, monkeypatch):
    asked = []

    def away(*arguments):
        asked.append(arguments)
        raise StorageError("the store could not be asked")

    write_catalog(daemon.workspace, {name: write_checkpoint(tmp_path / name) for name in ("a", "b")})
    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "known", away)
        assert daemon.run_keys() == []
    assert daemon.said == "the store could not be asked"
    assert len(asked) == 1  # each may take as long as the store takes not to answer
    assert len(daemon.run_keys()) == 2


def test_what_is_stuck_is_not_in_the_way_of_what_is_new(daemon, monkeypatch):
    """Where there is no time for all."""
    monkeypatch.setattr(sensors, "TICK_SECONDS", 1.0)
    monkeypatch.setattr(sensors, "_DECIDE_SECONDS", 0.5)
    monkeypatch.setattr(sensors._Tick, "_newest", lambda *_: time.sleep(0.2))
    names = [f"m{number}" for number in range(20)]
    write_catalog(daemon.workspace, {name: f"org/{name}@{COMMIT}" for name in (*names, "new")})
    models = {
        name: Memory(source=f"org/{name}@{COMMIT}", asked=COMMIT, asked_at=time.time(), tries=3) for name in names
    }
    models["new"] = Memory(source=f"org/new@{COMMIT}", asked="before", done="before", asked_at=time.time() + 1)
    daemon.cursor = Cursor(models=models).text()
    assert [request.partition_key for request in daemon.tick()] == ["new"]


def test_a_clock_that_is_put_back_stops_nothing(daemon):
    """A cursor of the day after tomorrow."""
    later = time.time() + 2 * 86400
    with serving(lambda path: (200, {"sha": COMMIT}, {})) as (address, _):
        daemon.workspace = replace(daemon.workspace, access=Access(hub_endpoint=Address(address)), watch_seconds=30)
        write_catalog(daemon.workspace, {"a": "org/a"})
        before = Seen(stat="s", since=later, revision="before")
        memory = Memory(source="org/a", seen=before, looked=later, asked="before", asked_at=later, attempt=1)
        daemon.cursor = Cursor(models={"a": memory}).text()
        assert daemon.run_keys() == [f"a:{COMMIT}:2"]
    kept = Cursor.read(daemon.cursor).models["a"]
    assert max(kept.looked, kept.asked_at, kept.seen.since) < time.time()


def test_so_many_runs_at_once_and_the_others_next(daemon, monkeypatch):
    monkeypatch.setattr(sensors, "MOST_RUNS", 3)
    daemon.workspace = replace(daemon.workspace, watch_seconds=30)
    write_catalog(daemon.workspace, {f"m{number}": f"org/m{number}@{COMMIT}" for number in range(5)})
    assert [len(daemon.tick()) for _ in range(3)] == [3, 2, 0]


def test_on_an_instance_on_disk(workspace, tmp_path):
    """Two processes' worth of ticks: nothing but the cursor and the instance is remembered."""
    workspace = replace(workspace, watch_seconds=0)
    write_catalog(workspace, {"a": write_checkpoint(tmp_path / "a")})
    with real_instance(workspace.home) as instance:
        daemon = Daemon(workspace, instance)
        (request,) = daemon.tick()
        daemon.run(request, RUN.STARTED)
        daemon.restart()
        assert daemon.run_keys() == []
        write_weights(tmp_path / "a", seed=1)
        assert daemon.run_keys() == []
        tag = {sensors.REVISION_TAG: request.tags[sensors.REVISION_TAG]}
        assert len(instance.get_runs(dg.RunsFilter(tags=tag))) == 1


def test_a_large_catalog_takes_one_short_tick(tmp_path):
    """tests/performance/ticks.py, smaller: its figures are in docs/measurements.md."""
    first, second = run_ticks(tmp_path, models=40, new=5, few=1)
    assert (first.runs, second.runs) == (5, 0)
    assert first.seconds < 10
    assert first.peak_bytes < 200e6


# Deciding

NOW = 1_000_000.0


def memory(**changes):
    seen = Seen(stat="s", since=NOW, revision=changes.pop("revision", "B"))
    return Memory(source="x", **{"seen": seen, "asked": "B", "asked_at": NOW - 60, "tries": 1, "attempt": 4, **changes})


def newest(ended="failure", ago=50.0):
    return Newest(run_id="run", ended=ended, created=NOW - ago, at=NOW - ago)


@pytest.mark.parametrize(
    ("what", "last", "collected", "reason"),
    [
        (memory(asked="A", done="A"), newest("success"), "A", "A -> B"),
        (memory(asked="A", done="A"), newest("success"), "B", ""),  # by hand, in the meantime
        (memory(asked="", tries=0), None, "", "new"),
        (memory(asked="", tries=0), newest("failure"), "A", "A -> B"),
        (memory(asked="", tries=0), newest("success"), "B", ""),
        (memory(asked="", tries=0), newest("failure"), "B", "B -> B"),
        (memory(revision="", asked="", tries=0), None, "", ""),
        (memory(error="away"), newest("failure", 9999), "", ""),
        (memory(done="B"), newest("failure"), "", ""),
        # Nothing was started yet; nothing ever was.
        (memory(), newest("failure", 100), "A", ""),
        (memory(asked_at=NOW - LAUNCH_SECONDS - 1), newest("failure", LAUNCH_SECONDS + 99), "A", "try 2 of 3"),
        # It failed.
        (memory(), newest("failure"), "B", ""),
        (memory(asked_at=NOW - 9999), newest("failure", RETRY_SECONDS[0] - 1), "B", ""),
        (memory(asked_at=NOW - 9999), newest("failure", RETRY_SECONDS[0] + 1), "B", "try 2 of 3"),
        (memory(asked_at=NOW - 9999, tries=2), newest("failure", RETRY_SECONDS[1] - 1), "B", ""),
        (memory(asked_at=NOW - 9999, tries=2), newest("failure", RETRY_SECONDS[1] + 1), "B", "try 3 of 3"),
        (memory(asked_at=NOW - 9999, tries=3), newest("failure", 9000), "B", ""),
        (memory(asked_at=NOW - 9999), newest("failure", -9000), "B", "try 2 of 3"),  # the clock was put back since
        # Somebody ended it.
        (memory(asked_at=NOW - 9999), newest("canceled", 9000), "B", ""),
        # It went well, with what the source held by then.
        (memory(asked_at=NOW - 9999), newest("success", 9000), "C", "try 2 of 3"),
    ],
)
def test_when_a_run_is_wanted(what, last, collected, reason):
    decision = decide(what, last, collected, NOW)
    assert decision.reason == reason
    if reason:
        assert (decision.memory.asked, decision.memory.asked_at, decision.memory.attempt) == ("B", NOW, 5)


def test_what_was_tried_often_enough_is_said_until_it_changes():
    stuck = decide(memory(asked_at=NOW - 9999, tries=3), newest("failure", 9000), "B", NOW).memory
    assert "3 runs did not optimize revision B; the last was run." in stuck.stuck
    mended = decide(stuck, newest("success"), "B", NOW).memory
    assert (mended.stuck, mended.done) == ("", "B")
    changed = stuck.model_copy(update={"seen": Seen(stat="t", since=NOW, revision="C")})
    assert decide(changed, newest("failure", 9000), "B", NOW).memory.stuck == ""


def test_a_source_that_fails_is_asked_less_and_less():
    failing, asked, now = Memory(source="x"), [], 0.0
    while now < 3600:
        if is_due(failing, now, interval_s=30):
            failing = saw(failing, CheckpointError("away"), now)
            asked.append(now)
        now += 30
    pauses = [after - before for before, after in pairwise(asked)]
    assert pauses[0] == 30
    assert pauses[-1] == 600
    assert pauses == sorted(pauses)
    assert is_due(saw(failing, Seen(stat="s", since=now, revision="A"), now), now, interval_s=30)


def test_the_cursor_is_read_as_it_was_written():
    cursor = Cursor(models={"a": memory(stuck="x", problem="x")})
    assert Cursor.read(cursor.text()) == cursor
    assert Cursor.read("{") == Cursor.read(None) == Cursor()
