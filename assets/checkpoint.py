"""The checkpoint: copied, checked, and never changed again."""

import dagster as dg

from assets.executor_tags import placement
from assets.materialization import OWNERS, file_table, materialized, remember
from assets.partitions import models
from resources.artifacts.records import Checkpoint
from resources.artifacts.store import ArtifactStore
from resources.checkpoints.collect import collect_checkpoint
from resources.machine.device import why_not_here
from resources.report.plots import length_plot, remembered
from resources.report.tables import markdown_image, padding_table
from resources.settings.workspace import Workspace
from resources.tracking import Tracker
from resources.triton.preflight import require_publishable


@dg.asset(
    partitions_def=models,
    group_name="sources",
    kinds={"huggingface"},
    owners=OWNERS,
    description="A Hugging Face checkpoint, copied from wherever the catalog says, complete and fit for its task.",
    op_tags=placement(),
)
def checkpoint(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    entry = workspace.entry(context.partition_key)
    for target in _published(context.run, workspace):
        require_publishable(workspace, entry.name, target)
    log = workspace.log(entry.name, "checkpoint")
    made = collect_checkpoint(entry, workspace.store, workspace.limits, log, settings=workspace.sources)
    name = f"checkpoint/{entry.name}"
    # A new checkpoint will be tracked. The server is asked now, so that a run fails before it builds engines.
    if workspace.mlflow_uri().is_web and workspace.store.pointed(name) != made.record.digest:
        tracker.prepare()
    folder = remember(workspace.store, name, made)
    record = made.record
    if record.assumed:
        context.log.warning(
            f"{entry.name}: the checkpoint has no modules.json, so it does not say how token vectors become one. As "
            f"sentence-transformers does, {', '.join(record.assumed)} is assumed. Write what is right into the entry's "
            "options."
        )
    return materialized(
        made,
        folder,
        {
            "source": record.source,
            "revision": record.revision,
            "task": record.task,
            "architecture": record.architecture,
            "max_tokens": record.max_tokens,
            "assumed": list(record.assumed),
            "labels": list(record.labels),
            "weights_digest": record.weights_digest,
            "tokenizer_digest": record.tokenizer_digest,
            "allow_pickle": dg.MetadataValue.bool(record.allow_pickle),
            "trust_remote_code": dg.MetadataValue.bool(record.trust_remote_code),
            "weights_bytes": record.weights_bytes,
            "contents": file_table(record.files),
            **length_metadata(workspace.store, record),
        },
    )


def _published(run: dg.DagsterRun, workspace: Workspace) -> list[str]:
    """Targets that the run makes a release for, of those whose repository this machine can be asked about: steps of a
    GPU's target may run on another, with a disk of its own.
    """
    chosen = run.asset_selection  # none: the whole job
    return [
        target
        for target in workspace.targets
        if (not chosen or dg.AssetKey(["triton_repository", target]) in chosen) and why_not_here(target) is None
    ]


def length_metadata(store: ArtifactStore, record: Checkpoint) -> dict[str, object]:
    """Histogram and padding of the sample's rows, where the catalog has a sample."""
    lengths = record.lengths
    if lengths is None:
        return {}
    title = f"{record.model}: {lengths.rows} rows of {lengths.requests} sampled requests"
    plot = remembered(store.caches, record.digest, lambda: length_plot(lengths, title))
    assert plot is not None, "lengths can always be drawn"
    return {
        "lengths": dg.MetadataValue.md(markdown_image(plot, "rows by tokens")),
        "padding": dg.MetadataValue.md(padding_table(lengths)),
        "padding_share": lengths.padding,
        "median_tokens": lengths.percentile(0.5),
        "p95_tokens": lengths.percentile(0.95),
    }


@dg.asset_check(asset=checkpoint, partitions_def=models, op_tags=placement(), blocking=True)
def required_files(
    context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.AssetCheckResult:
    """Every file of the stored copy is there, byte for byte."""
    store = workspace.store
    record = store.current(Checkpoint, f"checkpoint/{context.partition_key}")
    damaged = store.damaged(record)
    if damaged:
        store.remove(record)  # or it would be found, and refused, for ever
    return dg.AssetCheckResult(
        passed=not damaged,
        description=(
            f"{record.model}, revision {record.revision}: {', '.join(damaged)} of the stored copy in "
            f"{store.folder(record)} changed or went missing. The copy was removed; optimize again to make a new one."
            if damaged
            else "every byte is as it was copied"
        ),
        metadata={"files": len(record.files), "size_bytes": record.size_bytes, "missing_or_changed": damaged},
    )
