"""What is told of a release between runs: it is of an older checkpoint, or nobody confirmed it for too long."""

from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from assets.freshness import judge
from orchestration import freshness, schedules, sensors
from orchestration.definitions import make_definitions
from resources.artifacts.records import Checkpoint
from resources.errors import ReleaseError
from resources.triton import layout
from resources.triton.release import Release
from tests.test_sensor import collect, write_catalog

RELEASE = dg.AssetKey(["triton_repository", "cpu"])
CHECKPOINT = dg.AssetKey("checkpoint")


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as found:
        yield found


@pytest.fixture
def tick(workspace, instance):
    """Evaluates the sensor as Dagster's daemon does; what it tells, by model."""
    write_catalog(workspace, {"a": "/a", "b": "/b"})
    cursor = None

    def evaluate(limit_days=1.0):
        nonlocal cursor
        context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"workspace": workspace})
        result = freshness.freshness_sensor(limit_days).evaluate_tick(context)
        cursor = result.cursor
        for event in result.asset_events:
            assert (event.asset_key, event.check_name) == (RELEASE, "up_to_date")
            assert event.severity is dg.AssetCheckSeverity.WARN
            instance.report_runless_asset_event(event)
        assert result.run_requests == []
        return {event.partition: (event.passed, event.description) for event in result.asset_events}

    return evaluate


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
    first = tick()
    assert first["a"] == (True, "what serves is of the newest checkpoint")
    assert first["b"] == (False, "b: nothing serves; optimize it: refinery optimize b")
    assert tick() == {}
    collect(workspace, "a", "/a", "r2")
    (verdict,) = tick().items()
    assert verdict[0] == "a" and not verdict[1][0]
    assert "release 1 is of revision r1, and revision r2 was collected since" in verdict[1][1]
    assert tick() == {}
    publish(workspace, "a", 2)
    assert tick() == {"a": (True, first["a"][1])}
    # A run tells its own verdict; this one is told again over it.
    confirm(instance, "a")
    assert set(tick()) == {"a"}


def test_another_revision_of_the_same_files_needs_no_release(workspace):
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
    assert judge(workspace, "a", "cpu").passed
    point("d3", "r3", "other weights")
    assert not judge(workspace, "a", "cpu").passed


def test_a_revision_that_no_run_took_is_told(workspace, instance, tick):
    collect(workspace, "a", "/a", "r1")
    publish(workspace, "a", 1)
    confirm(instance, "a")
    tags = {"dagster/partition": "a", sensors.SENSOR_TAG: sensors.SENSOR, sensors.REVISION_TAG: "r2"}
    run = dg.DagsterRun(job_name="optimize", status=dg.DagsterRunStatus.STARTED, tags=tags)
    instance.add_run(run)
    assert "a" not in tick()  # it may still take it
    instance.report_run_failed(run)
    passed, said = tick()["a"]
    assert not passed and "its source holds revision r2, and the run that was to take it did not" in said
    # The checkpoint that was collected later is of another revision still, and nobody waits for r2 any more.
    collect(workspace, "a", "/a", "r3")
    publish(workspace, "a", 2)
    confirm(instance, "a")
    assert tick()["a"][0]


def test_what_no_run_confirmed_is_told(workspace, instance, tick):
    collect(workspace, "a", "/a", "r1")
    publish(workspace, "a", 1)
    confirm(instance, "a")
    assert tick()["a"][0]
    passed, said = tick(limit_days=0.0)["a"]
    assert not passed and "no run has confirmed it since" in said and "reoptimize" in said


def test_a_repository_that_cannot_be_read_hides_no_other_model(workspace, instance, tick, monkeypatch):
    collect(workspace, "a", "/a", "r1")

    def current(repository, model):
        if model == "a":
            raise ReleaseError("no permission")
        return layout.current_release(repository, model)

    monkeypatch.setattr("assets.freshness.current_release", current)
    assert set(tick()) == {"b"}
    monkeypatch.undo()
    assert set(tick()) == {"a"}


@pytest.mark.parametrize(("days", "asked"), [(29, False), (31, True)])
def test_the_schedule_confirms_what_no_run_went_through_for_long(workspace, instance, monkeypatch, days, asked):
    monkeypatch.setenv("REFINERY_HOME", str(workspace.home))
    monkeypatch.setenv("REFINERY_CATALOG", str(workspace.catalog_path))
    write_catalog(workspace, {"a": "/a", "b": "/b"})
    confirm(instance, "a")
    same = {"differing": [], "error": "", "digest": "d", "steps": []}
    monkeypatch.setattr(schedules, "read_plans", lambda names, seconds: dict.fromkeys(names, same))
    repository = make_definitions(workspace).get_repository_def()
    when = datetime.now(UTC) + timedelta(days=days)
    context = dg.build_schedule_context(instance=instance, repository_def=repository, scheduled_execution_time=when)
    result = repository.get_schedule_def("reoptimize").evaluate_tick(context)
    # Of what Dagster never saw it cannot be said how long ago that was.
    assert [request.partition_key for request in result.run_requests or ()] == (["a"] if asked else [])
    if asked:
        assert result.run_requests[0].tags[schedules.WHY_TAG].startswith("last confirmed ")
        assert not result.run_requests[0].asset_selection
