"""Write int8 matrix products into a graph that was fused for ONNX Runtime.

Weights are symmetric signed int8 with one scale for each column. Activations are asymmetric unsigned int8 with one
scale for each tensor, which is computed for each batch (dynamic) or fixed beforehand on real text (static). The
products are written with ONNX Runtime's own operators for them (`DynamicQuantizeMatMul`, `MatMulIntegerToFloat`). No
optimizer then has to recognize a pattern, and the ladder tries exactly the kernels that are served.

Activations of transformers have a few channels that are much larger than all others, and leave few of the 256 steps to
the others. The largest channels are therefore divided by a factor, and the rows of the weight are multiplied by it, as
in SmoothQuant (https://arxiv.org/abs/2211.10438). Each matrix chooses its strength by the error that it makes on real
text. For all-MiniLM-L6-v2 this lifts the worst cosine of the int8 engine with its second feed-forward matrices in fp32
from .970 to .990.

A few of the channels that are still large are then multiplied apart, in fp32, as in LLM.int8()
(https://arxiv.org/abs/2208.07339), where that about halves the error. With every matrix of all-MiniLM-L6-v2 in int8
this lifts the mean and the worst cosine from .993 and .964 to .998 and .98.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from resources.engines.graphs import (
    CONTRIB,
    add_initializer,
    array_of,
    by_name,
    drop_unused,
    module_path,
    replace_value,
    unique,
)
from resources.engines.precision.ladder import Operator
from resources.errors import EngineError

#: Narrower matrices, such as the head of a classifier, cost little time in fp32 and much accuracy in int8.
NARROWEST = 16
#: The exponents of SmoothQuant that are tried; 0 means no smoothing.
STRENGTHS = (0.0, 0.5, 0.6, 0.7, 0.8)
#: Smoothing costs one operator more, so its error has to be lower by this factor.
WORTH_SMOOTHING = 0.9
#: The largest number of channels that are multiplied apart, and the number of rows for each such channel.
OUTLIERS, ROWS_AN_OUTLIER = 8, 16
#: Multiplying apart costs four operators more, so its error has to be lower by this factor. For all-MiniLM-L6-v2 that
#: holds for 4 of 24 matrices, which takes 3 percent of an engine's time at 8x128. With 0.75 it holds for 9 and takes 8
#: percent.
WORTH_SPLITTING = 0.55
_SAMPLED_TOKENS = 384
#: The input of the trial graph that switches its operators, bool `[operators]`: true means int8.
SWITCHES = "refinery_switches"


class ReadOutputs(Protocol):
    """A function that returns the outputs of those names for one batch of inputs."""

    def __call__(self, names: Sequence[str], batch: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """Return one array a name."""


@dataclass(frozen=True)
class Activations:
    """The values that the input of a matrix takes on real text.

    Args:
        low: The smallest value of each channel, fp32 `[rows]`.
        high: The largest value of each channel, fp32 `[rows]`.
        sample: The input of some of the tokens, fp32 `[tokens, rows]`.
    """

    low: np.ndarray
    high: np.ndarray
    sample: np.ndarray


@dataclass(frozen=True)
class Int8Weight:
    """A weight `[rows, columns]` in int8, and the treatment of its input.

    Args:
        values: The weight in int8. The rows of `outliers` are 0.
        scale: The scale of each column, fp32 `[columns]`.
        smoothing: The factors that the input is multiplied by before the product, or None. They are 0 for `outliers`.
        input_scale: The scale of a static input, else None.
        input_zero_point: The zero point of a static input, else None.
        outliers: The channels of the input that are multiplied apart, int64 `[channels]`, or None if all are in int8.
        outlier_rows: The rows of the weight for `outliers`, fp32 `[channels, columns]`, or None.
        error: The relative error of the product on the sampled tokens.
    """

    values: np.ndarray
    scale: np.ndarray
    smoothing: np.ndarray | None
    input_scale: np.ndarray | None
    input_zero_point: np.ndarray | None
    outliers: np.ndarray | None
    outlier_rows: np.ndarray | None
    error: float

    @property
    def smoothed(self) -> bool:
        """Return whether channels are scaled. Taking channels out does not count."""
        return self.smoothing is not None and bool(((self.smoothing != 0) & (self.smoothing != 1)).any())


def find_operators(model: ir.Model) -> list[Operator]:
    """Return the matrix products that can run in int8, in the order of the graph."""
    found: dict[str, tuple[tuple[int, ...], list[ir.Node]]] = {}
    for node in model.graph:
        matrix = _matrix(node)
        if matrix is not None and min(array_of(matrix).shape) >= NARROWEST:
            found.setdefault(str(matrix.name), (array_of(matrix).shape, []))[1].append(node)
    names = unique([module_path(nodes[0]) for _, nodes in found.values()])
    return [
        Operator(name, rows, columns, tuple(str(node.name) for node in nodes))
        for name, ((rows, columns), nodes) in zip(names, found.values(), strict=True)
    ]


def watched_graph(model: ir.Model, operators: Sequence[Operator]) -> tuple[ir.Model, dict[str, list[str]]]:
    """Return a copy of the model that also outputs the input of each operator.

    Returns:
        The copy, and the names of those outputs by operator.
    """
    copy = model.clone()
    nodes = by_name(copy)
    watched = {operator.name: [nodes[name].inputs[0] for name in operator.nodes] for operator in operators}
    known = {value.name for value in copy.graph.outputs}
    for value in {value.name: value for values in watched.values() for value in values}.values():
        if value.name not in known:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            copy.graph.outputs.append(value)
    return copy, {name: [value.name for value in values] for name, values in watched.items()}


def watch(
    run: ReadOutputs, watched: dict[str, list[str]], batches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Activations]:
    """Return the values that the operators' inputs take in the batches.

    Raises:
        EngineError: A value is not finite.
    """
    names = list(dict.fromkeys(name for values in watched.values() for name in values))
    seen: dict[str, Activations] = {}
    each = max(1, -(-_SAMPLED_TOKENS // len(batches)))
    for number, batch in enumerate(batches):
        # The tokens are sampled at random. The first and the last token of a row are always the same two and unlike all
        # others.
        random = np.random.default_rng(number)
        for name, answer in zip(names, run(names, batch), strict=True):
            tokens = answer.reshape(-1, answer.shape[-1])
            some = tokens[random.choice(len(tokens), min(each, len(tokens)), replace=False)]
            new = Activations(tokens.min(axis=0), tokens.max(axis=0), some)
            seen[name] = _joined([seen[name], new]) if name in seen else new
    for name, activations in seen.items():
        if not (np.isfinite(activations.low).all() and np.isfinite(activations.high).all()):
            raise EngineError(f"The graph computes NaN or infinity before it is quantized, in {name!r}.")
    return {operator: _joined([seen[name] for name in values]) for operator, values in watched.items()}


def _joined(parts: Sequence[Activations]) -> Activations:
    return Activations(
        np.minimum.reduce([part.low for part in parts]),
        np.maximum.reduce([part.high for part in parts]),
        np.concatenate([part.sample for part in parts]),
    )


def quantize_weight(weight: np.ndarray, activations: Activations, *, static: bool) -> Int8Weight:
    """Return the int8 form of a weight `[rows, columns]`.

    The error on the sampled tokens decides how far it is smoothed, and whether channels are multiplied apart.
    """
    weight = weight.astype(np.float32)
    exact = activations.sample @ weight
    largest = np.maximum(np.abs(activations.low), np.abs(activations.high))
    most = min(OUTLIERS, weight.shape[0] // ROWS_AN_OUTLIER)

    def best(outliers: int) -> Int8Weight:
        smoothings = (smoothing_of(largest, weight, strength) for strength in STRENGTHS)
        plain, *smoothed = (
            _quantized(weight, activations, exact, each, outliers, static=static) for each in smoothings
        )
        found = min(smoothed, key=lambda attempt: attempt.error)
        return found if found.error < plain.error * WORTH_SMOOTHING else plain

    whole, split = best(0), best(most)
    return split if split.error < whole.error * WORTH_SPLITTING else whole


def smoothing_of(largest: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray | None:
    """Return the factors that the input's channels are multiplied by, fp32 `[rows]`, with a geometric mean of 1.

    Channels smaller than the median count as the median. A channel that a few texts hardly use would otherwise be
    multiplied by a large factor, and one text that uses it would then take the steps from all other channels. For
    all-MiniLM-L6-v2 in static int8 the worst cosine, which is that of such a text, is .988 with this rule and .976
    without it.
    """
    if strength == 0.0:
        return None
    tiny = np.float32(1e-5)
    largest = np.maximum(largest, np.median(largest))
    divisor = np.maximum(largest, tiny) ** strength / np.maximum(np.abs(weight).max(axis=1), tiny) ** (1 - strength)
    smoothing: np.ndarray = np.exp(np.log(divisor).mean() - np.log(divisor)).astype(np.float32)
    return smoothing


def _quantized(
    weight: np.ndarray,
    activations: Activations,
    exact: np.ndarray,
    smoothing: np.ndarray | None,
    outliers: int,
    *,
    static: bool,
) -> Int8Weight:
    """Return the weight in int8 with that smoothing.

    The `outliers` channels that are largest after the smoothing are multiplied apart.
    """
    smoothed = weight if smoothing is None else weight / smoothing[:, None]
    apart: np.ndarray | None = None
    rows: np.ndarray | None = None
    if outliers:
        smoothing = np.ones(len(weight), np.float32) if smoothing is None else smoothing.copy()
        largest = np.maximum(np.abs(activations.low), np.abs(activations.high)) * smoothing
        apart = np.sort(np.argsort(largest, kind="stable")[-outliers:]).astype(np.int64)
        rows, smoothed = weight[apart], smoothed.copy()
        smoothing[apart], smoothed[apart] = 0.0, 0.0
    # A column of zeros may have any scale except 0.
    scale = (np.maximum(np.abs(smoothed).max(axis=0), 1e-12) / _levels(smoothed)).astype(np.float32)
    values = np.clip(np.round(smoothed / scale), -127, 127).astype(np.int8)
    inputs = activations.sample if smoothing is None else activations.sample * smoothing
    low, high = _input_range(activations, smoothing) if static else (inputs.min(), inputs.max())
    step, zero = _input_scale(low, high)
    product = _rounded(inputs, step, zero) @ (values.astype(np.float32) * scale)
    if apart is not None:
        product += activations.sample[:, apart] @ rows
    error = float(np.linalg.norm(product - exact)) / (float(np.linalg.norm(exact)) or 1.0)
    return Int8Weight(
        values,
        scale,
        smoothing,
        input_scale=np.array(step, np.float32) if static else None,
        input_zero_point=np.array(zero, np.uint8) if static else None,
        outliers=apart,
        outlier_rows=rows,
        error=error,
    )


def _levels(weight: np.ndarray) -> np.ndarray:
    """Return the number of steps up to the largest number of each column, fp32 `[columns]`: 63 to 127.

    Processors without VNNI multiply 8-bit numbers with `vpmaddubsw`, which adds two neighbouring products in 16 bits
    and saturates; twice 255 x 127 is too much. An engine has to give the same answers on every processor, so two
    neighbours of the same sign share the range of 16 bits. Other columns lose nothing. For a matrix of random numbers
    this lowers the error of the product on such a processor from 2.7 to 1.2 percent.
    """
    padded = np.pad(weight, ((0, weight.shape[0] % 2), (0, 0)))
    pairs = padded.reshape(-1, 2, weight.shape[1])
    sums = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)).max(axis=0)
    largest = np.maximum(np.abs(weight).max(axis=0), 1e-12)
    # 1 is subtracted because each of the two numbers may be rounded up by one half.
    levels: np.ndarray = np.minimum(np.floor((32767 / 255 - 1) / np.maximum(sums / largest, 1.0)), 127)
    return levels


def _input_range(activations: Activations, smoothing: np.ndarray | None) -> tuple[float, float]:
    factor = np.float32(1) if smoothing is None else smoothing
    return float((activations.low * factor).min()), float((activations.high * factor).max())


def _input_scale(low: float, high: float) -> tuple[float, int]:
    """Return the step and the zero point of unsigned int8 for values between low and high.

    Zero is always one of the steps.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    step = (high - low) / 255 or 1.0
    return step, round(-low / step)


def _rounded(values: np.ndarray, step: float, zero: int) -> np.ndarray:
    result: np.ndarray = ((np.clip(np.round(values / step) + zero, 0, 255) - zero) * step).astype(np.float32)
    return result


#: A function that takes a model, an operator's name and its weight. It returns the function that gives, for a product
#: of the operator, the nodes that replace it and the value that they compute last.
Form = Callable[[ir.Model, str, Any], Callable[[ir.Node], tuple[list[ir.Node], ir.Value]]]


def int8_form(model: ir.Model, name: str, weight: Int8Weight) -> Callable[[ir.Node], tuple[list[ir.Node], ir.Value]]:
    """Return the function that writes a product in int8 with ONNX Runtime's own operators."""
    constants = _constants(model, name, weight)
    return lambda node: _int8_nodes(node, constants)


def weights_of(model: ir.Model, operators: Sequence[Operator]) -> dict[str, np.ndarray]:
    """Return each operator's weight, fp32 `[rows, columns]`."""
    nodes = by_name(model)
    matrices = {operator.name: nodes[operator.nodes[0]].inputs[1] for operator in operators}
    return {name: array_of(matrix) for name, matrix in matrices.items() if matrix is not None}


def quantize(
    model: ir.Model,
    operators: Sequence[Operator],
    weights: Mapping[str, Any],
    kept: Collection[str],
    form: Form = int8_form,
) -> ir.Model:
    """Return a copy of the model with all operators in int8 except those in `kept`.

    `form` writes the operators; by default they are ONNX Runtime's own.
    """
    copy = model.clone()
    nodes = by_name(copy)
    for operator in operators:
        if operator.name in kept:
            continue
        write = form(copy, operator.name, weights[operator.name])
        for name in operator.nodes:
            node = nodes[name]
            new, output = write(node)
            output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
            copy.graph.insert_before(node, new)
            replace_value(node.outputs[0], output)
            copy.graph.remove(node, safe=True)
    drop_unused(copy)
    return copy


def switched_graph(
    model: ir.Model, operators: Sequence[Operator], weights: Mapping[str, Any], form: Form = int8_form
) -> ir.Model:
    """Return a copy of the model in which the input `SWITCHES` decides for each operator whether it runs in int8.

    All trials of the ladder then run on one loaded graph, and a trial costs only the time of its texts.
    """
    copy = model.clone()
    nodes = by_name(copy)
    switches = ir.val(SWITCHES, ir.DataType.BOOL, [len(operators)])
    copy.graph.inputs.append(switches)
    for number, operator in enumerate(operators):
        write = form(copy, operator.name, weights[operator.name])
        place = add_initializer(copy, f"{SWITCHES}_{number}", np.array(number, dtype=np.int64))
        switch = ir.node("Gather", [switches, place], {"axis": 0}, name=f"{SWITCHES}_{number}_taken")
        switch.outputs[0].name = switch.name
        copy.graph.insert_before(nodes[operator.nodes[0]], switch)
        for name in operator.nodes:
            node = nodes[name]
            new, output = write(node)
            same = ir.node(
                node.op_type,
                node.inputs,
                dict(node.attributes),
                domain=node.domain,
                num_outputs=1,
                name=f"{name}_as_is",
            )
            same.outputs[0].name = f"{name}_as_is"
            branches = {
                "then_branch": ir.Graph([], [output], nodes=new, name=f"{name}_int8"),
                "else_branch": ir.Graph([], [same.outputs[0]], nodes=[same], name=f"{name}_as_it_was"),
            }
            choice = ir.node("If", [switch.outputs[0]], branches, name=f"{name}_choice")
            choice.outputs[0].name = choice.name
            copy.graph.insert_before(node, choice)
            replace_value(node.outputs[0], choice.outputs[0])
            copy.graph.remove(node, safe=True)
    drop_unused(copy)
    return copy


def _matrix(node: ir.Node) -> ir.Value | None:
    """Return the constant `[rows, columns]` that the node multiplies its first input with.

    The result is None if int8 cannot do that.
    """
    product = node.op_type == "MatMul" and node.domain == ""
    attention = node.op_type == "Attention" and node.domain == CONTRIB and _plain_attention(node)
    value = node.inputs[1] if product or attention else None
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value if value.dtype == ir.DataType.FLOAT and len(value.const_value.shape) == 2 else None


def _plain_attention(node: ir.Node) -> bool:
    """Return whether MultiHeadAttention can compute the same from three projections of one width."""
    sizes = node.attributes.get("qkv_hidden_sizes")
    equal = sizes is None or len(set(sizes.as_ints())) == 1
    simple = not {"unidirectional", "do_rotary", "past_present_share_buffer"} & {
        name for name, item in node.attributes.items() if item.type == ir.AttributeType.INT and item.as_int()
    }
    given = _attention_inputs(node)
    alone = all(given[name] is None for name in ("past", "past_sequence_length"))
    return equal and simple and alone and all(not output.uses() for output in node.outputs[1:])


@dataclass(frozen=True)
class _Constants:
    """An operator's int8 weight as values of a graph."""

    values: ir.Value
    scale: ir.Value
    smoothing: ir.Value | None
    input_scale: ir.Value | None
    input_zero_point: ir.Value | None
    outliers: ir.Value | None
    outlier_rows: ir.Value | None


def _constants(model: ir.Model, name: str, weight: Int8Weight) -> _Constants:
    def constant(part: str, value: Any) -> ir.Value | None:
        return None if value is None else add_initializer(model, f"{name}.{part}", value)

    parts = {part: constant(part, getattr(weight, part)) for part in vars(weight) if part != "error"}
    return _Constants(**parts)


def _int8_nodes(node: ir.Node, weight: _Constants) -> tuple[list[ir.Node], ir.Value]:
    """Return nodes that compute in int8 what the node computes, and their last value."""
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **more: Any) -> ir.Node:
        name = f"{node.name}_int8_{len(nodes)}_{op_type}"
        nodes.append(ir.node(op_type, inputs, more.pop("attributes", None), domain=domain, name=name, **more))
        for number, output in enumerate(nodes[-1].outputs):
            output.name = f"{name}_{number}"
        return nodes[-1]

    value = node.inputs[0]
    if weight.smoothing is not None:
        value = add("Mul", [value, weight.smoothing]).outputs[0]
    if weight.input_scale is None:
        product = add("DynamicQuantizeMatMul", [value, weight.values, weight.scale], CONTRIB)
    else:
        steps = add("QuantizeLinear", [value, weight.input_scale, weight.input_zero_point]).outputs[0]
        inputs = [steps, weight.values, weight.input_scale, weight.scale, weight.input_zero_point]
        product = add("MatMulIntegerToFloat", inputs, CONTRIB)
    if weight.outliers is not None:
        apart = add("Gather", [node.inputs[0], weight.outliers], attributes={"axis": -1})
        product = add("Add", [*product.outputs, *add("MatMul", [*apart.outputs, weight.outlier_rows]).outputs])
    if node.op_type == "MatMul":
        return nodes, product.outputs[0]
    parts = add("Split", product.outputs, attributes={"axis": -1, "num_outputs": 3}, num_outputs=3)
    given = _attention_inputs(node)
    same = {name: item for name, item in node.attributes.items() if name in ("num_heads", "scale", "mask_filter_value")}
    inputs = [*parts.outputs, given["bias"], given["mask_index"], given["attention_bias"]]
    return nodes, add("MultiHeadAttention", inputs, CONTRIB, attributes=same).outputs[0]


def _attention_inputs(node: ir.Node) -> dict[str, ir.Value | None]:
    """Return the inputs of `com.microsoft.Attention` by the names of its schema."""
    names = ("input", "weights", "bias", "mask_index", "past", "attention_bias", "past_sequence_length")
    return dict(zip(names, [*node.inputs, *[None] * len(names)], strict=False))
