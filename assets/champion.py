"""The engine that is to be served on a target, and why."""

from collections.abc import Sequence

import dagster as dg

from assets.checkpoint import length_metadata
from assets.executor_tags import placement
from assets.materialization import OWNERS, began_s, closing_tracking, linked, materialized, remember
from assets.partitions import models
from resources.artifacts.records import BenchmarkReport, Champion, Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.benchmark.champion import make_champion
from resources.benchmark.ranking import tell
from resources.catalog.entries import ModelEntry
from resources.checkpoints.shapes import shapes_of
from resources.engines.specs import BASELINE, SERVED, EngineSpec
from resources.errors import ArtifactError
from resources.machine.device import describe_device
from resources.report.plots import latency_plot, remembered
from resources.report.tables import candidate_table, markdown, markdown_image
from resources.settings.workspace import Workspace
from resources.tracking import Tracker
from resources.triton.served import current_engines, find_incumbent


def champion_assets(specs: Sequence[EngineSpec], target: str) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The asset `champion/<target>` and its check. Where no engine is accurate enough, it fails."""

    @dg.asset(
        key=["champion", target],
        deps=[dg.AssetKey(["benchmarks", target, name]) for name in (*(spec.name for spec in specs), SERVED)],
        partitions_def=models,
        group_name="serving",
        kinds={"mlflow"},
        owners=OWNERS,
        description="The best engine, by the catalog's objective, among those that kept the accuracy gates.",
        tags={"target": target},
        op_tags=placement(target),
    )
    @closing_tracking
    def champion(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        # Here, because definitions are loaded again for every step.
        from resources.report.optimization import make_report
        from resources.report.page import LATENCY, PARETO
        from resources.report.pareto import pareto_plot

        entry, store = workspace.entry(context.partition_key), workspace.store
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        reports = current_reports(workspace, specs, target, entry)
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        candidates = current_engines(store, specs, target, entry.name)
        incumbent = find_incumbent(workspace, entry.name, target, checkpoint, candidates)
        made = make_champion(workspace, entry, target, reports, evaluation, incumbent.served)
        folder = remember(store, f"champion/{target}/{entry.name}", made)
        record = made.record
        table = markdown(*candidate_table(reports, record.verdicts))
        report = make_report(workspace, entry, checkpoint, evaluation, record, reports, candidates)
        plots = {
            LATENCY: lambda: latency_plot(reports, report.title, report.inaccurate),
            PARETO: lambda: pareto_plot(report),
        }
        drawn = {name: remembered(store.caches, record.digest, draw, name) for name, draw in plots.items()}
        pictures = {name: png for name, png in drawn.items() if png is not None}
        metadata: dict[str, object] = {
            "champion": record.engine,
            "reason": record.reason,
            "objective": record.objective,
            "score": round(record.score, 3),
            "candidates": dg.MetadataValue.md(table),
        }
        if LATENCY in pictures:
            metadata["latency"] = dg.MetadataValue.md(markdown_image(pictures[LATENCY], "median latency by shape"))
        if PARETO in pictures:
            metadata["pareto"] = dg.MetadataValue.md(markdown_image(pictures[PARETO], "speed against accuracy"))
        metadata |= length_metadata(store, checkpoint)
        graph = store.current(OnnxGraph, f"onnx_graph/{entry.name}")
        usage = [made_of.usage for made_of in (evaluation, graph, *candidates)]
        link = tracker.champion(context.run.run_id, report, pictures, usage, began_s(context))
        metadata |= linked(mlflow_run=link, report=tracker.report(record))
        return materialized(made, folder, metadata)

    @dg.asset_check(asset=champion, partitions_def=models, op_tags=placement(target))
    def as_good_as_what_serves(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """What was built anew is as accurate and as fast as what serves. If not, that goes on serving."""
        record = workspace.store.current(Champion, f"champion/{target}/{context.partition_key}")
        met = record.contest
        return dg.AssetCheckResult(
            passed=met is None or met.outcome in ("replaced", "equal"),
            severity=dg.AssetCheckSeverity.WARN,
            description=tell(met) if met is not None else "nothing else of this checkpoint serves",
            metadata={"contest": dg.MetadataValue.json(met.model_dump() if met is not None else {})},
        )

    return champion, as_good_as_what_serves


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
    for name in (*(spec.name for spec in specs), SERVED):
        try:
            report = store.current(BenchmarkReport, f"benchmarks/{target}/{name}/{entry.name}")
        except ArtifactError:
            continue
        same = report.evaluation_digest == evaluation.digest and report.baseline_digest == baseline.digest
        where = report.threads == workspace.threads(entry) and report.device == describe_device(target)
        if same and where and (not report.timings or {timing.shape for timing in report.timings} == shapes):
            found.append(report)
    return found
