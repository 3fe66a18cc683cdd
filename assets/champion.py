"""The asset of the engine that is to be served on a target, and of the reasons for it."""

import dagster as dg

from assets.checkpoint import length_metadata
from assets.executor_tags import placement
from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import began_s, linked
from assets.partitions import models
from resources.artifacts.records import Champion
from resources.benchmark.ranking import tell
from resources.report.plots import latency_plot, remembered
from resources.report.tables import candidate_table, markdown, markdown_image
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.graph import TargetSteps
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.step import Work


def champion_assets(steps: TargetSteps) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """Return the asset of the champion, and its check.

    The asset fails if no engine is accurate enough.
    """
    look = Look.of(
        "serving",
        {"mlflow"},
        "The best engine by the catalog's objective, of all that passed the accuracy gates.",
    )
    champion = artifact_asset(steps.champion, look, lambda done: _show(done, steps))

    @dg.asset_check(asset=champion, partitions_def=models, op_tags=placement(steps.target))
    def as_good_as_what_serves(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """The best new engine is as accurate and as fast as the engine that serves. Otherwise the latter stays."""
        record = Work(workspace, workspace.entry(context.partition_key)).get(steps.champion)
        met = record.contest
        return dg.AssetCheckResult(
            passed=met is None or met.outcome in ("replaced", "equal"),
            severity=dg.AssetCheckSeverity.WARN,
            description=tell(met) if met is not None else "no other engine of this checkpoint serves",
            metadata={"contest": dg.MetadataValue.json(met.model_dump() if met is not None else {})},
        )

    return champion, as_good_as_what_serves


def _show(done: Done[Champion], steps: TargetSteps) -> Metadata:
    # These are imported late because definitions are loaded again for every step.
    from resources.report.optimization import make_report
    from resources.report.page import LATENCY, PARETO
    from resources.report.pareto import pareto_plot

    work, record = done.work, done.record
    entry, store, checkpoint, evaluation = work.entry, work.store, work.get(CHECKPOINT), work.get(EVALUATION_SET)
    reports, candidates = steps.champion.reports(work), work.there(steps.engines)
    table = markdown(*candidate_table(reports, record.verdicts))
    report = make_report(work.workspace, entry, checkpoint, evaluation, record, reports, candidates)
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
    usage = [made_of.usage for made_of in (evaluation, work.get(ONNX_GRAPH), *candidates)]
    link = done.tracker.champion(done.run_id, report, pictures, usage, began_s(done.context))
    return {
        **metadata,
        **length_metadata(store, checkpoint),
        **linked(mlflow_run=link, report=done.tracker.report(record)),
    }
