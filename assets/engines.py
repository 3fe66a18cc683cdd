"""One asset an engine and target, so that the lineage shows every candidate."""

import dagster as dg

from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import table
from resources.artifacts.records import Engine
from resources.engines.specs import EngineSpec
from resources.machine.targets import device_of
from resources.steps.engine import EngineStep

#: Dagster has no icons of ONNX Runtime, OpenVINO and TensorRT; the tags `runtime` and `precision` name them.
KINDS = {"torch": "pytorch", "onnxruntime": "microsoft"}


def engine_asset(step: EngineStep) -> dg.AssetsDefinition:
    """Return the asset of an engine. It never fails for the engine's own troubles."""
    look = Look.of(
        f"engines_{step.target}",
        {KINDS.get(step.spec.runtime, "file")},
        step.spec.description,
        **engine_tags(step.spec, step.target),
    )
    return artifact_asset(step, look, _show)


def engine_tags(spec: EngineSpec, target: str) -> dict[str, str]:
    """Return the tags that engines and their benchmarks have."""
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
