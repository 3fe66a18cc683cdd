"""A graph in half precision: fp16 or bf16 where tensor cores work, fp32 where accuracy is made or lost.

Products, attention, normalization and what lies between them run in half precision. What follows the last of those
(pooling, softmax over labels, the norm of a vector) stays in fp32: `clamp(min=1e-9)` is 0 in fp16, and a pooled row
then NaN. So do operators whose inputs or outputs come near the largest number of fp16, and those that the ladder finds.

bf16 has the range of fp32, so nothing overflows, and three bits less than fp16 to say a number with.

Processors have kernels for neither. ONNX Runtime refuses bf16 there; for fp16 it computes in fp32 and, between two
operators that it has no kernel for, drops the rounding too, and an overflow with it. So what half precision does to the
answers is computed there in fp32, with a rounding of our own wherever the graph has the half type (`emulated`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from resources.engines.graphs import (
    CONTRIB,
    SINGLE,
    add_initializer,
    array_of,
    drop_unused,
    is_constant,
    module_path,
    unique,
)
from resources.engines.precision.ladder import Operator

#: Largest finite fp16, and what counts as near it: other texts than those that were watched go further.
LARGEST = 65504.0
NEAR = LARGEST / 4
Kind = Literal["fp16", "bf16"]
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
#: Stands for minus infinity in masks; a score may be added to it.
_LOWEST = -60000.0
#: The same by kind. Of bf16 it is the range of fp32 that ends: fp32's own lowest number rounds to minus infinity.
_LOWEST_OF = {"fp16": _LOWEST, "bf16": -3e38}
_SCORES = 5000.0
#: Operators of ONNX Runtime that have no bf16 kernel for CUDA, where they have one for fp16: they stay in fp32 between
#: neighbours in bf16. (ONNX Runtime's docs/OperatorKernels.md, and what 1.31's CUDA library holds.)
WITHOUT_BF16 = frozenset({(CONTRIB, "EmbedLayerNormalization"), (CONTRIB, "BiasSplitGelu"), ("", "Pad")})
#: Always in half precision, unless kept.
_HEAVY = {
    ("", "MatMul"),
    ("", "Gemm"),
    ("", "LayerNormalization"),
    (CONTRIB, "Attention"),
    (CONTRIB, "MultiHeadAttention"),
    (CONTRIB, "EmbedLayerNormalization"),
    (CONTRIB, "FusedMatMul"),
    (CONTRIB, "SkipLayerNormalization"),
}
#: In half precision where what they are given is.
_FOLLOWING = {
    *(
        ("", name)
        for name in ("Add", "Sub", "Mul", "Neg", "Gelu", "Tanh", "Relu", "Erf", "Softmax", "Where", "Identity")
    ),
    *(("", name) for name in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand")),
    *(("", name) for name in ("Gather", "GatherElements", "Tile", "Pad")),
    *((CONTRIB, name) for name in ("BiasGelu", "FastGelu", "Gelu", "RotaryEmbedding", "BiasSplitGelu", "QuickGelu")),
}
#: Inputs that are numbers of the layer, where others are indices, shapes or lengths. Left out: all that are float.
_INTEGER_INPUTS = {"Gather": (1,), "GatherElements": (1,), "Where": (0,), "Reshape": (1,), "Slice": (1, 2, 3, 4)}


def halvable(model: ir.Model) -> list[ir.Node]:
    """The nodes that run in half precision where nothing is kept, in the order of the graph."""
    heavy_after = _heavy_after(model)
    half: set[ir.Value] = set()
    found = []
    for node in model.graph:
        kind = (node.domain, node.op_type)
        if SINGLE in node.metadata_props or (kind not in _HEAVY and node not in heavy_after):
            continue
        table = kind == ("", "Gather") and is_constant(node.inputs[0]) and _is_float(node.inputs[0])
        follows = kind in _FOLLOWING and any(item in half for item in _numbers(node))
        if kind in _HEAVY or table or follows:
            found.append(node)
            half.update(_half_outputs(node))
    return found


def find_operators(model: ir.Model, *, wide: Collection[tuple[str, str]] = ()) -> list[Operator]:
    """The products, attentions and normalizations that the ladder decides on, in the order of the graph.

    wide: operators that are in fp32 anyway, as in `to_half`.
    """
    kinds = [kind for kind in _HEAVY if kind not in wide]
    nodes = [node for node in halvable(model) if (node.domain, node.op_type) in kinds]
    names = unique([module_path(node) for node in nodes])
    found = []
    for node, name in zip(nodes, names, strict=True):
        shapes = [array_of(item).shape for item in _numbers(node) if is_constant(item)]
        rows, columns = next(
            (shape for shape in shapes if len(shape) == 2), (1, max(map(max, filter(None, shapes)), default=1))
        )
        found.append(Operator(name, rows, columns, (str(node.name),)))
    return found


def paths_of(model: ir.Model, names: Collection[str]) -> dict[str, str]:
    """The modules that those nodes come from, by the nodes' names."""
    return {str(node.name): module_path(node) for node in model.graph if node.name in names}


def to_half(
    model: ir.Model,
    kept: Collection[str] = (),
    *,
    kind: Kind = "fp16",
    wide: Collection[tuple[str, str]] = (),
    emulated: bool = False,
) -> ir.Model:
    """A copy with all that can in half precision but the nodes of those names. Its inputs and outputs are the model's.

    wide: operators, by domain and type, that are computed in fp32 wherever they are; what lies around them is not.
    emulated: every type stays fp32, and numbers are rounded through the half type wherever they would have it.
    """
    copy = model.clone()
    type_, suffix = _TYPES[kind], "half" if kind == "fp16" else kind
    chosen = {node for node in halvable(copy) if node.name not in kept and (node.domain, node.op_type) not in set(wide)}
    casts: dict[tuple[ir.Value, bool], ir.Value] = {}
    constants: dict[ir.Value, ir.Value] = {}
    half: set[ir.Value] = set()
    answers: dict[ir.Value, ir.Value] = {}

    def converted(value: ir.Value, to: ir.DataType, name: str, node: ir.Node, *, after: bool = False) -> ir.Value:
        new = ir.node("Cast", [value], {"to": to}, name=name)
        new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = name, ir.TensorType(to), value.shape
        (copy.graph.insert_after if after else copy.graph.insert_before)(node, new)
        return new.outputs[0]

    def cast(value: ir.Value, node: ir.Node, to_half: bool) -> ir.Value:
        if emulated and not to_half:
            return value
        if (value, to_half) not in casts:
            name = f"{value.name}_{suffix if to_half else 'single'}"
            new = converted(value, type_ if to_half else ir.DataType.FLOAT, name, node)
            casts[value, to_half] = converted(new, ir.DataType.FLOAT, f"{name}_rounded", node) if emulated else new
        return casts[value, to_half]

    _bound_masks(copy, _LOWEST_OF[kind])
    for node in list(copy.graph):
        for place, value in enumerate(node.inputs):
            if value is None or value not in _numbers(node) or place in _INTEGER_INPUTS.get(node.op_type, ()):
                continue
            if node in chosen and is_constant(value):
                if _is_float(value):
                    if value not in constants:
                        array = array_of(value).astype(type_.numpy())
                        array = array.astype(np.float32) if emulated else array
                        constants[value] = add_initializer(copy, f"{value.name}_{suffix}", array)
                    node.replace_input_with(place, constants[value])
            elif node in chosen and value not in half and _may_be_float(value):
                node.replace_input_with(place, cast(value, node, True))
            elif node not in chosen and value in half:
                node.replace_input_with(place, cast(value, node, False))
        if node not in chosen:
            continue
        for output in _half_outputs(node):
            if emulated:
                users, name = list(output.uses()), f"{output.name}_{suffix}"
                last = converted(output, type_, name, node, after=True)
                producer = last.producer()
                assert producer is not None
                rounded = converted(last, ir.DataType.FLOAT, f"{name}_rounded", producer, after=True)
                for user in users:
                    user.node.replace_input_with(user.idx, rounded)
                half.add(rounded)
                if output.is_graph_output():
                    answers[output] = rounded
            else:
                output.type = ir.TensorType(type_)
                half.add(output)
    for place, value in enumerate(copy.graph.outputs):
        if value in half or value in answers:
            name, value.name = value.name, f"{value.name}_before"
            last = answers.get(value) or converted(
                value, ir.DataType.FLOAT, f"{name}_single", copy.graph[-1], after=True
            )
            last.name = name
            copy.graph.outputs[place] = last
    drop_unused(copy)
    return copy


def near_overflow(model: ir.Model, seen: Mapping[str, float]) -> dict[str, float]:
    """Nodes by name whose numbers come near the largest of fp16, with the largest that was seen.

    seen: the largest absolute number of each value, by name, on real text. A weight counts like a value; a mask does
    not.
    """
    found = {}
    for node in halvable(model):
        numbers = [*_numbers(node), *_half_outputs(node)]
        largest = max((_largest(value, seen) for value in numbers), default=0.0)
        if not largest <= NEAR:
            found[str(node.name)] = largest
    return found


def watched_values(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """A copy that answers the largest absolute number of everything that would be fp16, and the names of those values.

    Its outputs are called as the values, with `_largest` behind.
    """
    copy = model.clone()
    _bound_masks(copy, _LOWEST)
    low, high, zero = (
        add_initializer(copy, f"watched_{name}", np.array(number, np.float32))
        for name, number in (("masked_from", _LOWEST - _SCORES), ("masked_to", _LOWEST + _SCORES), ("masked", 0.0))
    )
    values: dict[ir.Value, None] = {}
    for node in halvable(copy):
        for value in [*_numbers(node), *_half_outputs(node)]:
            if not is_constant(value) and _may_be_float(value) and (value.uses() or value.is_graph_output()):
                values[value] = None
    copy.graph.outputs.clear()
    names = []
    for value in values:
        # What a mask adds is as low as can be, and is meant to be.
        above = ir.node("Greater", [value, low], name=f"{value.name}_above")
        below = ir.node("Less", [value, high], name=f"{value.name}_below")
        masked = ir.node("And", [above.outputs[0], below.outputs[0]], name=f"{value.name}_masked")
        numbers = ir.node("Where", [masked.outputs[0], zero, value], name=f"{value.name}_numbers")
        absolute = ir.node("Abs", [numbers.outputs[0]], name=f"{value.name}_absolute")
        largest = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": 0}, name=f"{value.name}_largest")
        nodes = [above, below, masked, numbers, absolute, largest]
        for node in nodes:
            node.outputs[0].name = node.name
        largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        copy.graph.extend(nodes)
        copy.graph.outputs.append(largest.outputs[0])
        names.append(str(value.name))
    return copy, names


def _largest(value: ir.Value, seen: Mapping[str, float]) -> float:
    if is_constant(value):
        # One number that low stands for minus infinity, and is bounded.
        return float(np.abs(array_of(value)).max(initial=0.0)) if _is_float(value) and not _is_mask(value) else 0.0
    return seen.get(str(value.name), 0.0)


def _heavy_after(model: ir.Model) -> set[ir.Node]:
    """Nodes whose result reaches a product, attention or normalization."""
    found: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        for output in node.outputs:
            for user in output.consumers():
                if user in found or ((user.domain, user.op_type) in _HEAVY and SINGLE not in user.metadata_props):
                    found.add(node)
    return found


def _numbers(node: ir.Node) -> list[ir.Value]:
    """The inputs that are numbers, and not indices, shapes or lengths, as far as the operator tells."""
    if node.domain == CONTRIB and node.op_type == "EmbedLayerNormalization":
        return [item for item in node.inputs[2:7] if item is not None]
    if node.domain == CONTRIB and node.op_type in ("Attention", "MultiHeadAttention"):
        skipped = {"Attention": 3, "MultiHeadAttention": 4}[node.op_type]
        return [item for place, item in enumerate(node.inputs) if item is not None and place != skipped]
    integers = _INTEGER_INPUTS.get(node.op_type, ())
    return [item for place, item in enumerate(node.inputs) if item is not None and place not in integers]


def _half_outputs(node: ir.Node) -> list[ir.Value]:
    """The outputs that are numbers of the layer: of normalization the mean and deviation are not."""
    if node.op_type == "SkipLayerNormalization":
        return [output for place, output in enumerate(node.outputs) if place in (0, 3)]
    if node.op_type in ("EmbedLayerNormalization", "LayerNormalization", "Attention", "MultiHeadAttention"):
        return list(node.outputs[:1])
    return list(node.outputs)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT


def _may_be_float(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT)


def _bound_masks(model: ir.Model, lowest: float) -> None:
    """Let constants that stand for minus infinity stay finite in half precision."""
    for value in list(model.graph.initializers.values()):
        if _is_float(value) and _is_mask(value, lowest):
            value.const_value = ir.tensor(np.full(array_of(value).shape, lowest, np.float32), name=value.name)


def _is_mask(value: ir.Value, lowest: float = _LOWEST) -> bool:
    array = array_of(value)
    return array.size == 1 and float(array.reshape(-1)[0]) <= lowest
