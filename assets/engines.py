"""One asset an engine and target, made from the list of engines, so that the lineage shows every candidate."""

import dagster as dg

from assets.evaluation_set import evaluation_set
from assets.materialization import OWNERS, materialized, remember
from assets.onnx_graph import onnx_graph
from assets.partitions import models
from assets.placement import placement
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.engines import EngineSpec
from resources.engines.make import make_engine, sources_of
from resources.targets import device_of
from resources.workspace import Workspace

KINDS = {"torch": "pytorch", "onnxruntime": "onnx", "openvino": "intel", "tensorrt": "nvidia"}


def engine_asset(spec: EngineSpec, target: str) -> dg.AssetsDefinition:
    """The asset `engines/<target>/<engine>`. It materializes `built`, `unsupported` or `failed`, and
    never fails for the engine's own troubles.
    """

    @dg.asset(
        key=["engines", target, spec.name],
        deps=[onnx_graph, evaluation_set] if spec.examined else [onnx_graph],
        partitions_def=models,
        group_name=f"engines_{target}",
        kinds={KINDS[spec.runtime], spec.precision},
        owners=OWNERS,
        description=spec.description,
        tags={"target": target, "device": device_of(target)},
        op_tags=placement(target),
    )
    def engine(context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        graph = store.current(OnnxGraph, f"onnx_graph/{entry.name}")
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        made = make_engine(workspace, entry, spec, target, sources_of(workspace, checkpoint, graph), evaluation)
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
                "operators": dg.MetadataValue.json(record.operators),
                **_ladder(record),
            },
        )

    return engine


def _ladder(record: Engine) -> dict[str, object]:
    """Which operators were left in higher precision, and how that was found."""
    if not record.steps:
        return {}
    return {
        "kept_in_higher_precision": dg.MetadataValue.json(list(record.kept)),
        "tried": dg.MetadataValue.md("\n".join(f"1. {step}" for step in record.steps)),
    }
