"""The assets of the champion's best serving configuration and of the published release's behaviour under load."""

import dagster as dg

from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import linked, table
from resources.artifacts.records import ServingConfiguration, ServingReport
from resources.report.plots import load_plot, remembered
from resources.report.tables import markdown_image, trial_table
from resources.steps.graph import TargetSteps


def serving_configuration_asset(steps: TargetSteps) -> dg.AssetsDefinition:
    """Return the asset of the serving configuration.

    The asset fails if the champion cannot be served with any configuration.
    """
    look = Look.of(
        "serving",
        {"task"},
        "Instances and queue delay for the champion, found under load on a real Triton server.",
    )

    def show(done: Done[ServingConfiguration]) -> Metadata:
        record = done.record
        link = done.tracker.serving(done.run_id, done.work.get(steps.champion), record)
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
        return {**metadata, **linked(mlflow_run=link)}

    return artifact_asset(steps.configuration, look, show)


def serving_benchmark_asset(steps: TargetSteps) -> dg.AssetsDefinition:
    """Return the asset of the serving benchmark."""
    look = Look.of(
        "serving",
        {"report", "mlflow"},
        "Throughput and latency of the release that serves, by the number of clients, on a real Triton.",
    )

    def show(done: Done[ServingReport]) -> Metadata:
        record = done.record
        link = done.tracker.load(done.run_id, done.work.get(steps.champion), record)
        metadata: dict[str, object] = {"status": record.status, "reason": record.reason or "–"}
        if record.levels:
            title = f"{record.model} on {record.target}, release {record.release}: {record.device}"
            plot = remembered(done.work.store.caches, record.digest, lambda: load_plot(record, title))
            assert plot is not None, "a load can always be drawn"
            metadata |= {
                "load": _load_table(record),
                "plot": dg.MetadataValue.md(markdown_image(plot, "latency by throughput")),
                "release_number": record.release,
                "throughput_per_s": round(max(level.throughput_per_s for level in record.levels), 1),
                "p50_ms_of_one_client": round(record.levels[0].p50_ms, 3),
                "p99_ms_of_all_clients": round(record.levels[-1].p99_ms, 3),
            }
        return {**metadata, **linked(mlflow_run=link)}

    return artifact_asset(steps.serving_benchmark, look, show)


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
