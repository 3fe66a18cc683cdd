"""One asset an engine and target: how accurate it is, and how fast beside PyTorch."""

import dagster as dg

from assets.evaluation_set import evaluation_set
from assets.materialization import OWNERS, closing_tracking, linked, materialized, remember
from assets.partitions import models
from assets.placement import placement
from resources.artifacts.records import BenchmarkReport, Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.engines import BASELINE, EngineSpec
from resources.engines.make import sources_of
from resources.evaluation.benchmark import make_benchmark
from resources.evaluation.champion import gates_missed
from resources.reporting import markdown, tail
from resources.targets import device_of
from resources.tracking import Tracker
from resources.workspace import Workspace


def benchmark_assets(spec: EngineSpec, target: str) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The asset `benchmarks/<target>/<engine>` and its check. The asset never fails for the engine's own troubles."""
    name = f"benchmarks/{target}/{spec.name}"

    @dg.asset(
        key=["benchmarks", target, spec.name],
        # The baseline's too: every candidate is measured in turns with it.
        deps=[dg.AssetKey(["engines", target, name]) for name in sorted({BASELINE, spec.name})] + [evaluation_set.key],
        partitions_def=models,
        group_name=f"benchmarks_{target}",
        kinds={"mlflow"},
        owners=OWNERS,
        description=f"Accuracy of {spec.name} on real text, and its latency in turns with PyTorch's at every shape.",
        tags={"target": target, "device": device_of(target)},
        op_tags=placement(target),
    )
    @closing_tracking
    def benchmark(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        graph = store.current(OnnxGraph, f"onnx_graph/{entry.name}")
        engine = store.current(Engine, f"engines/{target}/{spec.name}/{entry.name}")
        baseline = store.current(Engine, f"engines/{target}/{BASELINE}/{entry.name}")
        sources = sources_of(workspace, checkpoint, graph)
        made = make_benchmark(workspace, entry, engine, baseline, evaluation, sources)
        record = made.record
        folder = remember(store, f"{name}/{entry.name}", made)
        missed = gates_missed(entry, record) if record.status == "measured" else []
        metadata = report_metadata(record)
        link = tracker.candidate(context.run.run_id, checkpoint, engine, record, missed)
        return materialized(made, folder, {**metadata, **linked(mlflow_run=link)})

    @dg.asset_check(asset=benchmark, partitions_def=models, op_tags=placement(target))
    def accuracy_gate(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """The engine's answers are close enough to PyTorch's to be served. One that misses costs itself alone."""
        entry = workspace.entry(context.partition_key)
        record = workspace.store.current(BenchmarkReport, f"{name}/{entry.name}")
        gates = dg.MetadataValue.json(entry.accuracy_gates().model_dump())
        if record.accuracy is None:
            # An engine that this target cannot have is no reason to worry anybody, one that broke is.
            return dg.AssetCheckResult(
                passed=record.status == "skipped",
                severity=dg.AssetCheckSeverity.WARN,
                description=f"Not measured: {record.reason}",
                metadata={"gates": gates, "measured": dg.MetadataValue.bool(False)},
            )
        missed = gates_missed(entry, record)
        return dg.AssetCheckResult(
            passed=not missed,
            severity=dg.AssetCheckSeverity.WARN,
            description="; ".join(missed) or "every gate is kept",
            metadata={
                "gates": gates,
                "measured": dg.MetadataValue.bool(True),
                "metrics": dg.MetadataValue.json(record.accuracy.metrics),
            },
        )

    return benchmark, accuracy_gate


def report_metadata(record: BenchmarkReport) -> dict[str, object]:
    """What a person reads of a report."""
    metadata: dict[str, object] = {"status": record.status, "reason": record.reason or "–", "device": record.device}
    if record.accuracy is not None:
        metadata |= {
            "latency": dg.MetadataValue.md(_latency_table(record)),
            "accuracy": dg.MetadataValue.json(record.accuracy.metrics),
            "worst_texts": dg.MetadataValue.md(_worst_table(record)),
            "threads": str(record.setting),
            **_thread_table(record),
            **{f"speedup_{timing.shape}": round(timing.speedup, 3) for timing in record.timings},
        }
    return metadata


def _latency_table(record: BenchmarkReport) -> str:
    header = [
        "shape",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "mean ± std ms",
        "rows/s",
        "PyTorch p50 ms",
        "times PyTorch",
        "pairs",
        "windows",
        "memory MB",
    ]
    rows = []
    for timing in record.timings:
        latency = timing.candidate
        rows.append(
            [
                timing.shape,
                f"{latency.p50_ms:.2f}",
                f"{latency.p90_ms:.2f}",
                tail(latency),
                f"{latency.mean_ms:.2f} ± {latency.std_ms:.2f}",
                f"{latency.throughput_per_s:.1f}",
                f"{timing.baseline.p50_ms:.2f}",
                f"{timing.speedup:.2f}",
                str(timing.pairs),
                "agree" if timing.agreed else "time bound hit first",
                f"{timing.candidate_memory_bytes / 1e6:.0f}",
            ]
        )
    return markdown(header, rows)


def _thread_table(record: BenchmarkReport) -> dict[str, object]:
    """What was tried to find the number of threads; nothing where there was no choice."""
    if not record.thread_trials:
        return {}
    shapes = [timing.shape for timing in record.timings]
    rows = [
        [
            str(trial.setting) + (" (taken)" if trial.setting == record.setting else ""),
            "–" if trial.against is None else str(trial.against),
            *(f"{trial.speedups[shape]:.2f}" if shape in trial.speedups else "–" for shape in shapes),
            f"{trial.score:.2f}",
        ]
        for trial in record.thread_trials
    ]
    table = markdown(["setting", "in turns with", *(f"{shape}, times faster" for shape in shapes), "in all"], rows)
    return {"thread_settings": dg.MetadataValue.md(table)}


def _worst_table(record: BenchmarkReport) -> str:
    assert record.accuracy is not None
    return markdown(
        ["likeness to PyTorch's answer", "text"], [[f"{item.score:.5f}", item.text] for item in record.accuracy.worst]
    )
