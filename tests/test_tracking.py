"""MLflow, on a real sqlite store: a parent an optimization, a child a candidate, and nothing for nothing new."""

import contextlib
import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from assets.materialization import closing_tracking
from orchestration.settings import tracker_of
from resources.artifacts.records import Champion, Checkpoint, Engine, LengthProfile, LoadLevel, ServingReport
from resources.benchmark.ranking import judge
from resources.checkpoints.sources.registry import find_version
from resources.errors import CheckpointError, NoChampionError, TrackingError
from resources.machine.usage import Usage, UsageSample
from resources.report.optimization import Gate, OptimizationReport
from resources.settings.workspace import Workspace
from resources.tracking import RunLink, Tracker
from resources.tracking.store import TrackingStore
from resources.tracking.system_metrics import system_metrics
from tests.pipeline import empty_tracking_store
from tests.test_choosing import no_gates, report


@pytest.fixture
def tracker(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(empty_tracking_store())
    return fresh(tmp_path)


def fresh(tmp_path):
    """The same store, as another process sees it."""
    return Tracker(
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        ui="http://127.0.0.1:5000",
        folder=tmp_path / "tracking",
        dagster_ui="http://dagster:3000/",
    )


CHECKPOINT = Checkpoint(
    digest="c",
    model="m",
    source="/models/m",
    revision="abcdef",
    task="embedding",
    architecture="BertModel",
    weights_digest="w",
    tokenizer_digest="t",
    labels_digest="l",
    pipeline_digest="p",
    output="sentence_embedding",
    settings={},
    weights_bytes=1000,
    model_type="bert",
    max_tokens=128,
)


def engine(name, **fields):
    return Engine(
        digest=name,
        model="m",
        name=name,
        target="cpu",
        runtime="onnxruntime",
        precision="fp32",
        status="built",
        parameters={"fusion": "all"},
        **fields,
    )


def champion_of(reports):
    verdicts = judge(reports, no_gates, "p50", 100)
    return Champion(
        digest=f"champion-{verdicts[0].engine}",
        model="m",
        target="cpu",
        engine=verdicts[0].engine,
        engine_digest=verdicts[0].engine,
        evaluation_digest="evaluation",
        objective="p50",
        score=verdicts[0].score or 0.0,
        reason="the fastest",
        verdicts=verdicts,
    )


def optimization(run, reports, champion=None, **fields):
    """What the champion's step gives to MLflow."""
    known = {
        "model": "m",
        "target": "cpu",
        "source": CHECKPOINT.source,
        "revision": CHECKPOINT.revision,
        "task": "embedding",
        "device": "a processor",
        "evaluation_items": 320,
        "libraries": {"torch": "2.13.0"},
        "configuration": {"threads": "2"},
        "objective": "p50",
        "gates": (Gate(name="cosine_mean", bound="least", limit=0.995),),
        "champion": champion or champion_of(reports),
        "reports": tuple(reports),
        "dagster_run": run,
    }
    return OptimizationReport(**{**known, **fields})


def write_all(tracker, run, reports, checkpoint=CHECKPOINT, **fields):
    for item in reports:
        tracker.candidate(run, checkpoint, engine(item.engine), item, [])
    return tracker.champion(run, optimization(run, reports, revision=checkpoint.revision, **fields), {})


def runs_of(client):
    """All runs of the model, by name."""
    return {run.info.run_name: run for run in client.search_runs([first_experiment(client)])}


def test_one_optimization_is_a_parent_with_children(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("onnxruntime_fp32", 2.0), report("gpu", status="skipped", reason="no GPU")]
    parent = write_all(tracker, "run-1", reports)
    tracker.release(CHECKPOINT, champion_of(reports), 6)
    tracker.release(CHECKPOINT, champion_of(reports), 7)  # the same engine, served in another way

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = runs_of(client)
    child = runs["onnxruntime_fp32 @ abcdef (cpu)"]
    # Two candidates and the parent: an engine that could not be built has nothing to compare.
    assert len(runs) == 3
    assert child.data.tags["mlflow.parentRunId"] == parent.run_id
    assert child.data.params["fusion"] == "all"
    assert child.data.metrics["speedup.1x16"] == pytest.approx(2.0)
    assert child.data.metrics["p50_ms.1x16"] == pytest.approx(10.0)
    assert child.data.tags["refinery.dagster_run"] == "run-1"
    closed = client.get_run(parent.run_id)
    assert closed.info.status == "FINISHED"
    assert closed.data.params["revision"] == "abcdef"
    assert closed.data.tags["refinery.allow_pickle"] == "false"
    assert closed.data.tags["refinery.champion"] == "onnxruntime_fp32"
    names = {item.path for item in client.list_artifacts(parent.run_id)}
    assert {"candidates.md", "latency.png", "verdicts.json", "report.html"} <= names
    version = client.get_model_version_by_alias("m", "champion-cpu")
    assert version.tags["refinery.release"] == "7"
    assert closed.data.tags["refinery.release"] == "7"
    runs = tracker.release_runs(version.name, "cpu")
    assert {number: link.run_id for number, link in runs.items()} == {6: version.run_id, 7: version.run_id}
    assert version.run_id == child.info.run_id
    assert parent.url == f"http://127.0.0.1:5000/#/experiments/{closed.info.experiment_id}/runs/{parent.run_id}"


def test_what_was_left_in_higher_precision_and_the_lengths_are_in_the_runs(tracker, tmp_path):
    from mlflow import MlflowClient

    lengths = LengthProfile(
        requests=4,
        counts=((12, 3), (40, 1)),
        buckets=(16, 128),
        padding=0.57,
        padding_of_standard_buckets=0.4,
        padding_of_one_length=0.8,
    )
    sampled = CHECKPOINT.model_copy(update={"lengths": lengths})
    steps = (
        "everything in low precision: neighbours 0.9 is below 0.96",
        "layer.0 in higher precision: every gate is kept",
    )
    child = tracker.candidate("run-1", sampled, engine("int8", kept=("layer.0",), steps=steps), report("int8", 2.0), [])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(child.run_id).data.params["kept_in_higher_precision"] == "layer.0"
    assert mlflow_json(client, child.run_id, "precision.json") == {"kept": ["layer.0"], "tried": list(steps)}
    parent = client.get_run(client.get_run(child.run_id).data.tags["mlflow.parentRunId"])
    assert parent.data.metrics["padding_share"] == pytest.approx(0.57)
    assert parent.data.metrics["tokens_p50"] == 12
    assert parent.data.metrics["tokens_p95"] == 40
    assert mlflow_json(client, parent.info.run_id, "lengths.json")["counts"] == [[12, 3], [40, 1]]
    picture = artifact(client, parent.info.run_id, "lengths.png")
    assert picture.startswith(b"\x89PNG")


def artifact(client, run, name):
    return Path(client.download_artifacts(run, name)).read_bytes()


def mlflow_json(client, run, name):
    return json.loads(artifact(client, run, name))


def test_an_unchanged_optimization_writes_nothing_and_keeps_its_links(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("onnxruntime_fp32", 2.0)]
    first = write_all(tracker, "run-1", reports)
    assert write_all(fresh(tmp_path), "run-2", reports) == first
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert len(client.search_runs([first_experiment(client)])) == 3


def first_experiment(client):
    return client.get_experiment_by_name("m").experiment_id


def test_one_new_candidate_makes_a_new_parent_and_the_next_version(tracker, tmp_path):
    from mlflow import MlflowClient

    write_all(tracker, "run-1", [report("torch", 1.0), report("onnxruntime_fp32", 2.0)])
    again = [report("torch", 1.0), report("onnxruntime_fp32", 2.0), report("onnxruntime_int8", 3.0)]
    other = fresh(tmp_path)
    for item in again:
        other.candidate("run-2", CHECKPOINT, engine(item.engine), item, [])
    champion = champion_of(again).model_copy(update={"digest": "another"})
    other.champion("run-2", optimization("run-2", again, champion), {})
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    parents = client.search_runs([first_experiment(client)], "tags.`refinery.parent` = 'true'")
    assert len(parents) == 2
    assert client.get_model_version_by_alias("m", "champion-cpu").version in (2, "2")


def test_a_run_without_a_champion_is_closed_as_failed(tracker, tmp_path):
    from mlflow import MlflowClient

    tracker.candidate("run-1", CHECKPOINT, engine("torch"), report("torch", 1.0), ["NaN"])
    tracker.abandon("run-1", "m", "no engine is accurate enough")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (parent,) = client.search_runs([first_experiment(client)], "tags.`refinery.parent` = 'true'")
    assert parent.info.status == "FAILED"
    assert "accurate enough" in parent.data.tags["mlflow.note.content"]


def test_a_tracking_server_takes_the_champions_address(tracker, tmp_path):
    """The check of MLflow's server, which one without a server never makes."""
    from mlflow import MlflowClient
    from mlflow.server.handlers import _validate_source_run

    write_all(tracker, "run-1", [report("torch", 1.0), report("onnxruntime_fp32", 2.0)])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    version = client.get_model_version_by_alias("m", "champion-cpu")
    _validate_source_run(version.source, version.run_id)


def test_links_of_another_store_do_not_count(tracker, tmp_path):
    write_all(tracker, "run-1", [report("torch", 1.0), report("onnxruntime_fp32", 2.0)])
    moved = Tracker(f"sqlite:///{tmp_path / 'other.db'}", ui="", folder=tmp_path / "tracking")
    link = moved.candidate("run-2", CHECKPOINT, engine("torch"), report("torch", 1.0), [])
    kept = json.loads((tmp_path / "tracking" / "links" / "candidate-digest of torch.json").read_text())
    assert link is not None
    assert kept["store"].endswith("other.db")


def test_a_store_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database")
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", ui="", folder=tmp_path / "tracking")
    with pytest.raises(TrackingError, match=r"mlflow\.db cannot be written.*REFINERY_MLFLOW_URI"):
        tracker.prepare()


def test_an_error_of_the_database_is_one_line(tracker, tmp_path, capfd):
    store = tracker._store
    experiment = store.experiment("m")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("DROP TABLE runs")
    with (
        pytest.raises(TrackingError, match=r"mlflow\.db cannot be written: .*no such table: runs"),
        store.clear_errors(),
    ):
        store.client.search_runs([experiment])
    assert "Traceback" not in capfd.readouterr().err


def test_a_database_whose_driver_is_missing_is_said(tmp_path):
    address = "postgresql+pg8000://user:canary@127.0.0.1:9/mlflow"
    tracker = Tracker(address, ui=None, folder=tmp_path)
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9.*No module named 'pg8000'. Install the driver") as caught:
        tracker.prepare()
    assert "canary" not in str(caught.value)


def test_a_candidate_that_failed_and_was_then_measured_is_written_anew(tracker, tmp_path):
    from mlflow import MlflowClient

    baseline = report("torch", 1.0)
    write_all(
        tracker, "run-1", [baseline, report("onnxruntime_fp32", 2.0), report("int8", status="failed", reason="killed")]
    )
    reports = [baseline, report("onnxruntime_fp32", 2.0), report("int8", 3.0)]
    assert reports[2].digest == report("int8", status="failed").digest
    write_all(tracker, "run-2", reports)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    version = client.get_model_version_by_alias("m", "champion-cpu")
    run = client.get_run(version.run_id)
    assert (run.data.tags["refinery.engine_name"], run.info.status) == ("int8", "FINISHED")
    assert run.data.metrics["speedup.1x16"] == pytest.approx(3.0)


def test_a_champion_by_another_gate_takes_the_alias_and_gives_it_back(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("onnxruntime_fp32", 2.0), report("int8", 3.0)]
    fast = champion_of(reports)
    exact = fast.model_copy(
        update={"digest": "stricter", "engine": "onnxruntime_fp32", "engine_digest": "onnxruntime_fp32"}
    )
    write_all(tracker, "run-1", reports)

    def alias():
        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        return client.get_model_version_by_alias("m", "champion-cpu").tags["refinery.engine_name"]

    # Nothing was measured anew: there is no parent in these runs.
    for run, champion in (("run-2", exact), ("run-3", fast), ("run-4", exact)):
        link = fresh(tmp_path).champion(run, optimization(run, reports, champion), {})
        assert link is not None
        assert alias() == champion.engine


LATER = CHECKPOINT.model_copy(update={"digest": "later", "revision": "0123456789abcdef"})


def measured_again(reports, speedup):
    """The same engines, of another revision: none of it is in MLflow yet."""
    return [
        report(one.engine, 1.0 if one.engine == "torch" else speedup).model_copy(
            update={"digest": f"{one.digest}, later"}
        )
        for one in reports
    ]


def test_runs_of_a_model_line_up_by_revision_and_engine(tracker, tmp_path):
    """In MLflow's table by name, in its comparison by the parameters that differ, and by nothing else."""
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("int8", 2.0)]
    write_all(tracker, "run-1", reports)
    write_all(tracker, "run-2", measured_again(reports, 3.0), LATER)
    fused = engine("fused").model_copy(update={"parameters": {"fused_gelu": "6", "fused_attention": "5", "knob": "on"}})
    tracker.candidate("run-2", LATER, fused, report("fused", 2.0), [])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = runs_of(client)
    assert sorted(runs) == [
        "fused @ 0123456789ab (cpu)",
        "int8 @ 0123456789ab (cpu)",
        "int8 @ abcdef (cpu)",
        "optimization @ 0123456789ab (cpu)",
        "optimization @ abcdef (cpu)",
        "torch @ 0123456789ab (cpu)",
        "torch @ abcdef (cpu)",
    ]
    old, new = runs["int8 @ abcdef (cpu)"].data, runs["int8 @ 0123456789ab (cpu)"].data
    assert {name for name in {**old.params, **new.params} if old.params.get(name) != new.params.get(name)} == {
        "revision"
    }
    assert old.metrics.keys() == new.metrics.keys()
    assert not [name for name in new.metrics if "/" in name]
    described = runs["fused @ 0123456789ab (cpu)"].data
    assert described.params["knob"] == "on"
    assert not [name for name in described.params if name.startswith("fused_")]
    assert described.tags["refinery.fused"] == "attention 5, gelu 6"
    # Each library is a column of its own.
    assert described.tags["refinery.version.torch"].startswith("2.")


def test_a_parents_report_says_what_changed_and_learns_what_is_served(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("int8", 2.0)]
    first = write_all(tracker, "run-1", reports)
    again = measured_again(reports, 3.0)
    champion = champion_of(again).model_copy(update={"digest": "of the later one"})
    second = write_all(tracker, "run-2", again, LATER, champion=champion)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert mlflow_json(client, first.run_id, "report.json")["before"] is None
    told = mlflow_json(client, second.run_id, "report.json")
    assert told["before"]["run_id"] == first.run_id
    assert told["before"]["changes"]["inputs"] == [["revision", "abcdef", "0123456789abcdef"]]
    assert ["int8", "2.00", "3.00"] in [row[:3] for row in told["before"]["changes"]["candidates"]]
    latency = artifact(client, second.run_id, "latency.png")
    assert tracker.report(champion).url == f"{second.url}/artifacts/report.html"

    level = LoadLevel(
        clients=4,
        tool="tritonclient",
        requests=100,
        throughput_per_s=321.5,
        p50_ms=10.0,
        p99_ms=20.0,
        mean_batch=2.0,
        batches_per_request=0.5,
    )
    load = ServingReport(
        digest="l", model="m", target="cpu", release=9, engine="int8", status="measured", levels=(level,)
    )
    tracker.release(LATER, champion, 9)
    child = tracker.load("run-2", champion, load)
    assert client.get_run(child.run_id).data.tags["refinery.revision"] == LATER.revision
    page = artifact(client, second.run_id, "report.html").decode()
    assert "as release 9" in page
    assert "321.5" in page
    assert artifact(client, second.run_id, "load.png").startswith(b"\x89PNG")
    # What was drawn is there still, and was not drawn again.
    assert artifact(client, second.run_id, "latency.png") == latency
    assert page.count("data:image/png;base64,") == 2  # latency and load; these reports have no accuracy to draw
    version = tracker.released(champion, 9)
    assert version.url == "http://127.0.0.1:5000/#/models/m/versions/2"
    assert "Triton release 9." in client.get_model_version("m", "2").description


def test_a_report_that_this_version_cannot_read_is_said(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("int8", 2.0)]
    first = write_all(tracker, "run-1", reports)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.log_dict(first.run_id, {"of": "another version"}, "report.json")
    second = write_all(tracker, "run-2", measured_again(reports, 3.0), LATER)
    assert mlflow_json(client, second.run_id, "report.json")["before"] == {
        "run_id": first.run_id,
        "url": first.url,
        "changes": None,
    }
    tracker.release(CHECKPOINT, champion_of(reports), 1)  # it stays as it is
    assert mlflow_json(client, first.run_id, "report.json") == {"of": "another version"}


def test_mlflow_and_dagster_lead_to_each_other(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("int8", 2.0)]
    run = "0a1b2c3d-4e5f"
    parent = write_all(tracker, run, reports)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    page = f"http://dagster:3000/runs/{run}"
    for one in runs_of(client).values():
        assert one.data.tags["refinery.dagster_run"] == run
        assert one.data.tags["refinery.dagster_url"] == page
        assert f"Dagster run [0a1b2c3d]({page})" in one.data.tags["mlflow.note.content"]
    version = client.get_model_version_by_alias("m", "champion-cpu")
    assert version.tags["refinery.dagster_url"] == page
    assert f"Dagster run [0a1b2c3d]({page})" in version.description
    note = client.get_run(parent.run_id).data.tags["mlflow.note.content"]
    assert f"[Report]({parent.url}/artifacts/report.html)" in note
    assert "[registered as version 1 of m](http://127.0.0.1:5000/#/models/m/versions/1)" in note
    # Without an address of Dagster's pages, its id.
    other = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", ui="", folder=tmp_path / "elsewhere")
    child = client.get_run(other.candidate("run-2", CHECKPOINT, engine("fp16"), report("fp16", 2.0), []).run_id)
    assert "refinery.dagster_url" not in child.data.tags
    assert child.data.tags["mlflow.note.content"].endswith("Dagster run run-2")


def test_each_target_has_a_parent_of_its_own(tracker, tmp_path):
    """With its own champion, report and history; a step of one that fails closes that one."""
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("int8", 2.0)]
    cpu = write_all(tracker, "run-1", reports)
    there = [
        one.model_copy(update={"target": "cuda_sm90", "digest": f"{one.digest} there"})
        for one in (report("torch", 1.0), report("onnxruntime_fp16", 5.0))
    ]
    for item in there:
        tracker.candidate("run-1", CHECKPOINT, engine(item.engine), item, [])
    champion = champion_of(there).model_copy(update={"target": "cuda_sm90"})
    gpu = tracker.champion("run-1", optimization("run-1", there, champion, target="cuda_sm90"), {})
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert gpu.run_id != cpu.run_id
    assert mlflow_json(client, gpu.run_id, "report.json")["before"] is None
    tracker.abandon("run-1", "m", "no server proves it", "cuda_sm90")
    assert [client.get_run(one.run_id).info.status for one in (cpu, gpu)] == ["FINISHED", "FAILED"]
    # Nor does the run's end as a whole say anything of a target that has its champion.
    tracker.abandon("run-1", "m", "a step of cuda_sm90 failed")
    assert client.get_run(cpu.run_id).info.status == "FINISHED"
    assert "no server proves it" in client.get_run(gpu.run_id).data.tags["mlflow.note.content"]


def store_client(tmp_path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


REPORTS = [report("torch", 1.0), report("int8", 2.0)]


def test_what_could_not_be_released_is_as_good_as_any_once_it_was(tracker, tmp_path):
    parent = write_all(tracker, "run-1", REPORTS)
    tracker.abandon("run-1", "m", "no server proves it", "cpu")
    client = store_client(tmp_path)
    assert client.get_run(parent.run_id).info.status == "FAILED"
    assert write_all(fresh(tmp_path), "run-2", REPORTS) == parent
    run = client.get_run(parent.run_id)
    assert run.info.status == "FINISHED"
    assert "no server" not in run.data.tags["mlflow.note.content"]
    # It is the one that the next is compared with; and a step of the repeated run that fails is its failure again.
    champion = champion_of(REPORTS).model_copy(update={"digest": "later"})
    later = write_all(tracker, "run-3", measured_again(REPORTS, 3.0), LATER, champion=champion)
    assert mlflow_json(client, later.run_id, "report.json")["before"]["run_id"] == parent.run_id
    tracker.abandon("run-2", "m", "and again", "cpu")
    assert client.get_run(parent.run_id).info.status == "FAILED"


def test_a_run_that_ended_before_it_chose_is_taken_over_by_the_next(tracker, tmp_path):
    """All is measured; the next run measures nothing, and has a parent with a report all the same."""
    for item in REPORTS:
        tracker.candidate("run-1", CHECKPOINT, engine(item.engine), item, [])
    client = store_client(tmp_path)
    experiment = first_experiment(client)
    (begun,) = client.search_runs([experiment], "tags.`refinery.parent` = 'true'")
    half = client.create_run(experiment, tags={"mlflow.parentRunId": begun.info.run_id})
    tracker.abandon("run-1", "m", "killed")
    assert client.get_run(begun.info.run_id).info.status == "FAILED"
    assert client.get_run(half.info.run_id).info.status == "KILLED"
    parent = write_all(fresh(tmp_path), "run-2", REPORTS)
    assert parent.run_id == begun.info.run_id
    run = client.get_run(parent.run_id)
    assert (run.info.status, run.data.tags["refinery.dagster_run"]) == ("FINISHED", "run-2")
    assert artifact(client, parent.run_id, "report.html")


@pytest.mark.parametrize("what", ["runs", "experiment"])
def test_what_a_person_deleted_in_mlflow_stops_no_run(tracker, tmp_path, what):
    first = write_all(tracker, "run-1", REPORTS)
    tracker.abandon("run-1", "m", "no server proves it", "cpu")
    client = store_client(tmp_path)
    experiment = first_experiment(client)
    if what == "runs":
        for run in client.search_runs([experiment]):
            client.delete_run(run.info.run_id)
    else:
        client.delete_experiment(experiment)
    other = fresh(tmp_path)
    reports = [*REPORTS, report("fp16", 3.0)]
    champion = champion_of(reports).model_copy(update={"digest": "another"})
    parent = write_all(other, "run-2", reports, champion=champion)
    assert parent.run_id != first.run_id
    other.release(CHECKPOINT, champion, 2)
    version = client.get_model_version_by_alias("m", "champion-cpu")
    assert client.get_run(version.run_id).info.lifecycle_stage == "active"
    assert set(other.release_runs("m", "cpu")) == {2}
    # And where the winner's own run is gone, its release is published all the same.
    client.delete_run(version.run_id)
    other.release(CHECKPOINT, champion, 3)
    assert other.release_runs("m", "cpu") == {}
    assert write_all(fresh(tmp_path), "run-3", reports, champion=champion) == parent


def test_links_to_a_store_that_was_removed_do_not_count(tmp_path, monkeypatch):
    """Neither before it is made again nor after. (One process would go on writing to the removed file.)"""
    path = tmp_path / "mlflow.db"
    made = SimpleNamespace(search_experiments=lambda max_results: path.touch())
    monkeypatch.setattr("mlflow.MlflowClient", lambda uri: made)
    store = TrackingStore(f"sqlite:///{path}", ui="", folder=tmp_path)
    store.remember("name", RunLink("r", "/r"))
    assert store.recall("name") is None
    assert store.client is made
    assert store.recall("name") is None
    store.remember("name", RunLink("r", "/r"))
    again = TrackingStore(f"sqlite:///{path}", ui="", folder=tmp_path)
    assert again.client is made
    assert again.recall("name") is not None


def elsewhere(tmp_path):
    """The same store, as another machine sees it: it remembers nothing."""
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", ui="http://127.0.0.1:5000", folder=tmp_path / "elsewhere")


def test_an_unchanged_optimization_writes_nothing_on_another_machine_either(tracker, tmp_path):
    parent = write_all(tracker, "run-1", REPORTS)
    failed = report("int8", status="failed", reason="killed")  # of the same digest as what was measured
    tracker.candidate("run-0", CHECKPOINT, engine("int8"), failed, [])
    client = store_client(tmp_path)
    before = {run.info.run_id for run in client.search_runs([first_experiment(client)])}
    other = elsewhere(tmp_path)
    write_all(other, "run-2", REPORTS)
    found = other.candidate("run-2", CHECKPOINT, engine("int8"), REPORTS[1], [])
    assert client.get_run(found.run_id).info.status == "FINISHED"
    assert {run.info.run_id for run in client.search_runs([first_experiment(client)])} == before
    # What is served is in the report, whoever published it.
    other.release(CHECKPOINT, champion_of(REPORTS), 4)
    assert mlflow_json(client, parent.run_id, "report.json")["release"] == 4


def test_two_machines_that_begin_at_once_have_one_parent(tracker, tmp_path, monkeypatch):
    other = elsewhere(tmp_path)
    tracker.candidate("run-1", CHECKPOINT, engine("torch"), REPORTS[0], [])
    with monkeypatch.context() as blind:
        blind.setattr(other, "_find_parent", lambda *about: None)
        other.candidate("run-1", CHECKPOINT, engine("int8"), REPORTS[1], [])
    parent = tracker.champion("run-1", optimization("run-1", REPORTS), {})
    client = store_client(tmp_path)
    runs = client.search_runs([first_experiment(client)])
    assert [run.info.run_id for run in runs if "refinery.parent" in run.data.tags] == [parent.run_id]
    assert [run.data.tags["mlflow.parentRunId"] for run in runs if "refinery.parent" not in run.data.tags] == [
        parent.run_id
    ] * 2


def test_two_targets_may_make_experiment_and_model_at_once(tracker, tmp_path, monkeypatch):
    write_all(tracker, "run-1", REPORTS)
    late = fresh(tmp_path)
    client = late._store.client
    answers = [None, client.get_experiment_by_name("m")]
    monkeypatch.setattr(client, "get_experiment_by_name", lambda name: answers.pop(0))
    assert late._store.experiment("m") == first_experiment(store_client(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(client, "search_registered_models", lambda query: [])
    champion = champion_of(REPORTS).model_copy(update={"target": "cuda_sm90", "digest": "there"})
    late.champion("run-2", optimization("run-2", REPORTS, champion, target="cuda_sm90"), {})
    assert client.get_model_version_by_alias("m", "champion-cuda_sm90")


def test_a_password_is_in_no_message_and_no_file(tmp_path):
    from mlflow.exceptions import MlflowException

    store = TrackingStore("postgresql://refinery:secret@db:5432/mlflow", ui="", folder=tmp_path)
    store.remember("name", RunLink("r", "/r"))
    assert store.recall("name") is not None
    with pytest.raises(TrackingError, match="postgresql://db:5432/mlflow") as raised, store.clear_errors():
        raise MlflowException("no answer")
    assert "secret" not in str(raised.value) + (tmp_path / "links" / "name.json").read_text()


def test_mlflow_that_does_not_answer_does_not_hide_why_a_step_failed():
    class Gone:
        def abandon(self, *about):
            raise TrackingError("MLflow cannot be written")

    @closing_tracking
    def step(context, tracker):
        raise NoChampionError("no engine is accurate enough")

    context = SimpleNamespace(
        asset_key=dg.AssetKey(["champion", "cpu"]), run=SimpleNamespace(run_id="r"), partition_key="m"
    )
    with pytest.raises(NoChampionError):
        step(context, tracker=Gone())


def seen(node, *times, **values):
    return Usage(node=node, samples=tuple(UsageSample(time_s=time, values=values) for time in times))


def test_what_was_seen_of_the_machine_is_in_the_system_metrics(tracker, tmp_path):
    """Of an engine's build in its candidate's run; in the parent of all that was built in this Dagster run."""
    from mlflow import MlflowClient

    built = seen("here", 30.0, 35.0, cpu_utilization_percentage=80.0)
    child = tracker.candidate(
        "run-1", CHECKPOINT, engine("int8").model_copy(update={"usage": built}), report("int8", 2.0), []
    )
    reports = [report("torch", 1.0), report("int8", 2.0)]
    graph = seen("here", 10.0, 15.0, cpu_utilization_percentage=50.0, gpu_0_utilization_percentage=7.0)
    parent = tracker.champion("run-1", optimization("run-1", reports), {}, [graph, None, built], 12.0)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def history(run, name):
        found = client.get_metric_history(run, name)
        return sorted((item.step, item.timestamp, item.value) for item in found)

    processor = "system/cpu_utilization_percentage"
    assert history(child.run_id, processor) == [(0, 30_000, 80.0), (1, 35_000, 80.0)]
    assert history(parent.run_id, processor) == [(0, 15_000, 50.0), (1, 30_000, 80.0), (2, 35_000, 80.0)]
    assert history(parent.run_id, "system/gpu_0_utilization_percentage") == [(0, 15_000, 7.0)]


def test_several_machines_are_told_apart():
    names = {item.key for item in system_metrics([seen("a", 1.0, cpu=1.0), None, seen("b", 2.0, cpu=2.0)])}
    assert names == {"system/a/cpu", "system/b/cpu"}
    assert {item.key for item in system_metrics([seen("a", 1.0, cpu=1.0), seen("b", 2.0, cpu=2.0)], 1.5)} == {
        "system/cpu"
    }


# Registered models of others


CHECKPOINT_ADDRESS = "file:///logged/model"


def registered(client, name, count=1):
    """A registered model of a user's, with versions that are checkpoints."""
    client.create_registered_model(name, description="Checkpoints of ours.")
    for _ in range(count):
        client.create_model_version(name, source=CHECKPOINT_ADDRESS)


def choose(tracker, run, reports):
    """Another champion."""
    champion = champion_of(reports).model_copy(update={"digest": f"champion of {run}"})
    write_all(tracker, run, reports, champion=champion)


def everything_in(client, name):
    """All that a registered model holds."""
    model = client.get_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    return (
        (model.description, model.tags, model.aliases),
        sorted((one.version, one.source, one.description, str(one.tags), str(one.aliases)) for one in versions),
    )


def test_a_champion_never_becomes_a_version_of_its_own_source(tmp_path):
    """The name of an entry is by default the one that its source has in the registry."""
    (tmp_path / "mlflow.db").write_bytes(empty_tracking_store())
    (tmp_path / "models.yaml").write_text("models:\n- {name: m, source: models:/m/latest, task: embedding}\n")
    workspace = Workspace(tmp_path, tmp_path / "models.yaml")
    tracker, client = tracker_of(workspace), store_client(tmp_path)
    registered(client, "m", 2)
    before, reports = everything_in(client, "m"), [report("torch", 1.0), report("int8", 2.0)]
    chosen = write_all(tracker, "run-1", reports)
    tracker.release(CHECKPOINT, champion_of(reports), 4)
    assert everything_in(client, "m") == before
    assert find_version("models:/m/latest", workspace.sources).number == "2"
    # All that leads to the version leads to the other registered model.
    version = client.get_model_version_by_alias("m+engines", "champion-cpu")
    assert version.tags["refinery.release"] == "4"
    assert tracker.champion_release("m", "cpu") == 4
    assert tracker.release_runs("m", "cpu")[4].run_id == version.run_id
    tags = client.get_run(chosen.run_id).data.tags
    assert (tags["refinery.registered_model"], tags["refinery.model_version"]) == ("m+engines", "1")
    page = "[registered as version 1 of m+engines](http://127.0.0.1:5000/#/models/m%2Bengines/versions/1)"
    assert page in tags["mlflow.note.content"]
    assert tracker.released(champion_of(reports), 4).url.endswith("#/models/m%2Bengines/versions/1")
    # An engine is no checkpoint there either, and the next champion stays there, whatever the catalog says by then.
    with pytest.raises(CheckpointError, match="this project registered itself"):
        find_version("models:/m+engines/latest", workspace.sources)
    (tmp_path / "models.yaml").write_text("models: []\n")
    client.delete_registered_model("m")
    choose(tracker, "run-2", measured_again(reports, 3.0))
    assert [one.name for one in client.search_registered_models()] == ["m+engines"]


@pytest.mark.parametrize("made_by", ["this version", "an earlier version"])
def test_what_becomes_a_source_gets_no_more_champions(tracker, tmp_path, made_by):
    reports, client = [report("torch", 1.0), report("int8", 2.0)], store_client(tmp_path)
    write_all(tracker, "run-1", reports)
    if made_by == "an earlier version":
        client.delete_registered_model_tag("m", "refinery.model")
    again = measured_again(reports, 2.5)
    choose(tracker, "run-2", again)
    assert len(client.search_model_versions("name = 'm'")) == 2
    before = everything_in(client, "m")
    sourced = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", ui="", folder=tmp_path / "t", sources=lambda: ["M"])
    choose(sourced, "run-3", measured_again(again, 3.0))
    assert everything_in(client, "m") == before
    assert client.get_model_version_by_alias("m+engines", "champion-cpu").version in (1, "1")


@pytest.mark.parametrize("versions", [0, 1])
def test_somebody_elses_registered_model_is_left_alone(tracker, tmp_path, versions):
    reports, client = [report("torch", 1.0), report("int8", 2.0)], store_client(tmp_path)
    registered(client, "m", versions)
    before = everything_in(client, "m")
    write_all(tracker, "run-1", reports)
    assert everything_in(client, "m") == before
    assert client.get_model_version_by_alias("m+engines", "champion-cpu").version in (1, "1")


def test_two_taken_names_are_refused(tracker, tmp_path):
    reports, client = [report("torch", 1.0), report("int8", 2.0)], store_client(tmp_path)
    for name in ("m", "m+engines"):
        registered(client, name)
    with pytest.raises(TrackingError, match="m: its champion cannot be registered .* 'm' and 'm.engines' are sources"):
        write_all(tracker, "run-1", reports)
