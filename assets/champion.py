"""The engine that is to be served on a target, and why."""

from collections.abc import Sequence

import dagster as dg

from assets.checkpoint import length_metadata
from assets.materialization import OWNERS, closing_tracking, materialized, remember
from assets.partitions import models
from resources.artifacts.records import BenchmarkReport, Checkpoint, Engine, EvaluationSet
from resources.catalog import ModelEntry
from resources.device import describe_device
from resources.engines import BASELINE, EngineSpec
from resources.errors import ArtifactError
from resources.evaluation.champion import make_champion
from resources.evaluation.shapes import shapes_of
from resources.reporting import candidate_table, latency_plot, markdown, markdown_image, remembered
from resources.tracking import Tracker
from resources.workspace import Workspace


def champion_asset(specs: Sequence[EngineSpec], target: str) -> dg.AssetsDefinition:
    """The asset `champion/<target>`. It fails where no engine is accurate enough, and nothing is published then."""

    @dg.asset(
        key=["champion", target],
        deps=[dg.AssetKey(["benchmarks", target, spec.name]) for spec in specs],
        partitions_def=models,
        group_name="serving",
        kinds={"mlflow"},
        owners=OWNERS,
        description="The best engine, by the catalog's objective, among those that kept the accuracy gates.",
        tags={"target": target},
    )
    @closing_tracking
    def champion(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        reports = current_reports(workspace, specs, target, entry)
        made = make_champion(workspace, entry, target, reports, evaluation)
        folder = remember(store, f"champion/{target}/{entry.name}", made)
        record = made.record
        table = markdown(*candidate_table(reports, record.verdicts))
        title = f"{entry.name} on {target}: {reports[0].device}"
        plot = remembered(store.caches, record.digest, lambda: latency_plot(reports, title))
        metadata: dict[str, object] = {
            "champion": record.engine,
            "reason": record.reason,
            "objective": record.objective,
            "score": round(record.score, 3),
            "candidates": dg.MetadataValue.md(table),
        }
        if plot is not None:
            metadata["latency"] = dg.MetadataValue.md(markdown_image(plot, "median latency by shape"))
        metadata |= length_metadata(store, store.current(Checkpoint, f"checkpoint/{entry.name}"))
        link = tracker.champion(context.run.run_id, record, reports, table, plot)
        if link is not None:
            metadata["mlflow_run"] = dg.MetadataValue.url(link.url)
        return materialized(made, folder, metadata)

    return champion


def current_reports(
    workspace: Workspace, specs: Sequence[EngineSpec], target: str, entry: ModelEntry
) -> list[BenchmarkReport]:
    """The newest report on every engine that has one, as far as they can be compared with each other.

    A run of some engines only leaves the others' reports behind: of another revision, other shapes or another machine.
    """
    store, found = workspace.store, []
    evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
    baseline = store.current(Engine, f"engines/{target}/{BASELINE}/{entry.name}")
    shapes = {str(shape) for shape in shapes_of(entry, store.current(Checkpoint, f"checkpoint/{entry.name}"))}
    for spec in specs:
        try:
            report = store.current(BenchmarkReport, f"benchmarks/{target}/{spec.name}/{entry.name}")
        except ArtifactError:
            continue
        same = report.evaluation_digest == evaluation.digest and report.baseline_digest == baseline.digest
        where = report.threads == workspace.threads(entry) and report.device == describe_device(target)
        if same and where and (not report.timings or {timing.shape for timing in report.timings} == shapes):
            found.append(report)
    return found
