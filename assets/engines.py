"""One asset an engine and target, made from the list of engines, so that the lineage shows every candidate."""

import dagster as dg

from assets.evaluation_set import evaluation_set
from assets.executor_tags import placement
from assets.materialization import OWNERS, materialized, remember, table
from assets.onnx_graph import onnx_graph
from assets.partitions import models
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.engines.make import make_engine, sources_of
from resources.engines.specs import EngineSpec
from resources.machine.targets import device_of
from resources.settings.workspace import Workspace

#: Dagster has no icons of ONNX Runtime, OpenVINO and TensorRT; the tags `runtime` and `precision` name them.
KINDS = {"torch": "pytorch", "onnxruntime": "microsoft"}


def engine_asset(spec: EngineSpec, target: str) -> dg.AssetsDefinition:
    """The asset `engines/<target>/<engine>`. It materializes `built`, `unsupported` or `failed`, and
    never fails for the engine's own troubles.
    """

    @dg.asset(
        key=["engines", target, spec.name],
        deps=[onnx_graph, evaluation_set] if spec.examined else [onnx_graph],
        partitions_def=models,
        group_name=f"engines_{target}",
        kinds={KINDS.get(spec.runtime, "file")},
        owners=OWNERS,
        description=spec.description,
        tags={
            "target": target,
            "device": device_of(target),
            "runtime": spec.runtime,
            "precision": spec.precision,
        },
        op_tags=placement(target),
    )
    def engine(context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        graph = store.current(OnnxGraph, f"onnx_graph/{entry.name}")
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        made = make_engine(workspace, entry, spec, target, sources_of(workspace, entry, checkpoint, graph), evaluation)
        folder = remember(store, f"engines/{target}/{spec.name}/{entry.name}", made)
        record = made.record
        return materialized(
            made,
            folder,
            {
                "status": record.status,
                "reason": record.reason or "–",
                "runtime": record.runtime,
                "precision": record.precision,
                "parameters": dg.MetadataValue.json(record.parameters),
                **_operators(record),
                **_ladder(record),
            },
        )

    return engine


def _operators(record: Engine) -> dict[str, object]:
    """What the graph consists of, the most frequent first."""
    if not record.operators:
        return {}
    frequent_first = sorted(record.operators.items(), key=lambda item: (-item[1], item[0]))
    return {
        "operators": table({"operator": "", "nodes": ""}, [[name, count] for name, count in frequent_first]),
        "nodes": sum(record.operators.values()),
    }


def _ladder(record: Engine) -> dict[str, object]:
    """Which operators were left in higher precision, and how that was found."""
    if not record.steps:
        return {}
    return {
        "kept_in_higher_precision": table({"operator": "by its module's path"}, [[name] for name in record.kept]),
        "operators_kept": len(record.kept),
        "tried": dg.MetadataValue.md("\n".join(f"1. {step}" for step in record.steps)),
    }
