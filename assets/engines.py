"""One asset for each engine and target, so that the lineage shows every candidate."""

import dagster as dg

from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import table
from resources.artifacts.records import Engine
from resources.engines.specs import EngineSpec
from resources.machine.targets import device_of
from resources.steps.engine import EngineStep

#: Dagster has no icons for ONNX Runtime, OpenVINO and TensorRT. The tags `runtime` and `precision` name them.
KINDS = {"torch": "pytorch", "onnxruntime": "microsoft"}


def engine_asset(step: EngineStep) -> dg.AssetsDefinition:
    """Return the asset of an engine.

    A build that fails is recorded in the engine's record. The asset itself does not fail then.
    """
    look = Look.of(
        f"engines_{step.target}",
        {KINDS.get(step.spec.runtime, "file")},
        step.spec.description,
        **engine_tags(step.spec, step.target),
    )
    # An engine writes nothing to MLflow, and one that raises does not end the run of its benchmarks there.
    return artifact_asset(step, look, _show, tracked=False)


def engine_tags(spec: EngineSpec, target: str) -> dict[str, str]:
    """Return the tags of an engine and of its benchmark."""
    return {"device": device_of(target), "runtime": spec.runtime, "precision": spec.precision}


def _show(done: Done[Engine]) -> Metadata:
    record = done.record
    return {
        "status": record.status,
        "reason": record.reason or "–",
        "runtime": record.runtime,
        "precision": record.precision,
        "parameters": dg.MetadataValue.json(record.parameters),
        **_operators(record),
        **_ladder(record),
    }


def _operators(record: Engine) -> dict[str, object]:
    """Return the operators of the graph, the most frequent first."""
    if not record.operators:
        return {}
    frequent_first = sorted(record.operators.items(), key=lambda item: (-item[1], item[0]))
    return {
        "operators": table({"operator": "", "nodes": ""}, [[name, count] for name, count in frequent_first]),
        "nodes": sum(record.operators.values()),
    }


def _ladder(record: Engine) -> dict[str, object]:
    """Return the operators that were kept in higher precision, and the steps by which they were found."""
    if not record.steps:
        return {}
    return {
        "kept_in_higher_precision": table({"operator": "by its module's path"}, [[name] for name in record.kept]),
        "operators_kept": len(record.kept),
        "tried": dg.MetadataValue.md("\n".join(f"1. {step}" for step in record.steps)),
    }
