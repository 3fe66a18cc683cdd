"""The job `optimize`, which materializes all assets of one model, and the sensor for its failures."""

import dagster as dg

from assets.partitions import PARTITION_TAG
from resources.tracking import Tracker


@dg.run_failure_sensor(
    description="Closes the MLflow runs that a failed Dagster run left open. A killed run had no time to do it.",
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def close_tracking_of_killed_runs(context: dg.RunFailureSensorContext, tracker: dg.ResourceParam[Tracker]) -> None:
    """Close the MLflow runs that a failed Dagster run left open. A run that was killed had no time to do it."""
    run = context.dagster_run
    model = run.tags.get(PARTITION_TAG)
    if model is not None:  # a run without a partition optimized no model
        tracker.abandon(run.run_id, model, context.failure_event.message or "the run failed outside its steps")


optimize = dg.define_asset_job(
    "optimize",
    selection=dg.AssetSelection.all(),
    description="Take one model of the catalog from its checkpoint to a proven release in the Triton repository.",
)
