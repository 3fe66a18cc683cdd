"""The one job: everything, for one model."""

import dagster as dg


@dg.failure_hook(required_resource_keys={"tracker"})
def close_tracking(context: dg.HookContext) -> None:
    """No MLflow run stays open because a step behind it failed."""
    run = context.instance.get_run_by_id(context.run_id)
    model = run.tags.get("dagster/partition", "") if run is not None else ""
    context.resources.tracker.abandon(context.run_id, model, f"{context.op.name} failed: {context.op_exception}")


optimize = dg.define_asset_job(
    "optimize",
    selection=dg.AssetSelection.all(),
    hooks={close_tracking},
    description="Take one model of the catalog from its checkpoint to a proven release in the Triton repository.",
)
