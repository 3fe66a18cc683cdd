"""ONNX Runtime: the exported graph fused, in fp32, with matrices in int8 on CPUs, or in half precision on GPUs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from resources.artifacts.records import Engine
from resources.engines import Built, EngineSpec, Runner, Sources
from resources.engines.fusion import fuse
from resources.engines.ladder import Reduced, known, nodes_of, search
from resources.engines.sessions import open_session
from resources.errors import EngineError, first_line
from resources.pipelines.tokenization import TextEncoder
from resources.targets import Device, device_of
from resources.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir

    from resources.evaluation.goal import Goal

MODEL_FILE = "model.onnx"


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None, device: Device) -> Built:
    """Fuse, then reduce the precision where the spec says so, and run the result once before it counts as built."""
    model = folder / MODEL_FILE
    fused, fusions = fuse(sources.graph_folder / MODEL_FILE)
    parameters = {f"fused_{name}": str(n) for name, n in fusions.items()}
    reduced = Reduced({})
    if spec.precision == "fp32":
        save_graph(fused, model, external=sources.graph.external_data)
    else:
        assert goal is not None, "whoever builds a reduced precision says what it has to reach"
        reduce = _quantize if spec.precision == "int8" else _halve
        reduced = reduce(fused, spec, sources, goal, model, device)
        parameters |= reduced.parameters
    parameters |= _try_once(model, sources, device)
    proto = onnx.load(model, load_external_data=False)
    operators = dict(Counter(node.op_type for node in proto.graph.node))
    return Built(MODEL_FILE, parameters, operators, reduced.kept, reduced.steps, reduced.kept_nodes)


def save_graph(model: onnx_ir.Model, path: Path, *, external: bool) -> None:
    """Write a graph, its weights in a file beside it where `external`.

    Exporters write down stack traces, and so the folders of the machine; those are left out.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def _quantize(
    fused: onnx_ir.Model, spec: EngineSpec, sources: Sources, goal: Goal, target: Path, device: Device
) -> Reduced:
    """Write the fused graph with as many of its matrices in int8 as the accuracy gates allow.

    Where nothing keeps the gates, everything is in int8 and `steps` says so; the benchmark then measures what it would
    have been worth.
    """
    assert device == "cpu", "GPUs have no kernels for these"
    from resources.engines import quantization
    from resources.engines.reduced import Trials, switched, verdict
    from resources.evaluation.examiner import Examiner

    operators = quantization.find_operators(fused)
    if not operators:
        raise EngineError(f"{spec.name}: the graph has no matrix product with a constant weight of 16 columns or more.")
    examiner = Examiner(goal, sources.checkpoint, sources.checkpoint_folder, sources.graph.width)
    trial = target.with_name("trial.onnx")
    # Each loaded graph is dropped before the next one: together they would take several times the model's memory.
    watching, watched = quantization.watched_graph(fused, operators)
    activations = quantization.watch(
        cpu_runner(watching, trial, sources).outputs, watched, examiner.calibration_batches()
    )
    static = spec.quantization == "static"
    weights = {
        name: quantization.quantize_weight(weight, activations[name], static=static)
        for name, weight in quantization.weights_of(fused, operators).items()
    }
    if goal.kept_nodes is not None:
        outcome = known(operators, goal.kept_nodes)
    else:
        graph = quantization.switched_graph(fused, operators, weights)
        trials = Trials(switched(cpu_runner(graph, trial, sources), operators), operators, examiner)
        outcome = search(operators, trials.damage, trials.misses, trials=goal.trials, seconds=goal.seconds)
        del trials, graph
    save_graph(
        quantization.quantize(fused, operators, weights, outcome.kept), target, external=sources.graph.external_data
    )
    used = [weights[operator.name] for operator in operators if operator.name not in outcome.kept]
    parameters = {
        "quantization": spec.quantization,
        "int8_operators": f"{len(used)} of {len(operators)}",
        "smoothed_operators": f"{sum(weight.smoothed for weight in used)} of {len(used)}",
        "split_operators": f"{sum(weight.outliers is not None for weight in used)} of {len(used)}",
        "ladder": verdict(outcome),
    }
    return Reduced(parameters, outcome.kept, outcome.steps, nodes_of(operators, outcome.kept))


def _halve(
    fused: onnx_ir.Model, spec: EngineSpec, sources: Sources, goal: Goal, target: Path, device: Device
) -> Reduced:
    """Write the fused graph with as much of it in half precision as stays finite and keeps the accuracy gates."""
    from resources.engines.half import WITHOUT_BF16
    from resources.engines.reduced import halve

    if spec.precision == "bf16":
        return halve(fused, sources, goal, target, kind="bf16", wide=WITHOUT_BF16, device=device)
    return halve(fused, sources, goal, target, device=device)


def cpu_runner(model: onnx_ir.Model, path: Path, sources: Sources, *, as_written: bool = False) -> OnnxRuntimeRunner:
    """The graph, loaded to run on the processor, from a file that is gone again.

    as_written: QuantizeLinear and DequantizeLinear stay what they are, instead of becoming part of a product.
    """
    runner = trial_runner(model, path, sources, "cpu", as_written=as_written)
    assert isinstance(runner, OnnxRuntimeRunner), "that is what runs on CPUs"
    return runner


def trial_runner(
    model: onnx_ir.Model, path: Path, sources: Sources, device: Device, *, as_written: bool = False
) -> OnnxRuntimeRunner | CudaRunner:
    """The graph, loaded from a file that is gone again. With all cores: nothing is measured meanwhile."""
    try:
        save_graph(model, path, external=True)  # or the runtime would hold every weight twice while it loads
        return _open(
            path, sources.graph.output, len(os.sched_getaffinity(0)), device, graphs=False, as_written=as_written
        )
    finally:
        for leftover in path.parent.glob(f"{path.name}*"):
            leftover.unlink()


def _try_once(model: Path, sources: Sources, device: Device) -> dict[str, str]:
    """Raise EngineError where the runtime refuses the graph or answers with anything but finite numbers.

    Returns what the runtime found out about the graph, as parameters.
    """
    runner = _open(model, sources.graph.output, 1, device)
    check_answer(runner, sources)
    return {} if isinstance(runner, OnnxRuntimeRunner) else {"cuda_graphs": runner.why_no_graphs or "captured"}


def check_answer(runner: Runner, sources: Sources) -> None:
    """Raise EngineError where the engine answers a batch of one token with anything but finite numbers."""
    task = TASKS[sources.checkpoint.task]
    rows, tokens = 2, 8
    encoder = TextEncoder.from_folder(str(sources.checkpoint_folder))
    answer = runner.run(encoder.example(rows, tokens, task.extra_inputs))
    expected = (rows, tokens, sources.graph.width) if task.per_token else (rows, sources.graph.width)
    if answer.shape != expected or not np.isfinite(answer).all():
        raise EngineError(f"The engine answers {answer.shape} with values {answer.ravel()[:4]} to a plain batch.")


class OnnxRuntimeRunner:
    """One session on the CPU."""

    def __init__(
        self, model: Path, output: str, threads: int, *, spinning: bool = True, as_written: bool = False
    ) -> None:
        try:
            self._session = open_session(str(model), threads, spinning=spinning, as_written=as_written)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
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


class CudaRunner:
    """One session on the first GPU."""

    def __init__(self, model: Path, output: str, threads: int, *, graphs: bool = True) -> None:
        from resources.engines.cuda import CudaSession

        try:
            self._session = CudaSession(model, output, graphs=graphs, threads=threads)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error

    @property
    def why_no_graphs(self) -> str:
        """Why no CUDA graphs are captured; empty where they are."""
        return self._session.why_no_graphs

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._session.run(batch)


def _open(
    path: Path,
    output: str,
    threads: int,
    device: Device,
    *,
    graphs: bool = True,
    spinning: bool = True,
    as_written: bool = False,
) -> OnnxRuntimeRunner | CudaRunner:
    if device == "cuda":
        return CudaRunner(path, output, threads, graphs=graphs)
    return OnnxRuntimeRunner(path, output, threads, spinning=spinning, as_written=as_written)


def load(
    engine: Engine, folder: Path, sources: Sources, threads: int, *, spinning: bool = True
) -> OnnxRuntimeRunner | CudaRunner:
    """A session over the engine's graph."""
    del sources
    return _open(folder / engine.entry_file, engine.output, threads, device_of(engine.target), spinning=spinning)
