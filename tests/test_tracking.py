"""MLflow, on a real sqlite store: a parent an optimization, a child a candidate, and nothing for nothing new."""

import json
from pathlib import Path

import pytest

from resources.artifacts.records import Champion, Checkpoint, Engine, LengthProfile
from resources.errors import TrackingError
from resources.evaluation.choosing import judge
from resources.tracking import Tracker
from tests.test_choosing import no_gates, report


@pytest.fixture
def tracker(tmp_path):
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", ui="http://127.0.0.1:5000", folder=tmp_path / "tracking")


def fresh(tmp_path):
    """The same store, as another process sees it."""
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", ui="http://127.0.0.1:5000", folder=tmp_path / "tracking")


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


def write_all(tracker, run, reports):
    for item in reports:
        tracker.candidate(run, CHECKPOINT, engine(item.engine), item, [])
    return tracker.champion(run, champion_of(reports), reports, "| a table |", b"a picture")


def test_one_optimization_is_a_parent_with_children(tracker, tmp_path):
    from mlflow import MlflowClient

    reports = [report("torch", 1.0), report("onnxruntime_fp32", 2.0), report("gpu", status="skipped", reason="no GPU")]
    parent = write_all(tracker, "run-1", reports)
    tracker.release(CHECKPOINT, champion_of(reports), 6)
    tracker.release(CHECKPOINT, champion_of(reports), 7)  # the same engine, served in another way

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("m").experiment_id])}
    child = runs["onnxruntime_fp32"]
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
    assert closed.data.params["allow_pickle"] == "False"
    assert closed.data.tags["refinery.champion"] == "onnxruntime_fp32"
    names = {item.path for item in client.list_artifacts(parent.run_id)}
    assert {"candidates.md", "latency.png", "verdicts.json"} <= names
    version = client.get_model_version_by_alias("m", "champion-cpu")
    assert version.tags["refinery.release"] == "7"
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
    picture = Path(client.download_artifacts(parent.info.run_id, "lengths.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")


def mlflow_json(client, run, name):
    return json.loads(Path(client.download_artifacts(run, name)).read_text())


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
    other.champion("run-2", champion, again, "", None)
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
    assert (run.info.run_name, run.info.status) == ("int8", "FINISHED")
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
        link = fresh(tmp_path).champion(run, champion, reports, "| a table |", None)
        assert link is not None
        assert alias() == champion.engine
