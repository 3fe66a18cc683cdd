"""The one job: everything, for one model."""

import dagster as dg

from assets.partitions import PARTITION_TAG
from resources.tracking import Tracker


@dg.run_failure_sensor(
    description="Closes the MLflow run of a Dagster run that was killed, which had no time to do it.",
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def close_tracking_of_killed_runs(context: dg.RunFailureSensorContext, tracker: dg.ResourceParam[Tracker]) -> None:
    run = context.dagster_run
    if not context.get_step_failure_events():
        message = context.failure_event.message or "the run failed outside its steps"
        tracker.abandon(run.run_id, run.tags.get(PARTITION_TAG, ""), message)


optimize = dg.define_asset_job(
    "optimize",
    selection=dg.AssetSelection.all(),
    description="Take one model of the catalog from its checkpoint to a proven release in the Triton repository.",
)
