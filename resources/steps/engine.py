"""The steps `engines/<target>/<engine>`: one engine, built in a child process, or recorded as unsupported or failed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.checkpoints.shapes import shapes_of
from resources.engines.availability import unsupported_reason
from resources.engines.interface import Goal, Sources, build
from resources.engines.rebuild import CODE, JUDGING, SCRIPT, recipe_of, write_script
from resources.engines.specs import LIBRARIES, EngineSpec
from resources.engines.tensorrt_availability import cuda_packages, tensorrt_packages
from resources.engines.tuning import Tuning, profiles_of
from resources.errors import EngineError, ExportError
from resources.machine.device import describe_device
from resources.machine.targets import Device, device_of
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.step import Recipe, Step, Work

#: The share of a step's time limit that a builder with its own limit may use.
_BUILDING_SHARE = 0.9


class EngineStep(Step[Engine]):
    """Build one engine for a target. If that fails, the record's status and reason say so, and no error is raised."""

    record = Engine

    def __init__(self, spec: EngineSpec, target: str) -> None:
        after: list[Step[Any]] = [ONNX_GRAPH, EVALUATION_SET] if spec.examined else [ONNX_GRAPH]
        super().__init__(f"engines/{target}/{spec.name}", after)
        self.spec, self.target = spec, target
        self.built_by = (*CODE, "resources.steps.engine")
        self.code = (*self.built_by, *JUDGING) if spec.examined else self.built_by

    def recipe(self, work: Work) -> Recipe[Engine]:
        """See Step. Raises ExportError where the graph is wrong."""
        entry, spec = work.entry, self.spec
        checkpoint, graph = work.get(CHECKPOINT), work.expected(ONNX_GRAPH)
        if isinstance(graph, OnnxGraph) and graph.problems:
            raise ExportError(
                f"{entry.name}: no engine is built from a graph that is wrong: {' '.join(graph.problems)}"
            )
        record = Engine(
            digest="",
            model=entry.name,
            name=spec.name,
            target=self.target,
            runtime=spec.runtime,
            precision=spec.precision,
            status="unsupported",
        )
        reason = unsupported_reason(spec, self.target)
        if reason is None and not entry.competes(spec.name):
            reason = f"Not among the engines that the catalog lists for {entry.name}."
        if reason is not None:
            return _unsupported(record, reason)
        goal = goal_of(work, spec) if spec.examined else None
        libraries = built_with(spec, device_of(self.target))
        made_of = Fingerprint.of(
            "engine",
            model=entry.name,
            graph=graph.digest,
            # Labels are no part of an engine, and the baseline reads the checkpoint directly.
            weights=checkpoint.weights_digest,
            spec=spec,
            target=self.target,
            # An engine for a GPU is tied to the GPU that it was built on. A processor matters only in the benchmark.
            device=describe_device(self.target) if device_of(self.target) == "cuda" else "",
            code=code_versions(*self.built_by),
            libraries=libraries,
            **self._judged(work, goal),
        )
        record = record.model_copy(update={"digest": made_of.digest, "status": "built"})
        if isinstance(graph, OnnxGraph):
            record = record.model_copy(update={"inputs": graph.inputs, "output": graph.output, "width": graph.width})

        def make(folder: Path) -> Engine:
            if spec.runtime == "torch":  # nothing to build, so no child process either
                return record
            return self._build(work, record, goal, libraries, folder)

        ready = record if spec.runtime == "torch" and isinstance(graph, OnnxGraph) else None
        return Recipe(made_of, make, ready)

    def _judged(self, work: Work, goal: Goal | None) -> dict[str, Any]:
        """Return the parts of the fingerprint that only engines of reduced precision have."""
        if goal is None:
            return {}
        entry = work.entry
        parts: dict[str, Any] = {
            "evaluation": work.expected(EVALUATION_SET).digest,
            "gates": goal.gates.model_dump(),
            "batch": entry.max_batch_size,
            "ladder": entry.ladder.model_dump(),
            "examiner": code_versions(*JUDGING),
        }
        if goal.tuning is not None:
            parts["profiles"] = [str(profile) for profile in goal.tuning.profiles]
            parts["tensorrt"] = entry.tensorrt.model_dump()
        return parts

    def _build(self, work: Work, record: Engine, goal: Goal | None, libraries: dict[str, str], folder: Path) -> Engine:
        spec, target, sources = self.spec, self.target, sources_of(work)
        evaluation = work.get(EVALUATION_SET) if goal is not None else None
        work.store.require_whole(sources.checkpoint, sources.graph, *([evaluation] if evaluation is not None else []))
        log = f"engine-{target}-{spec.name}"
        try:
            built, cost = work.isolated(
                build,
                sources,
                spec,
                folder,
                goal,
                device_of(target),
                what=f"{record.model}: building {spec.name} for {target}",
                log=log,
            )
        except EngineError as error:
            shutil.rmtree(folder)
            folder.mkdir()
            printed = work.workspace.log(record.model, log)
            reason = f"{error} The output of its libraries is in {printed}."
            return record.model_copy(update={"status": "failed", "reason": reason})
        write_script(recipe_of(sources, spec, target, built, folder, libraries, evaluation, goal), folder)
        return record.model_copy(
            update={
                "entry_file": built.entry_file,
                "parameters": built.parameters,
                "operators": built.operators,
                "kept": built.kept,
                "steps": built.steps,
                "documents": (SCRIPT, *built.documents),
                **cost,
            }
        )


def goal_of(work: Work, spec: EngineSpec) -> Goal:
    """Return what an engine of reduced precision has to reach."""
    entry, evaluation = work.entry, work.found(EVALUATION_SET)
    return Goal(
        # In a plan there may be no evaluation set yet, and nothing reads it.
        evaluation_folder=work.folder(evaluation) if isinstance(evaluation, EvaluationSet) else Path(),
        gates=entry.accuracy_gates(),
        max_batch_size=entry.max_batch_size,
        trials=entry.ladder.trials,
        seconds=entry.ladder.seconds,
        tuning=tuning_of(work, work.get(CHECKPOINT)) if spec.tuned else None,
    )


def built_with(spec: EngineSpec, device: Device) -> dict[str, str]:
    """Return the versions of all libraries that build and run an engine of the spec on the device."""
    return {
        **library_versions(*LIBRARIES[spec.runtime]),
        **(cuda_packages() if device == "cuda" else {}),
        **(tensorrt_packages() if spec.tuned else {}),
    }


def sources_of(work: Work) -> Sources:
    """Return the records that a model's engines are built from, with their folders."""
    checkpoint, graph = work.get(CHECKPOINT), work.get(ONNX_GRAPH)
    return Sources(checkpoint, work.folder(checkpoint), graph, work.folder(graph), work.entry.trust)


def checkpoint_folder(work: Work, checkpoint: Checkpoint) -> Path:
    """Return the checkpoint's folder, or in a plan that of the previous checkpoint if there is no copy yet."""
    folder = work.folder(checkpoint)
    before = None if folder.is_dir() else work.last(CHECKPOINT)
    return folder if before is None else work.folder(before)


def tuning_of(work: Work, checkpoint: Checkpoint) -> Tuning:
    """Return what an engine is tuned for. Raises CheckpointError for shapes that are too long."""
    from resources.pipelines.tokenization import buckets_up_to  # numpy

    entry, workspace = work.entry, work.workspace
    encoder = json.loads((checkpoint_folder(work, checkpoint) / "encoder.json").read_text(encoding="utf-8"))
    buckets: Sequence[int] = encoder.get("buckets") or buckets_up_to(checkpoint.max_tokens)
    shapes = shapes_of(entry, checkpoint)
    return Tuning(
        profiles=profiles_of(buckets, shapes, entry.max_batch_size, entry.tensorrt.profiles),
        settings=entry.tensorrt,
        caches=work.store.caches,
        seconds=_BUILDING_SHARE * workspace.limits.timeout_s,
    )


def _unsupported(record: Engine, reason: str) -> Recipe[Engine]:
    """Return the recipe of an unsupported engine's record. Of its inputs, only the reason counts."""
    made_of = Fingerprint.of("engine", model=record.model, spec=record.name, target=record.target, unsupported=reason)
    return Recipe.of_ready(made_of, record.model_copy(update={"digest": made_of.digest, "reason": reason}))
