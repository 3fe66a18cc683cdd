"""ONNX Runtime: the exported graph with its attention fused, in fp32 or with matrices in int8."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from resources.artifacts.records import Engine
from resources.engines import Built, EngineSpec, Sources
from resources.engines.sessions import open_session
from resources.errors import EngineError
from resources.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir

    from resources.engines.ladder import Operator
    from resources.evaluation.answering import Run
    from resources.evaluation.examiner import Examiner
    from resources.evaluation.goal import Goal

MODEL_FILE = "model.onnx"


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None) -> Built:
    """Fuse, then quantize where the spec says so, and run the result once before it counts as built."""
    model = folder / MODEL_FILE
    fused, fusions = _fuse(sources.graph_folder / MODEL_FILE)
    parameters = {"fusion": "onnxscript ort_fusions", **{f"fused_{name}": str(n) for name, n in fusions.items()}}
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    if spec.precision == "fp32":
        _save(fused, model, external=sources.graph.external_data)
    elif spec.precision == "int8":
        assert goal is not None, "whoever builds a reduced precision says what it has to reach"
        more, kept, steps = _quantize(fused, spec, sources, goal, model)
        parameters |= more
    else:
        raise EngineError(f"{spec.name}: {spec.precision} is not built for CPUs.")
    _try_once(model, sources)
    proto = onnx.load(model, load_external_data=False)
    return Built(MODEL_FILE, parameters, dict(Counter(node.op_type for node in proto.graph.node)), kept, steps)


def _fuse(source: Path) -> tuple[onnx_ir.Model, dict[str, int]]:
    """Rewrite attention, normalization and activation into ONNX Runtime's own operators; count the fusions.

    `onnxruntime.transformers.optimizer` knows the patterns of the old exporter only: on the graphs of today's it fuses
    no attention at all, and `onnxscript`'s rules fuse all of it.
    """
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, counts = optimize_for_ort(onnx_ir.load(source))
    return model, {name: int(count) for name, count in counts.items() if count}


def _save(model: onnx_ir.Model, path: Path, *, external: bool) -> None:
    """Write a graph, its weights in a file beside it where `external`.

    Exporters write down stack traces, and so the folders of the machine; those are left out.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def _quantize(
    fused: onnx_ir.Model, spec: EngineSpec, sources: Sources, goal: Goal, target: Path
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Write the fused graph with as many of its matrices in int8 as the accuracy gates allow.

    Returns parameters, the operators left in fp32, and what was tried. Where nothing keeps the gates, everything is in
    int8 and `steps` says so; the benchmark then measures what it would have been worth.
    """
    from resources.engines import quantization
    from resources.engines.ladder import search
    from resources.evaluation.examiner import Examiner

    quantization.prepare(fused)
    operators = quantization.find_operators(fused)
    if not operators:
        raise EngineError(f"{spec.name}: the graph has no matrix product with a constant weight of 16 columns or more.")
    examiner = Examiner(goal, sources.checkpoint, sources.checkpoint_folder, sources.graph.width)
    trial = target.with_name("trial.onnx")
    # Each loaded graph is dropped before the next one: together they would take several times the model's memory.
    watching, watched = quantization.watched_graph(fused, operators)
    activations = quantization.watch(_runner(watching, trial, sources).outputs, watched, examiner.calibration_batches())
    static = spec.quantization == "static"
    weights = {
        name: quantization.quantize_weight(weight, activations[name], static=static)
        for name, weight in quantization.weights_of(fused, operators).items()
    }
    switched = quantization.switched_graph(fused, operators, weights)
    trials = _Trials(_runner(switched, trial, sources), operators, examiner)
    outcome = search(operators, trials.damage, trials.misses, trials=goal.trials, seconds=goal.seconds)
    del trials, switched
    _save(quantization.quantize(fused, operators, weights, outcome.kept), target, external=sources.graph.external_data)
    smoothed = sum(weight.smoothing is not None for weight in weights.values())
    parameters = {
        "quantization": spec.quantization,
        "int8_operators": f"{len(operators) - len(outcome.kept)} of {len(operators)}",
        "smoothed_operators": f"{smoothed} of {len(operators)}",
        "ladder": ("not needed" if not outcome.kept else "gates kept") if outcome.passed else outcome.steps[-1],
    }
    return parameters, outcome.kept, outcome.steps


def _runner(model: onnx_ir.Model, path: Path, sources: Sources) -> OnnxRuntimeRunner:
    """The graph, loaded from a file that is gone again. With all cores: nothing else is built or measured meanwhile."""
    try:
        _save(model, path, external=True)  # or the runtime would hold every weight twice while it loads
        return OnnxRuntimeRunner(path, sources.graph.output, threads=len(os.sched_getaffinity(0)))
    finally:
        for leftover in path.parent.glob(f"{path.name}*"):
            leftover.unlink()


class _Trials:
    """The trials of the ladder, on one loaded graph with a switch at each operator."""

    def __init__(self, runner: OnnxRuntimeRunner, operators: Sequence[Operator], examiner: Examiner) -> None:
        self._runner, self._examiner = runner, examiner
        self._names = [operator.name for operator in operators]
        self._batches = examiner.screening_batches()
        self._exact = self._answers([])

    def damage(self, quantized: Collection[str]) -> float:
        """Relative error of the answers' numbers where only those operators run in int8; infinite where one is NaN."""
        errors = [
            float(np.linalg.norm(found - exact)) / (float(np.linalg.norm(exact)) or 1.0)
            for found, exact in zip(self._answers(quantized), self._exact, strict=True)
        ]
        total = float(np.sqrt(np.mean(np.square(errors))))
        return total if np.isfinite(total) else float("inf")

    def misses(self, kept: Collection[str]) -> list[str]:
        """The gates that are missed where all operators but those run in int8."""
        return self._examiner.misses(self._running([name for name in self._names if name not in kept]))

    def _answers(self, quantized: Collection[str]) -> list[np.ndarray]:
        """One array a row, without what belongs to its padding."""
        run, found = self._running(quantized), []
        for batch, tokens in self._batches:
            for row, count in zip(run(batch), tokens, strict=True):
                found.append(row[:count] if row.ndim == 2 else row)
        return found

    def _running(self, quantized: Collection[str]) -> Run:
        from resources.engines.quantization import SWITCHES

        switches = np.array([name in quantized for name in self._names])
        return lambda batch: self._runner.run({**batch, SWITCHES: switches})


def _try_once(model: Path, sources: Sources) -> None:
    """Raise EngineError where the runtime refuses the graph or answers with anything but finite numbers."""
    runner = OnnxRuntimeRunner(model, sources.graph.output, threads=1)
    task = TASKS[sources.checkpoint.task]
    shape = (2, 8)
    batch = {
        name: np.ones((2, 1) if name in task.extra_inputs else shape, dtype=np.int64) for name in sources.graph.inputs
    }
    if "token_type_ids" in batch:
        batch["token_type_ids"][:] = 0
    answer = runner.run(batch)
    expected = (*shape, sources.graph.width) if task.per_token else (2, sources.graph.width)
    if answer.shape != expected or not np.isfinite(answer).all():
        raise EngineError(f"The engine answers {answer.shape} with values {answer.ravel()[:4]} to a batch of ones.")


class OnnxRuntimeRunner:
    """One session on the CPU."""

    def __init__(self, model: Path, output: str, threads: int) -> None:
        try:
            self._session = open_session(str(model), threads)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0][:300]}") from error
        self._output = output
        self._inputs = {item.name for item in self._session.get_inputs()}

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.outputs([self._output], batch)[0]

    def outputs(self, names: Sequence[str], batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of those names."""
        answers: list[np.ndarray] = self._session.run(
            list(names), {name: array for name, array in batch.items() if name in self._inputs}
        )
        return answers


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> OnnxRuntimeRunner:
    """A session over the engine's graph."""
    del sources
    return OnnxRuntimeRunner(folder / engine.entry_file, engine.output, threads)
