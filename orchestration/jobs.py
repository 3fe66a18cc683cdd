"""The one job: everything, for one model."""

import dagster as dg

from resources.tracking import Tracker


@dg.failure_hook(required_resource_keys={"tracker"})
def close_tracking(context: dg.HookContext) -> None:
    """No MLflow run stays open because a step behind it failed."""
    run = context.instance.get_run_by_id(context.run_id)
    model = run.tags.get("dagster/partition", "") if run is not None else ""
    context.resources.tracker.abandon(context.run_id, model, f"{context.op.name} failed: {context.op_exception}")


@dg.run_failure_sensor(default_status=dg.DefaultSensorStatus.RUNNING)
def close_tracking_of_killed_runs(context: dg.RunFailureSensorContext, tracker: dg.ResourceParam[Tracker]) -> None:
    """No MLflow run stays open because its Dagster run was killed, which had no time to close it."""
    run = context.dagster_run
    if not context.get_step_failure_events():
        message = context.failure_event.message or "the run failed outside its steps"
        tracker.abandon(run.run_id, run.tags.get("dagster/partition", ""), message)


optimize = dg.define_asset_job(
    "optimize",
    selection=dg.AssetSelection.all(),
    hooks={close_tracking},
    description="Take one model of the catalog from its checkpoint to a proven release in the Triton repository.",
)
