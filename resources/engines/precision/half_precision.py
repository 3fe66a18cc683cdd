"""Write a graph in half precision: fp16 or bf16 where tensor cores work, fp32 where accuracy depends on it.

Products, attention, normalization and the operators between them run in half precision. The operators after the last of
those (pooling, the softmax over labels, the norm of a vector) stay in fp32, because `clamp(min=1e-9)` is 0 in fp16 and
a pooled row is then NaN. Operators whose inputs or outputs come near the largest number of fp16 stay in fp32 as well,
and so do the operators that the ladder finds.

bf16 has the range of fp32, so nothing overflows. It has three bits fewer than fp16 for the digits of a number.

CPUs have kernels for neither. ONNX Runtime refuses bf16 there. For fp16 it computes in fp32 and, between two operators
that it has no kernel for, drops the rounding too, and with it an overflow. On a CPU the effect of half precision on the
answers is therefore computed in fp32, and this module rounds wherever the graph has the half type (`emulated`).
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

#: The largest finite number of fp16, and the number that counts as near it. The bound is lower because other texts
#: reach further than the texts that were watched.
LARGEST = 65504.0
NEAR = LARGEST / 4
Kind = Literal["fp16", "bf16"]
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
#: Stands for minus infinity in masks. It leaves room for a score of up to `_SCORES` that is added to it.
_LOWEST = -60000.0
#: The same for each kind. The limit of bf16 is the range of fp32, whose own lowest number bf16 would round to minus
#: infinity.
_LOWEST_OF = {"fp16": _LOWEST, "bf16": -3e38}
_SCORES = 5000.0
#: Operators that have a CUDA kernel for fp16 in ONNX Runtime and none for bf16. They stay in fp32 between neighbours in
#: bf16. (Sources: ONNX Runtime's docs/OperatorKernels.md, and the kernels in the CUDA library of 1.31.)
WITHOUT_BF16 = frozenset({(CONTRIB, "EmbedLayerNormalization"), (CONTRIB, "BiasSplitGelu"), ("", "Pad")})
#: Operators that run in half precision unless they are kept.
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
#: Operators that run in half precision if one of their inputs is in half precision.
_FOLLOWING = {
    *(
        ("", name)
        for name in ("Add", "Sub", "Mul", "Neg", "Gelu", "Tanh", "Relu", "Erf", "Softmax", "Where", "Identity")
    ),
    *(("", name) for name in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand")),
    *(("", name) for name in ("Gather", "GatherElements", "Tile", "Pad")),
    *((CONTRIB, name) for name in ("BiasGelu", "FastGelu", "Gelu", "RotaryEmbedding", "BiasSplitGelu", "QuickGelu")),
}
#: The places of the inputs that are indices, conditions, shapes or lengths instead of numbers of the layer. For other
#: operators the types of the inputs decide.
_INTEGER_INPUTS = {"Gather": (1,), "GatherElements": (1,), "Where": (0,), "Reshape": (1,), "Slice": (1, 2, 3, 4)}


def halvable(model: ir.Model) -> list[ir.Node]:
    """Return the nodes that run in half precision if none is kept, in the order of the graph."""
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
    """Return the products, attentions and normalizations that the ladder decides on, in the order of the graph.

    Operators in `wide` run in fp32 anyway, as in `to_half`, and are left out.
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
    """Return the modules that those nodes come from, by the nodes' names."""
    return {str(node.name): module_path(node) for node in model.graph if node.name in names}


def to_half(
    model: ir.Model,
    kept: Collection[str] = (),
    *,
    kind: Kind = "fp16",
    wide: Collection[tuple[str, str]] = (),
    emulated: bool = False,
) -> ir.Model:
    """Return a copy in half precision, except the nodes whose names are in `kept`.

    The copy has the inputs and outputs of the model.

    Args:
        model: The model, in fp32.
        kept: The names of the nodes that stay in fp32.
        kind: The type of half precision.
        wide: Operators, by domain and type, that are always computed in fp32. Their neighbours are not affected.
        emulated: Keep every type at fp32, and round numbers through the half type wherever they would have it.
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
    """Return the nodes whose numbers come near the largest number of fp16, with the largest number that was seen.

    `seen` holds the largest absolute number of each value on real text, by name. The numbers of a weight count too; the
    numbers of a mask do not.
    """
    found = {}
    for node in halvable(model):
        numbers = [*_numbers(node), *_half_outputs(node)]
        largest = max((_largest(value, seen) for value in numbers), default=0.0)
        if not largest <= NEAR:
            found[str(node.name)] = largest
    return found


def watched_values(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """Return a copy that outputs the largest absolute number of every value that would be fp16.

    The name of each output is the value's name with `_largest` appended.

    Returns:
        The copy, and the names of the values.
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
        # A number that a mask adds is low on purpose, so it does not count.
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
        # A single number this low stands for minus infinity and is bounded elsewhere.
        return float(np.abs(array_of(value)).max(initial=0.0)) if _is_float(value) and not _is_mask(value) else 0.0
    return seen.get(str(value.name), 0.0)


def _heavy_after(model: ir.Model) -> set[ir.Node]:
    """Return the nodes whose result reaches a product, an attention or a normalization."""
    found: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        for output in node.outputs:
            for user in output.consumers():
                if user in found or ((user.domain, user.op_type) in _HEAVY and SINGLE not in user.metadata_props):
                    found.add(node)
    return found


def _numbers(node: ir.Node) -> list[ir.Value]:
    """Return the inputs that are numbers, without indices, shapes and lengths, as far as the operator's type tells."""
    if node.domain == CONTRIB and node.op_type == "EmbedLayerNormalization":
        return [item for item in node.inputs[2:7] if item is not None]
    if node.domain == CONTRIB and node.op_type in ("Attention", "MultiHeadAttention"):
        skipped = {"Attention": 3, "MultiHeadAttention": 4}[node.op_type]
        return [item for place, item in enumerate(node.inputs) if item is not None and place != skipped]
    integers = _INTEGER_INPUTS.get(node.op_type, ())
    return [item for place, item in enumerate(node.inputs) if item is not None and place not in integers]


def _half_outputs(node: ir.Node) -> list[ir.Value]:
    """Return the outputs that are numbers of the layer.

    The mean and the deviation that a normalization outputs are not.
    """
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
    """Make constants that stand for minus infinity finite in half precision."""
    for value in list(model.graph.initializers.values()):
        if _is_float(value) and _is_mask(value, lowest):
            value.const_value = ir.tensor(np.full(array_of(value).shape, lowest, np.float32), name=value.name)


def _is_mask(value: ir.Value, lowest: float = _LOWEST) -> bool:
    array = array_of(value)
    return array.size == 1 and float(array.reshape(-1)[0]) <= lowest
