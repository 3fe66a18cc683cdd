"""What is told of a release between runs: it is of an older checkpoint, or nobody confirmed it for too long."""

import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import dagster as dg
import pytest

from assets.freshness import REVISION_TAG, judge
from orchestration.automation import freshness, schedules
from orchestration.automation.policies import FRESH_DAYS
from orchestration.definitions import make_definitions
from resources.artifacts.records import Checkpoint
from resources.errors import ReleaseError
from resources.triton import layout
from resources.triton.release import Release
from tests.pipeline import instance as real_instance
from tests.sources import collect
from tests.test_sensor import write_catalog

RELEASE = dg.AssetKey(["triton_repository", "cpu"])
CHECKPOINT = dg.AssetKey("checkpoint")


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as found:
        found.add_dynamic_partitions("model", ["a", "b"])
        yield found


@pytest.fixture
def tick(workspace, instance):
    """Evaluates the sensor as Dagster's daemon does; the models of which the check is asked to tell."""
    write_catalog(workspace, {"a": "/a", "b": "/b", "new": "/c"})
    cursor = None

    def evaluate():
        nonlocal cursor
        repository = make_definitions(workspace).get_repository_def()
        context = dg.build_sensor_context(
            instance=instance,
            cursor=cursor,
            repository_def=repository,
            sensor_name=freshness.SENSOR,
            resources={"workspace": workspace},
        )
        result = repository.get_sensor_def(freshness.SENSOR).evaluate_tick(context)
        cursor = result.cursor
        return [request.partition_key for request in result.run_requests or ()]

    return evaluate


def verdict(workspace, instance, model="a"):
    """What a run of the check alone says."""
    job = make_definitions(workspace).resolve_job_def(freshness.JOB)
    result = job.execute_in_process(instance=instance, tags={"dagster/partition": model})
    (told,) = result.get_asset_check_evaluations()
    assert (told.asset_key, told.check_name, told.partition) == (RELEASE, "up_to_date", model)
    assert told.severity is dg.AssetCheckSeverity.WARN
    return told.passed, told.description


def publish(workspace, model, number):
    """A release of what is collected, as the repository tells of it."""
    checkpoint = workspace.store.current(Checkpoint, f"checkpoint/{model}")
    release = Release(
        number=number,
        model=model,
        task="embedding",
        target="cpu",
        flavour="python",
        engine="onnxruntime_fp32",
        engine_digest="e",
        checkpoint_digest=checkpoint.digest,
        revision=checkpoint.revision,
        output="sentence_embedding",
        width=8,
        labels=(),
        max_batch_size=8,
        max_tokens=64,
        content_digest="c",
        created="2026-11-27T00:00:00Z",
        status="published",
    )
    folder = workspace.repository("cpu") / model / str(number)
    folder.mkdir(parents=True)
    (folder / layout.MANIFEST).write_text(release.model_dump_json())
    (folder.parent / layout.CONFIG).write_text(f"version_policy {{ specific {{ versions: [{number}] }} }}")


def confirm(instance, model):
    """What a run through checkpoint and release leaves in Dagster."""
    for key in (CHECKPOINT, RELEASE):
        instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=model))


def test_a_release_that_does_not_follow_its_checkpoint_is_told_once(workspace, instance, tick):
    collect(workspace, "a", "/a", "r1")
    publish(workspace, "a", 1)
    confirm(instance, "a")
    assert tick() == ["b"]
    assert verdict(workspace, instance) == (True, "the release is made from the newest checkpoint")
    assert verdict(workspace, instance, "b") == (False, "b: nothing serves; optimize it: refinery optimize b.")
    assert tick() == []
    collect(workspace, "a", "/a", "r2")
    assert tick() == ["a"]
    passed, said = verdict(workspace, instance)
    assert not passed and "release 1 serves revision r1, and revision r2 was collected since" in said
    assert tick() == []
    # What mends itself is told too, but for runs: they tell it themselves.
    publish(workspace, "a", 2)
    assert tick() == ["a"]
    assert verdict(workspace, instance)[0]
    collect(workspace, "b", "/b", "r1")
    publish(workspace, "b", 1)
    confirm(instance, "b")
    assert tick() == []


def test_another_revision_of_the_same_files_needs_no_release(workspace, instance):
    collect(workspace, "a", "/a", "r1")
    record = workspace.store.current(Checkpoint, "checkpoint/a")

    def point(digest, revision, text):
        def make(folder):
            (folder / "model.safetensors").write_text(text)
            return record.model_copy(update={"digest": digest, "revision": revision})

        made = workspace.store.get_or_make(Checkpoint, digest, make).record
        workspace.store.point("checkpoint/a", made)

    point("d1", "r1", "weights")
    publish(workspace, "a", 1)
    point("d2", "r2", "weights")
    assert judge(instance, workspace, "a", "cpu", FRESH_DAYS).passed
    point("d3", "r3", "other weights")
    assert not judge(instance, workspace, "a", "cpu", FRESH_DAYS).passed
    # What cannot be compared any more is not taken for the same.
    point("d2", "r2", "weights")
    workspace.store.remove(workspace.store.find(Checkpoint, "d1"))
    assert not judge(instance, workspace, "a", "cpu", FRESH_DAYS).passed


def test_a_revision_that_no_run_took_is_told(workspace, instance, tick):
    collect(workspace, "a", "/a", "r1")
    publish(workspace, "a", 1)
    confirm(instance, "a")
    run = dg.DagsterRun(
        job_name="optimize",
        status=dg.DagsterRunStatus.STARTED,
        tags={"dagster/partition": "a", REVISION_TAG: "r2"},
    )
    instance.add_run(run)
    assert tick() == ["b"]  # it may still take it
    instance.report_run_failed(run)
    assert tick() == ["a"]
    passed, said = verdict(workspace, instance)
    assert not passed and "its source holds revision r2, and the run that was to take it did not" in said
    # The checkpoint that was collected later is of another revision still, and nobody waits for r2 any more.
    collect(workspace, "a", "/a", "r3")
    publish(workspace, "a", 2)
    confirm(instance, "a")
    assert verdict(workspace, instance)[0]


def test_what_no_run_confirmed_is_told(workspace, instance, tick, monkeypatch):
    collect(workspace, "a", "/a", "r1")
    publish(workspace, "a", 1)
    confirm(instance, "a")
    for days, asked in ((FRESH_DAYS + 1, ["b"]), (FRESH_DAYS + 3, ["a"])):
        monkeypatch.setattr("assets.freshness.time", SimpleNamespace(time=lambda days=days: time.time() + days * 86400))
        assert tick() == asked
    passed, said = verdict(workspace, instance)
    assert not passed and "no run has confirmed it since" in said and "reoptimize" in said


def test_a_repository_that_cannot_be_read_hides_no_other_model(workspace, instance, tick, monkeypatch):
    def current(repository, model):
        if model == "a":
            raise ReleaseError("no permission")
        return layout.current_release(repository, model)

    with monkeypatch.context() as patch:
        patch.setattr("assets.freshness.current_release", current)
        assert tick() == ["b"]
    assert tick() == ["a"]


def test_the_schedule_confirms_what_no_run_went_through_for_long(workspace, monkeypatch):
    monkeypatch.setenv("REFINERY_HOME", str(workspace.home))
    monkeypatch.setenv("REFINERY_CATALOG", str(workspace.catalog_path))
    write_catalog(workspace, {"a": "/a", "b": "/b"})
    same = {"differing": [], "error": "", "digest": "d", "steps": []}
    monkeypatch.setattr(schedules, "read_plans", lambda names, seconds: dict.fromkeys(names, same))
    repository = make_definitions(workspace).get_repository_def()
    with real_instance(workspace.home) as instance:
        confirm(instance, "a")

        def asked(days):
            when = datetime.now(UTC) + timedelta(days=days)
            context = dg.build_schedule_context(
                instance=instance,
                repository_def=repository,
                resources={"workspace": workspace},
                scheduled_execution_time=when,
            )
            return repository.get_schedule_def("reoptimize").evaluate_tick(context).run_requests

        assert asked(29) == []
        # Of what Dagster never saw it cannot be said how long ago that was.
        (request,) = asked(31)
        assert request.partition_key == "a" and not request.asset_selection
        assert request.tags[schedules.WHY_TAG].startswith("last confirmed ")
        # What fails twice waits for a person; once it was confirmed again, that is no matter any more.
        for _ in range(schedules.MOST_ATTEMPTS):
            assert len(asked(31)) == 1
            tags = {**request.tags, "dagster/partition": "a"}
            instance.add_run(dg.DagsterRun(job_name="optimize", status=dg.DagsterRunStatus.FAILURE, tags=tags))
        assert asked(32) == []
        confirm(instance, "a")
        assert len(asked(33)) == 1


def test_a_cursor_of_another_version_is_an_empty_one():
    cursor = freshness.Cursor(told={"a": freshness.Told(wrong="x", at=1.0)})
    assert freshness.Cursor.read(cursor.model_dump_json()) == cursor
    assert freshness.Cursor.read('{"told": 1}') == freshness.Cursor.read(None) == freshness.Cursor()
