"""The asset of the checkpoint, which is copied, checked, and never changed again."""

import dagster as dg

from assets.executor_tags import placement
from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import file_table
from assets.partitions import models
from resources.artifacts.records import Checkpoint
from resources.artifacts.store import ArtifactStore
from resources.machine.device import why_not_here
from resources.report.plots import length_plot, remembered
from resources.report.tables import markdown_image, padding_table
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.graph import steps_of
from resources.steps.step import Work


def _before(context: dg.AssetExecutionContext, work: Work) -> None:
    """Fail before any work if the run could not publish a release at its end."""
    # This is imported late because definitions are loaded again for every step.
    from resources.triton.preflight import require_publishable

    for target in _published(context.run, work.workspace):
        require_publishable(work.workspace, work.entry.name, target)


def _published(run: dg.DagsterRun, workspace: Workspace) -> list[str]:
    """Return the targets that the run makes a release for, if this machine can tell about their repositories.

    A target whose GPU is not in this machine is left out. Its steps may run on another machine, with its own disk.
    """
    chosen = run.asset_selection  # empty if the run is of the whole job
    return [
        target
        for target in workspace.targets
        if (not chosen or dg.AssetKey(steps_of(target).release.name.split("/")) in chosen)
        and why_not_here(target) is None
    ]


def _accept(done: Done[Checkpoint]) -> None:
    """Prepare the tracking server if the checkpoint is new, because the run will then write to it.

    A server that does not answer thus fails the run before it builds engines.
    """
    work = done.work
    if work.workspace.mlflow_uri().is_web and work.store.pointed(work.pointer(CHECKPOINT)) != done.record.digest:
        done.tracker.prepare()


def _show(done: Done[Checkpoint]) -> Metadata:
    record = done.record
    if record.assumed:
        done.context.log.warning(
            f"{record.model}: the checkpoint has no modules.json, so it does not say how token vectors become one. As "
            f"sentence-transformers does, {', '.join(record.assumed)} is assumed. Write what is right into the entry's "
            "options."
        )
    return {
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
        **length_metadata(done.work.store, record),
    }


def length_metadata(store: ArtifactStore, record: Checkpoint) -> dict[str, object]:
    """Return the histogram and the padding of the sample's rows, or nothing if the catalog has no sample."""
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


checkpoint = artifact_asset(
    CHECKPOINT,
    Look.of(
        "sources",
        {"huggingface"},
        "A complete copy of a Hugging Face checkpoint from the catalog's source, checked for its task.",
    ),
    _show,
    before=_before,
    accept=_accept,
)


@dg.asset_check(asset=checkpoint, partitions_def=models, op_tags=placement(), blocking=True)
def required_files(
    context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.AssetCheckResult:
    """Every file of the stored copy is there, byte for byte."""
    work = Work(workspace, workspace.entry(context.partition_key))
    store, record = work.store, work.get(CHECKPOINT)
    damaged = store.damaged(record)
    if damaged:
        store.remove(record)  # otherwise every later run would find it and refuse it
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
