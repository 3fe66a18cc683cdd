"""An MLflow server with Postgres behind it, known by its URI alone: all that is written goes over HTTP."""

from dataclasses import replace

import pytest

from orchestration.settings import read_workspace, tracker_of
from resources.boundary.addresses import Address
from resources.tracking import Tracker
from tests import servers
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_job
from tests.test_choosing import report
from tests.test_tracking import CHECKPOINT, LATER, champion_of, engine, mlflow_json, optimization, seen, write_all


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with servers.postgres() as database, servers.mlflow(database, tmp_path_factory.mktemp("mlflow")) as url:
        yield url


def test_an_optimization_is_written_to_a_server_and_found_there(server, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # what is written to the folder one stands in would be seen
    tracker = tracker_of(read_workspace({"REFINERY_HOME": str(tmp_path / "home"), "REFINERY_MLFLOW_URI": server}))
    reports = [report("torch", 1.0), report("int8", 2.0)]
    champion = champion_of(reports)
    built = engine("int8").model_copy(update={"usage": seen("here", 30.0, cpu_utilization_percentage=80.0)})
    tracker.candidate("run-1", CHECKPOINT, built, reports[1], [])
    first = write_all(tracker, "run-1", reports)
    tracker.release(CHECKPOINT, champion, 4)

    client = MlflowClient(server)
    parent = client.get_run(first.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["refinery.release"] == "4"
    assert {"report.html", "report.json", "latency.png", "candidates.md"} <= {
        item.path for item in client.list_artifacts(first.run_id)
    }
    assert mlflow_json(client, first.run_id, "report.json")["release"] == 4
    version = client.get_model_version_by_alias("m", "champion-cpu")
    assert version.tags["refinery.release"] == "4"
    child = client.get_run(version.run_id)
    assert child.data.tags["mlflow.parentRunId"] == first.run_id
    assert child.data.metrics["system/cpu_utilization_percentage"] == 80.0
    assert tracker.champion_release("m", "cpu") == 4
    assert tracker.release_runs("m", "cpu")[4].run_id == child.info.run_id
    assert tracker.report(champion).url == f"{first.url}/artifacts/report.html"
    # Another machine, that knows the server alone: the parent is found, and the report says what changed.
    elsewhere = Tracker(server, ui=server, folder=tmp_path / "elsewhere")
    later = [one.model_copy(update={"digest": f"{one.digest}, later"}) for one in reports]
    for item in later:
        elsewhere.candidate("run-2", LATER, engine(item.engine), item, [])
    third = Tracker(server, ui=server, folder=tmp_path / "third")
    assert third.candidate("run-2", LATER, built, report("other", 1.5), []) is not None
    chosen = champion.model_copy(update={"digest": "later"})
    second = third.champion("run-2", optimization("run-2", later, chosen, revision=LATER.revision), {})
    assert mlflow_json(client, second.run_id, "report.json")["before"]["run_id"] == first.run_id
    measured = client.get_run(client.get_model_version_by_alias("m", "champion-cpu").run_id)
    assert measured.info.run_name == "int8 @ 0123456789ab (cpu)"
    parents = client.search_runs([parent.info.experiment_id], "tags.`refinery.parent` = 'true'")
    assert {run.info.run_id for run in parents} == {first.run_id, second.run_id}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "home", "third"]


def test_a_server_that_is_not_there_ends_each_run_of_a_new_checkpoint_at_its_first_step(
    workspace, made_checkpoint, unused_port
):
    """Also where the run before has copied the checkpoint already."""
    away = replace(workspace, tracking_uri=Address(f"http://127.0.0.1:{unused_port}"))
    add_entry(away, entry_for(made_checkpoint()))
    for _ in range(2):
        outcome = run_job(away, "tiny")
        assert not outcome.success
        assert outcome.materialized() == set()
        assert "cannot be written" in " ".join(outcome.messages)
