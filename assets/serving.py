"""How the champion is served best, and what the published release does under load."""

import dagster as dg

from assets.executor_tags import placement
from assets.materialization import OWNERS, closing_tracking, linked, materialized, remember, table
from assets.partitions import models
from resources.artifacts.records import (
    Champion,
    Checkpoint,
    Engine,
    EvaluationSet,
    ServingConfiguration,
    ServingReport,
)
from resources.report.plots import load_plot, remembered
from resources.report.tables import markdown_image, trial_table
from resources.settings.workspace import Workspace
from resources.tracking import Tracker
from resources.triton.search import make_serving_configuration
from resources.triton.serving_report import make_serving_report


def serving_configuration_asset(target: str) -> dg.AssetsDefinition:
    """The asset `serving_configuration/<target>`. It fails where the champion cannot be served in any way."""

    @dg.asset(
        key=["serving_configuration", target],
        deps=[dg.AssetKey(["champion", target])],
        partitions_def=models,
        group_name="serving",
        kinds={"task"},
        owners=OWNERS,
        description="Instances and queue delay for the champion, found under load on a real Triton server.",
        tags={"target": target},
        op_tags=placement(target),
    )
    @closing_tracking
    def serving_configuration(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        champion = store.current(Champion, f"champion/{target}/{entry.name}")
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        engine = store.current(Engine, f"engines/{target}/{champion.engine}/{entry.name}")
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        made = make_serving_configuration(workspace, entry, checkpoint, engine, evaluation, champion)
        folder = remember(store, f"serving_configuration/{target}/{entry.name}", made)
        record: ServingConfiguration = made.record
        link = tracker.serving(context.run.run_id, champion, record)
        metadata: dict[str, object] = {
            "setting": str(record.setting),
            "reason": record.reason,
            "clients": record.clients,
            "instances": record.setting.instances,
            "queue_delay_us": record.setting.queue_delay_us,
        }
        if record.trials:
            header, rows = trial_table(record)
            metadata["trials"] = table({name or "verdict": "" for name in header}, rows)
        return materialized(made, folder, {**metadata, **linked(mlflow_run=link)})

    return serving_configuration


def serving_benchmark_asset(target: str) -> dg.AssetsDefinition:
    """The asset `serving_benchmark/<target>`."""

    @dg.asset(
        key=["serving_benchmark", target],
        deps=[dg.AssetKey(["triton_repository", target])],
        partitions_def=models,
        group_name="serving",
        kinds={"report", "mlflow"},
        owners=OWNERS,
        description="Throughput and latency of the release that serves, by the number of clients, on a real Triton.",
        tags={"target": target},
        op_tags=placement(target),
    )
    @closing_tracking
    def serving_benchmark(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        champion = store.current(Champion, f"champion/{target}/{entry.name}")
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        made = make_serving_report(workspace, entry, target, checkpoint, evaluation)
        folder = remember(store, f"serving_benchmark/{target}/{entry.name}", made)
        record: ServingReport = made.record
        link = tracker.load(context.run.run_id, champion, record)
        metadata: dict[str, object] = {"status": record.status, "reason": record.reason or "–"}
        if record.levels:
            title = f"{entry.name} on {target}, release {record.release}: {record.device}"
            plot = remembered(store.caches, record.digest, lambda: load_plot(record, title))
            assert plot is not None, "a load can always be drawn"
            metadata |= {
                "load": _load_table(record),
                "plot": dg.MetadataValue.md(markdown_image(plot, "latency by throughput")),
                "release_number": record.release,
                "throughput_per_s": round(max(level.throughput_per_s for level in record.levels), 1),
                "p50_ms_of_one_client": round(record.levels[0].p50_ms, 3),
                "p99_ms_of_all_clients": round(record.levels[-1].p99_ms, 3),
            }
        return materialized(made, folder, {**metadata, **linked(mlflow_run=link)})

    return serving_benchmark


def _load_table(record: ServingReport) -> dg.TableMetadataValue:
    columns = {
        "clients": "each asks again when it has its answer",
        "by": "who asked",
        "requests": "",
        "requests_per_s": "",
        "p50_ms": "",
        "p99_ms": "",
        "rows_per_execution": "what Triton's batches hold",
        "executions_per_request": "",
    }
    rows = [
        [
            level.clients,
            level.tool,
            level.requests or None,
            round(level.throughput_per_s, 1),
            round(level.p50_ms, 3),
            round(level.p99_ms, 3),
            round(level.mean_batch, 2) or None,
            round(level.batches_per_request, 2) or None,
        ]
        for level in record.levels
    ]
    return table(columns, rows)
