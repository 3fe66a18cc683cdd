"""The jobs in Dagster do what the commands do, and the release's asset shows it."""

import dagster as dg
import pytest

from orchestration.definitions import make_definitions
from resources.settings.workspace import Workspace
from resources.triton.layout import CONFIG, current_number, list_releases
from resources.triton.publish import Steps, publish
from tests.releases import make_plan, unasked


@pytest.fixture
def workspace(tmp_path, triton_settings):
    """Four releases of one model, of which the last serves."""
    made = Workspace(tmp_path / "home", tmp_path / "models.yaml", triton=triton_settings)
    for seed in range(4):
        publish(make_plan(tmp_path / "plans", seed=seed), made.repository("cpu"), Steps(prove=unasked))
    return made


def run(workspace, instance, job, op, **config):
    definition = make_definitions(workspace).get_job_def(job)
    given = {"ops": {op: {"config": {"model": "tiny", **config}}}}
    return definition.execute_in_process(run_config=given, instance=instance, raise_on_error=False)


def observed(instance):
    (record,) = instance.fetch_observations(dg.AssetKey(["triton_repository", "cpu"]), limit=1).records
    assert record.partition_key == "tiny"
    return {name: value.value for name, value in record.asset_observation.metadata.items()}


def test_going_back_cleaning_up_and_checking(workspace):
    repository = workspace.repository("cpu")
    with dg.instance_for_test() as instance:
        assert run(workspace, instance, "rollback", "roll_back_release", to=2).success
        assert current_number(repository, "tiny") == 2
        assert observed(instance) == {"rolled_back_to": 2, "before": 4}
        assert run(workspace, instance, "retain", "retain_releases", keep=1).success
        assert [release.number for release in list_releases(repository, "tiny")] == [2, 4]
        assert observed(instance)["removed"] == [1, 3]
        assert run(workspace, instance, "verify", "verify_one_release").success
        assert observed(instance)["verified"] == 2
        (repository / "tiny__r2__pipeline" / CONFIG).write_text("mine")
        failed = run(workspace, instance, "verify", "verify_one_release")
        assert not failed.success
        message = failed.failure_data_for_node("verify_one_release").error.cause.message
        assert "tiny__r2__pipeline/config.pbtxt was changed." in message
