"""One asset for each engine and target, with the engine's accuracy and its speed beside PyTorch."""

import dagster as dg

from assets.engines import engine_tags
from assets.executor_tags import placement
from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import Cell, linked, table
from assets.partitions import models
from resources.artifacts.records import BenchmarkReport, Engine
from resources.benchmark.champion import gates_missed
from resources.engines.specs import SERVED
from resources.machine.targets import device_of
from resources.report.tables import tail
from resources.settings.workspace import Workspace
from resources.steps.benchmark import BenchmarkStep, ServedBenchmarkStep
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.step import Work


def benchmark_assets(step: BenchmarkStep) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """Return the asset of an engine's benchmark, and its check.

    An engine that breaks is recorded as failed in the report. The asset itself does not fail then.
    """
    spec = step.engine.spec
    look = Look.of(
        f"benchmarks_{step.target}",
        {"report", "mlflow"},
        f"Accuracy of {spec.name} on real text, and its latency in turns with PyTorch's at every shape.",
        **engine_tags(spec, step.target),
    )

    def show(done: Done[BenchmarkReport]) -> Metadata:
        return _shown(done, done.work.get(step.engine))

    benchmark = artifact_asset(step, look, show)

    @dg.asset_check(asset=benchmark, partitions_def=models, op_tags=placement(step.target))
    def accuracy_gate(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """The engine's answers are close enough to PyTorch's for serving. A failure excludes this engine alone."""
        entry = workspace.entry(context.partition_key)
        record = Work(workspace, entry).get(step)
        gates = entry.accuracy_gates().model_dump()
        if record.accuracy is None:
            # Only an engine that broke calls for a warning. An engine that this target cannot have does not.
            return dg.AssetCheckResult(
                passed=record.status == "skipped",
                severity=dg.AssetCheckSeverity.WARN,
                description=f"Not measured: {record.reason}",
                metadata={"gates": dg.MetadataValue.json(gates), "measured": dg.MetadataValue.bool(False)},
            )
        missed = gates_missed(entry, record)
        return dg.AssetCheckResult(
            passed=not missed,
            severity=dg.AssetCheckSeverity.WARN,
            description="; ".join(missed) or "every gate is kept",
            metadata={
                "compared": table(
                    {"metric": "of answers beside PyTorch's in fp32", "measured": "", "gate": ""},
                    [[name, float(value), gates.get(name)] for name, value in record.accuracy.metrics.items()],
                ),
                "gates": dg.MetadataValue.json(gates),
                "measured": dg.MetadataValue.bool(True),
                "texts": record.accuracy.texts,
            },
        )

    return benchmark, accuracy_gate


def served_benchmark_asset(step: ServedBenchmarkStep) -> dg.AssetsDefinition:
    """Return the asset of the benchmark of the engine that serves.

    The run that measures the challengers measures this engine again, so that all scores come from one run.
    """
    look = Look.of(
        f"benchmarks_{step.target}",
        {"report", "mlflow"},
        "The engine of the release that serves, measured again beside the new candidates.",
        device=device_of(step.target),
    )

    def show(done: Done[BenchmarkReport]) -> Metadata:
        incumbent = step.incumbent(done.work)
        assert incumbent.engine is not None, f"{SERVED} was measured"
        return {"serves": incumbent.story, **_shown(done, incumbent.engine)}

    return artifact_asset(step, look, show, nothing=lambda work: step.incumbent(work).story)


def _shown(done: Done[BenchmarkReport], engine: Engine) -> Metadata:
    record, work = done.record, done.work
    missed = gates_missed(work.entry, record) if record.status == "measured" else []
    metadata = report_metadata(record)
    link = done.tracker.candidate(done.run_id, work.get(CHECKPOINT), engine, record, missed)
    return {**metadata, **linked(mlflow_run=link)}


def report_metadata(record: BenchmarkReport) -> dict[str, object]:
    """Return a report's metadata: tables for people, and figures under constant names for Dagster's plots over time."""
    metadata: dict[str, object] = {"status": record.status, "reason": record.reason or "–", "device": record.device}
    if record.accuracy is not None:
        metadata |= {
            "latency": _latency_table(record),
            "accuracy": dg.MetadataValue.json(record.accuracy.metrics),
            "worst_texts": _worst_table(record),
            "threads": str(record.setting),
            **_thread_table(record),
            **{f"accuracy_{name}": float(value) for name, value in record.accuracy.metrics.items()},
            **{f"p50_ms_{timing.shape}": round(timing.candidate.p50_ms, 4) for timing in record.timings},
            **{f"rows_per_s_{timing.shape}": round(timing.candidate.throughput_per_s, 2) for timing in record.timings},
            **{f"speedup_{timing.shape}": round(timing.speedup, 3) for timing in record.timings},
            "engine_size_bytes": record.engine_size_bytes,
        }
    return metadata


_LATENCY_COLUMNS = {
    "shape": "batch x tokens",
    "p50_ms": "",
    "p90_ms": "",
    "p99": "in ms; below 100 samples the maximum, and of how many",
    "mean_ms": "",
    "std_ms": "",
    "rows_per_s": "",
    "PyTorch_p50_ms": "of a PyTorch that took turns with it",
    "speedup": "times faster than that: the median over the pairs",
    "pairs": "of samples, one of each",
    "windows": "whether windows of pairs agreed within the time limit",
    "memory_MB": "peak above the bare process",
}


def _latency_table(record: BenchmarkReport) -> dg.TableMetadataValue:
    rows: list[list[Cell]] = []
    for timing in record.timings:
        latency = timing.candidate
        rows.append(
            [
                timing.shape,
                round(latency.p50_ms, 3),
                round(latency.p90_ms, 3),
                tail(latency),
                round(latency.mean_ms, 3),
                round(latency.std_ms, 3),
                round(latency.throughput_per_s, 1),
                round(timing.baseline.p50_ms, 3),
                round(timing.speedup, 2),
                timing.pairs,
                "agree" if timing.agreed else "time bound hit first",
                round(timing.candidate_memory_bytes / 1e6),
            ]
        )
    return table(_LATENCY_COLUMNS, rows)


def _thread_table(record: BenchmarkReport) -> dict[str, object]:
    """Return the table of the thread settings that were tried, or nothing if there was no choice."""
    if not record.thread_trials:
        return {}
    shapes = [timing.shape for timing in record.timings]
    rows: list[list[Cell]] = [
        [
            str(trial.setting),
            trial.setting == record.setting,
            None if trial.against is None else str(trial.against),
            *(round(trial.speedups[shape], 2) if shape in trial.speedups else None for shape in shapes),
            round(trial.score, 2),
        ]
        for trial in record.thread_trials
    ]
    speedups = dict.fromkeys((f"speedup_{shape}" for shape in shapes), "times faster than what it took turns with")
    columns = {"setting": "", "taken": "", "in turns with": "", **speedups, "score": "over all shapes, to the first"}
    return {"thread_settings": table(columns, rows)}


def _worst_table(record: BenchmarkReport) -> dg.TableMetadataValue:
    assert record.accuracy is not None
    columns = {"likeness": "of the answer to PyTorch's", "text": ""}
    return table(columns, [[round(item.score, 5), item.text] for item in record.accuracy.worst])
