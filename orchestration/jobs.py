"""The one job: everything, for one model."""

import dagster as dg

#: In process, because the steps themselves are light: what is heavy or may crash runs in children of its own.
#: Eighteen empty steps took 1.9 s so, and 13 s with a process each.
EXECUTOR = dg.in_process_executor


optimize = dg.define_asset_job(
    "optimize",
    selection=dg.AssetSelection.all(),
    executor_def=EXECUTOR,
    description="Take one model of the catalog from its checkpoint to a proven release in the Triton repository.",
)
