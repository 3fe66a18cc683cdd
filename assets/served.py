"""What serves now, measured again beside the candidates, so that champion and challenger meet in one run."""

from collections.abc import Sequence

import dagster as dg

from assets.benchmarks import report_metadata
from assets.evaluation_set import evaluation_set
from assets.executor_tags import placement
from assets.materialization import OWNERS, closing_tracking, linked, materialized, remember
from assets.partitions import models
from resources.artifacts.records import BenchmarkReport, Checkpoint, EvaluationSet, OnnxGraph
from resources.benchmark.champion import gates_missed
from resources.benchmark.measuring import make_benchmark
from resources.engines.make import sources_of
from resources.engines.specs import BASELINE, SERVED, EngineSpec
from resources.machine.targets import device_of
from resources.settings.workspace import Workspace
from resources.tracking import Tracker
from resources.triton.served import current_engines, find_incumbent


def served_benchmark_asset(specs: Sequence[EngineSpec], target: str) -> dg.AssetsDefinition:
    """The asset `benchmarks/<target>/served`. Empty where nothing serves, or one of the candidates does."""
    name = f"benchmarks/{target}/{SERVED}"

    @dg.asset(
        key=["benchmarks", target, SERVED],
        deps=[*(dg.AssetKey(["engines", target, spec.name]) for spec in specs), evaluation_set.key],
        partitions_def=models,
        group_name=f"benchmarks_{target}",
        kinds={"report", "mlflow"},
        owners=OWNERS,
        description="The engine of the release that serves, measured again beside candidates that are others.",
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
        candidates = current_engines(store, specs, target, entry.name)
        incumbent = find_incumbent(workspace, entry.name, target, checkpoint, candidates)
        engine = incumbent.engine
        if engine is None:
            store.forget(f"{name}/{entry.name}")
            nothing_done = dg.MetadataValue.bool(True)
            return dg.MaterializeResult(
                metadata={"status": "skipped", "reason": incumbent.story, "reused": nothing_done}
            )
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        graph = store.current(OnnxGraph, f"onnx_graph/{entry.name}")
        baseline = next(one for one in candidates if one.name == BASELINE)
        beside = [one.digest for one in candidates if one.status == "built"]
        sources = sources_of(workspace, entry, checkpoint, graph)
        made = make_benchmark(workspace, entry, engine, baseline, evaluation, sources, beside)
        record: BenchmarkReport = made.record
        # Should it stay the champion, it is released from there.
        store.point(f"engines/{target}/{SERVED}/{entry.name}", engine)
        folder = remember(store, f"{name}/{entry.name}", made)
        missed = gates_missed(entry, record) if record.status == "measured" else []
        metadata = {"serves": incumbent.story, **report_metadata(record)}
        link = tracker.candidate(context.run.run_id, checkpoint, engine, record, missed)
        return materialized(made, folder, {**metadata, **linked(mlflow_run=link)})

    return benchmark
