"""Write the exported graph in the precision that a strongly typed TensorRT engine is to have.

A strongly typed engine has the types of its graph, so this module decides the precision and TensorRT does not. The
graph starts as the exporter wrote it, in standard operators, because TensorRT's parser does not know ONNX Runtime's
own. Every Cast, QuantizeLinear and DequantizeLinear in it is deliberate.

The graph is judged on the CPU, where ONNX Runtime computes in fp32 and rounds to 8 bits wherever the graph says so;
`half_precision` describes fp16 and bf16. ONNX Runtime's own fusion of 8-bit products is switched off: it saturates on
processors without VNNI, which no GPU does, and it breaks on fp8. GPU kernels sum in fp32 and round less often than the
graph says. An engine is therefore a little closer to PyTorch than the graph that is judged here, and the benchmark
judges the engine again.
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

#: Normalization over the width is computed in fp32, with casts around it that TensorRT makes part of its kernel. The
#: parser of TensorRT 10 asks for fp32 statistics of an fp16 normalization by itself (`stash_type`), and warns about
#: overflow where it does not ask for them. From TensorRT 11 on a layer has only the precision of its input. A variance
#: overflows fp16 where the numbers are about 256. Softmax stays in half precision: it subtracts the largest score
#: first, its answers are at most 1, and TensorRT fuses attention only where nothing stands between its products and the
#: softmax.
WIDE = frozenset({("", "LayerNormalization")})


def typed_graph(sources: Sources, spec: EngineSpec, goal: Goal | None, target: Path) -> Reduced:
    """Write the exported graph in the spec's precision to `target`.

    Inputs stay int64 and the output stays fp32. All precisions except fp32 need a goal.

    Raises:
        EngineError: The graph has nothing to quantize.
    """
    model = plain_graph(sources.graph_folder / MODEL_FILE)
    if spec.precision == "fp32":
        save_graph(model, target, external=sources.graph.external_data)
        return Reduced({})
    assert goal is not None, "an engine of reduced precision is built with a goal"
    drop_nan_guards(model)
    if spec.precision == "fp16" or spec.precision == "bf16":
        return reduce_to_half(model, sources, goal, target, kind=spec.precision, wide=WIDE)
    return _quantize(model, spec.precision, spec.name, sources, goal, target)


def plain_graph(source: Path) -> ir.Model:
    """Return the exported graph, with its weights in memory and a name for every node."""
    model = ir.external_data.load_to_model(ir.load(source))
    name_nodes(model)
    return model


def drop_nan_guards(model: ir.Model) -> int:
    """Remove the NaN guards of attention, so that TensorRT can fuse product, mask, softmax and product.

    The exporter replaces the softmax with zeros where it is NaN. That happens in rows that may attend to nothing, under
    a mask of minus infinity. In reduced precision the masks are finite (`half_precision.to_half`), so the softmax is a
    number.

    Returns:
        The number of guards that were removed.
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
    """Write the graph with as many of its matrices in 8 bits as the accuracy gates allow, and the rest in fp16.

    Nodes that overflow fp16 stay in fp32. A matrix among them is quantized all the same, from fp32 to fp32.
    """
    operators = find_operators(model)
    if not operators:
        raise EngineError(f"{name}: the graph has no matrix product with a constant weight of 16 columns or more.")
    gate_check = open_gate_check(goal, sources)
    trial = target.with_name("trial.onnx")
    # Each loaded graph is dropped before the next one is loaded. Together they would need several times the model's
    # memory.
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
        # The trials leave the rest in fp32. A CPU takes several times as long for fp16, which adds next to nothing to
        # the error of 8 bits. The graph that is written is judged once more as it is.
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
    last = (f"not rescued: with all other operators in fp16, {'; '.join(missed)}",) if missed else ()
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
    """Return the products that are worth 8 bits, which are those that depend on the text.

    TensorRT computes products of constants only once.
    """
    nodes = by_name(model)
    found = []
    for operator in quantization.find_operators(model):
        inputs = [nodes[name].inputs[0] for name in operator.nodes]
        if any(value is not None and subgraph_inputs(value)[0] for value in inputs):
            found.append(operator)
    return found


def share_inputs(model: ir.Model) -> None:
    """Let products with the same input read one quantized copy of it."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    CommonSubexpressionEliminationPass()(model)
    drop_unused(model)
