"""Build the ONNX Runtime engines: the exported graph, fused.

The engines compute in fp32, with matrices in int8 on CPUs, or in half precision on GPUs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from resources.artifacts.records import Engine
from resources.engines.fusion import fuse
from resources.engines.interface import Built, Sources
from resources.engines.onnxruntime.runner import (
    MODEL_FILE,
    CudaRunner,
    OnnxRuntimeRunner,
    check_answer,
    cpu_runner,
    open_runner,
    save_graph,
)
from resources.engines.precision.ladder import Reduced, known, nodes_of, search
from resources.engines.specs import EngineSpec
from resources.errors import EngineError
from resources.machine.targets import Device, device_of

if TYPE_CHECKING:
    import onnx_ir

    from resources.engines.interface import Goal


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None, device: Device) -> Built:
    """Fuse the graph, reduce its precision if the spec asks for it, and run the result once as a check."""
    model = folder / MODEL_FILE
    fused, fusions = fuse(sources.graph_folder / MODEL_FILE)
    parameters = {f"fused_{name}": str(n) for name, n in fusions.items()}
    reduced = Reduced({})
    if spec.precision == "fp32":
        save_graph(fused, model, external=sources.graph.external_data)
    else:
        assert goal is not None, "an engine of reduced precision is built with a goal"
        reduce = _quantize if spec.precision == "int8" else _reduce_to_half
        reduced = reduce(fused, spec, sources, goal, model, device)
        parameters |= reduced.parameters
    parameters |= _try_once(model, sources, device)
    proto = onnx.load(model, load_external_data=False)
    operators = dict(Counter(node.op_type for node in proto.graph.node))
    return Built(MODEL_FILE, parameters, operators, reduced.kept, reduced.steps, reduced.kept_nodes)


def _quantize(
    fused: onnx_ir.Model, spec: EngineSpec, sources: Sources, goal: Goal, target: Path, device: Device
) -> Reduced:
    """Write the fused graph with as many of its matrices in int8 as the accuracy gates allow.

    If no trial passes the gates, all matrices are in int8 and `steps` says so. The benchmark then measures how fast
    that engine would have been.
    """
    assert device == "cpu", "GPUs have no kernels for the int8 operators"
    from resources.engines.precision import quantization
    from resources.engines.precision.precision_search import Trials, open_gate_check, switched, verdict

    operators = quantization.find_operators(fused)
    if not operators:
        raise EngineError(f"{spec.name}: the graph has no matrix product with a constant weight of 16 columns or more.")
    gate_check = open_gate_check(goal, sources)
    trial = target.with_name("trial.onnx")
    # Each loaded graph is dropped before the next one is loaded. Together they would need several times the model's
    # memory.
    watching, watched = quantization.watched_graph(fused, operators)
    activations = quantization.watch(
        cpu_runner(watching, trial, sources).outputs, watched, gate_check.calibration_batches()
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
        trials = Trials(switched(cpu_runner(graph, trial, sources), operators), operators, gate_check)
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


def _reduce_to_half(
    fused: onnx_ir.Model, spec: EngineSpec, sources: Sources, goal: Goal, target: Path, device: Device
) -> Reduced:
    """Write the fused graph with as much of it in half precision as stays finite and passes the accuracy gates."""
    from resources.engines.precision.half_precision import WITHOUT_BF16
    from resources.engines.precision.precision_search import reduce_to_half

    if spec.precision == "bf16":
        return reduce_to_half(fused, sources, goal, target, kind="bf16", wide=WITHOUT_BF16, device=device)
    return reduce_to_half(fused, sources, goal, target, device=device)


def _try_once(model: Path, sources: Sources, device: Device) -> dict[str, str]:
    """Run the graph once to check that it works.

    Returns:
        The findings of the runtime about the graph, as parameters of the engine.

    Raises:
        EngineError: The runtime refuses the graph, or its answer fails `check_answer`.
    """
    runner = open_runner(model, sources.graph.output, 1, device)
    check_answer(runner, sources)
    return {} if isinstance(runner, OnnxRuntimeRunner) else {"cuda_graphs": runner.why_no_graphs or "captured"}


def load(
    engine: Engine, folder: Path, sources: Sources, threads: int, *, spinning: bool = True
) -> OnnxRuntimeRunner | CudaRunner:
    """Return a session that runs the engine's graph."""
    del sources
    return open_runner(folder / engine.entry_file, engine.output, threads, device_of(engine.target), spinning=spinning)
