"""The asset of the exported ONNX graph, and its checks."""

import dagster as dg

from assets.executor_tags import placement
from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import table
from assets.partitions import models
from resources.artifacts.records import OnnxGraph
from resources.settings.workspace import Workspace
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.step import Work

_REMEDY = (
    "No engine is built from such a graph. Optimize again; if it stays, this architecture is not exported rightly by "
    "this version of torch: try another, and report it."
)


def _show(done: Done[OnnxGraph]) -> Metadata:
    record = done.record
    return {
        "inputs": list(record.inputs),
        "output": f"{record.output} [batch, {record.width}]",
        "opset": record.opset,
        "nodes": record.nodes,
        "parameters": record.parameters,
        "external_data": dg.MetadataValue.bool(record.external_data),
    }


onnx_graph = artifact_asset(
    ONNX_GRAPH,
    Look.of(
        "graph",
        {"pytorch", "file"},  # Dagster has no icon for ONNX
        "The checkpoint as an ONNX graph with dynamic batch and sequence, pooling or softmax included.",
        format="onnx",
    ),
    _show,
)


@dg.asset_check(asset=onnx_graph, partitions_def=models, op_tags=placement(), blocking=True)
def onnx_valid(context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
    """The ONNX checker accepts the graph after shape inference."""
    record = Work(workspace, workspace.entry(context.partition_key)).get(ONNX_GRAPH)
    return dg.AssetCheckResult(
        passed=record.checker == "",
        description=f"{record.model}: {record.checker} {_REMEDY}" if record.checker else "no complaint",
        metadata={"checker": record.checker or "no complaint", "nodes": record.nodes},
    )


@dg.asset_check(asset=onnx_graph, partitions_def=models, op_tags=placement(), blocking=True)
def parity_with_pytorch(
    context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.AssetCheckResult:
    """The graph answers as PyTorch does at shapes at which it was not exported, padded and unpadded."""
    record = Work(workspace, workspace.entry(context.partition_key)).get(ONNX_GRAPH)
    rows = [[case.shape, "padded" if case.padded else "unpadded", case.max_relative_error] for case in record.parity]
    missed = " ".join(record.parity_misses) or ("" if record.parity else "Nothing was compared.")
    return dg.AssetCheckResult(
        passed=not missed,
        description=f"{record.model}: {missed} {_REMEDY}" if missed else f"equal in {len(record.parity)} cases",
        metadata={
            "cases": table(
                {
                    "batch x tokens": "",
                    "padding": "",
                    "max_relative_error": "over the largest value of PyTorch's answer",
                },
                rows,
            ),
            "max_relative_error": max((case.max_relative_error for case in record.parity), default=0.0),
            "misses": list(record.parity_misses),
        },
    )
