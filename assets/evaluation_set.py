"""What every engine of a model is compared with."""

import dagster as dg

from assets.checkpoint import checkpoint
from assets.executor_tags import placement
from assets.materialization import OWNERS, materialized, remember
from assets.partitions import models
from resources.accuracy.evaluation_set import make_evaluation_set
from resources.artifacts.records import Checkpoint
from resources.settings.workspace import Workspace


@dg.asset(
    deps=[checkpoint],
    partitions_def=models,
    group_name="sources",
    kinds={"dataset", "pytorch"},
    owners=OWNERS,
    description="Real texts of many lengths, and what PyTorch in fp32 answers to each of them alone.",
    op_tags=placement(),
)
def evaluation_set(context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
    entry = workspace.entry(context.partition_key)
    source = workspace.store.current(Checkpoint, f"checkpoint/{entry.name}")
    made = make_evaluation_set(workspace, entry, source)
    folder = remember(workspace.store, f"evaluation_set/{entry.name}", made)
    record = made.record
    return materialized(
        made,
        folder,
        {
            "requests": record.items,
            "rows": record.rows,
            "longest_tokens": record.longest_tokens,
            "width": record.width,
        },
    )
