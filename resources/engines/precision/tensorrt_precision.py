"""The exported graph in the precision that a strongly typed TensorRT engine is to have.

Strongly typed means: the types of the graph are those of the engine, and its precision is decided here and not by
TensorRT. So the graph starts as the exporter wrote it, in standard operators (those of ONNX Runtime mean nothing to
TensorRT's parser), and every Cast, QuantizeLinear and DequantizeLinear in it is on purpose.

It is judged on the processor, where ONNX Runtime computes in fp32 and rounds to 8 bits what the graph says is that; for
fp16 and bf16 see `half`. Its own fusion of 8-bit products is switched off: it saturates on processors without VNNI, as
no GPU does, and breaks on fp8. Kernels of GPUs sum in fp32 and round less often than the graph says, so an engine is a
little closer to PyTorch than what is judged here; the benchmark judges it again.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from resources.engines.graphs import (
    by_name,
    drop_unused,
    is_op,
    name_nodes,
    replace_value,
    scalar_of,
    subgraph_inputs,
)
from resources.engines.interface import Goal, Sources
from resources.engines.onnxruntime.runner import MODEL_FILE, cpu_runner, save_graph
from resources.engines.precision import half_precision as half
from resources.engines.precision import quantization
from resources.engines.precision.ladder import Operator, Reduced, known, nodes_of, search
from resources.engines.precision.precision_search import (
    Trials,
    explained,
    near_overflow,
    open_gate_check,
    reduce_to_half,
    switched,
    verdict,
)
from resources.engines.precision.qdq import EightBits, eight_bit_weights, qdq_form
from resources.engines.specs import EngineSpec
from resources.errors import EngineError

#: Normalization over the width is computed in fp32, with casts around it, which TensorRT makes part of its kernel. Its
#: parser of version 10 asks for fp32 statistics of an fp16 normalization by itself (`stash_type`), with a warning about
#: overflow where it does not; from 11 on a layer has no precision but that of its input. A variance overflows fp16
#: where the numbers it is of are about 256. Softmax stays in half precision: it subtracts the largest score first, its
#: answers are at most 1, and TensorRT fuses attention only where nothing stands between its products and the softmax.
WIDE = frozenset({("", "LayerNormalization")})


def typed_graph(sources: Sources, spec: EngineSpec, goal: Goal | None, target: Path) -> Reduced:
    """Write the exported graph in the spec's precision to `target`.

    Inputs stay int64 and the output fp32. goal: what it has to reach, for all precisions but fp32. Raises EngineError
    where there is nothing to quantize.
    """
    model = plain_graph(sources.graph_folder / MODEL_FILE)
    if spec.precision == "fp32":
        save_graph(model, target, external=sources.graph.external_data)
        return Reduced({})
    assert goal is not None, "whoever builds a reduced precision says what it has to reach"
    drop_nan_guards(model)
    if spec.precision == "fp16" or spec.precision == "bf16":
        return reduce_to_half(model, sources, goal, target, kind=spec.precision, wide=WIDE)
    return _quantize(model, spec.precision, spec.name, sources, goal, target)


def plain_graph(source: Path) -> ir.Model:
    """The exported graph, with its weights in memory and a name for every node."""
    model = ir.external_data.load_to_model(ir.load(source))
    name_nodes(model)
    return model


def drop_nan_guards(model: ir.Model) -> int:
    """Let attention be what TensorRT fuses: product, mask, softmax, product. Returns how many guards were removed.

    The exporter writes zeros where a softmax is NaN: for rows that may attend to nothing, under a mask of minus
    infinity. In reduced precision masks are finite (`half.to_half`), and a softmax is a number.
    """
    found = 0
    for node in list(model.graph):
        if not is_op(node, "Where"):
            continue
        condition, zero, value = node.inputs
        test = condition.producer() if condition is not None else None
        softmax = value.producer() if value is not None else None
        guard = is_op(test, "IsNaN") and test is not None and test.inputs[0] is value and is_op(softmax, "Softmax")
        if guard and value is not None and scalar_of(zero) == 0.0:
            replace_value(node.outputs[0], value)
            found += 1
    drop_unused(model)
    return found


def _quantize(model: ir.Model, kind: EightBits, name: str, sources: Sources, goal: Goal, target: Path) -> Reduced:
    """Write the graph with as many of its matrices in 8 bits as the accuracy gates allow, and all else in fp16.

    What overflows fp16 stays in fp32; a matrix there is quantized all the same, from fp32 to fp32.
    """
    operators = find_operators(model)
    if not operators:
        raise EngineError(f"{name}: the graph has no matrix product with a constant weight of 16 columns or more.")
    gate_check = open_gate_check(goal, sources)
    trial = target.with_name("trial.onnx")
    # Each loaded graph is dropped before the next one: together they would take several times the model's memory.
    near = near_overflow(model, trial, sources, gate_check)
    watching, watched = quantization.watched_graph(model, operators)
    activations = quantization.watch(
        cpu_runner(watching, trial, sources).outputs, watched, gate_check.calibration_batches()
    )
    matrices = quantization.weights_of(model, operators)
    weights = eight_bit_weights(model, operators, matrices, activations, kind)
    if goal.kept_nodes is not None:
        outcome = known(operators, goal.kept_nodes)
    else:
        # Trials leave the rest in fp32: a processor takes several times as long for fp16, which adds next to nothing
        # to the error of 8 bits. What is written is judged once more as it is.
        graph = quantization.switched_graph(model, operators, weights, qdq_form)
        runner = cpu_runner(graph, trial, sources, as_written=True)
        trials = Trials(switched(runner, operators), operators, gate_check)
        outcome = search(operators, trials.damage, trials.misses, trials=goal.trials, seconds=goal.seconds)
        del trials, runner, graph

    def written(*, emulated: bool) -> ir.Model:
        halved = half.to_half(model, near, wide=WIDE, emulated=emulated)
        return quantization.quantize(halved, operators, weights, outcome.kept, qdq_form)

    missed = []
    if outcome.passed and goal.kept_nodes is None:
        missed = gate_check.misses(cpu_runner(written(emulated=True), trial, sources, as_written=True).run)
    final = written(emulated=False)
    share_inputs(final)
    save_graph(final, target, external=sources.graph.external_data)
    last = (f"not rescued: with all else in fp16 {'; '.join(missed)}",) if missed else ()
    paths, steps = explained(model, near)
    used = [weights[operator.name] for operator in operators if operator.name not in outcome.kept]
    parameters = {
        f"{kind}_operators": f"{len(used)} of {len(operators)}",
        "smoothed_operators": f"{sum(weight.smoothing is not None for weight in used)} of {len(used)}",
        "overflowing_operators": str(len(near)),
        "ladder": last[0] if last else verdict(outcome),
    }
    kept = tuple(dict.fromkeys([*paths, *outcome.kept]))
    return Reduced(parameters, kept, (*steps, *outcome.steps, *last), nodes_of(operators, outcome.kept))


def find_operators(model: ir.Model) -> list[Operator]:
    """The products that are worth 8 bits: those of what a text says. TensorRT computes those of constants only once."""
    nodes = by_name(model)
    found = []
    for operator in quantization.find_operators(model):
        inputs = [nodes[name].inputs[0] for name in operator.nodes]
        if any(value is not None and subgraph_inputs(value)[0] for value in inputs):
            found.append(operator)
    return found


def share_inputs(model: ir.Model) -> None:
    """Let products with the same input read one quantized form of it."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    CommonSubexpressionEliminationPass()(model)
    drop_unused(model)
