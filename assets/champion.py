"""The engine that is to be served on a target, and why."""

from collections.abc import Sequence

import dagster as dg

from assets.materialization import OWNERS, materialized, remember
from assets.partitions import models
from resources.artifacts.records import BenchmarkReport, EvaluationSet
from resources.engines import EngineSpec
from resources.errors import ArtifactError, NoChampionError
from resources.evaluation.champion import make_champion
from resources.reporting import candidate_table, latency_plot, markdown, markdown_image
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
    def champion(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        reports = current_reports(workspace, specs, target, entry.name)
        try:
            made = make_champion(workspace, entry, target, reports, evaluation)
        except NoChampionError as error:
            tracker.abandon(context.run.run_id, entry.name, str(error))
            raise
        folder = remember(store, f"champion/{target}/{entry.name}", made)
        record = made.record
        table = markdown(*candidate_table(reports, record.verdicts))
        plot = latency_plot(reports, f"{entry.name} on {target}: {reports[0].device}")
        metadata: dict[str, object] = {
            "champion": record.engine,
            "reason": record.reason,
            "objective": record.objective,
            "score": round(record.score, 3),
            "candidates": dg.MetadataValue.md(table),
        }
        if plot is not None:
            metadata["latency"] = dg.MetadataValue.md(markdown_image(plot, "median latency by shape"))
        link = tracker.champion(context.run.run_id, record, reports, table, plot)
        if link is not None:
            metadata["mlflow_run"] = dg.MetadataValue.url(link.url)
        return materialized(made, folder, metadata)

    return champion


def current_reports(
    workspace: Workspace, specs: Sequence[EngineSpec], target: str, model: str
) -> list[BenchmarkReport]:
    """The newest report on every engine that has one."""
    reports = []
    for spec in specs:
        try:
            reports.append(workspace.store.current(BenchmarkReport, f"benchmarks/{target}/{spec.name}/{model}"))
        except ArtifactError:  # a run of some engines only; the others simply do not compete
            continue
    return reports
