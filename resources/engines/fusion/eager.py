"""Fuse attention that a model computes step by step (MPNet, DeBERTa-v2) into one operator.

Such models add positions to the scores between the product of queries and keys and the softmax, which no stock rule
expects. The tensors that are added become the operator's bias. A tensor that masks padding becomes lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from resources.engines.fusion.masks import fills_padding, lengths_of, masks_padding
from resources.engines.graphs import (
    CONTRIB,
    add_initializer,
    array_of,
    is_constant,
    made_by,
    replace_value,
    scalar_of,
)


@dataclass(frozen=True)
class _Heads:
    """The origin of an operand of a product: `[batch, sequence, heads * width]`, cut into heads.

    Args:
        source: The value before it was cut.
        heads: The number of heads.
        width: The width of a head.
        turned: Whether the sequence is the operand's last axis.
        factor: The number that it was multiplied by on the way.
    """

    source: ir.Value
    heads: int
    width: int
    turned: bool
    factor: float


@dataclass
class _Scores:
    """The parts of the scores: one product, tensors that are added to it, and places that are filled with a low number.

    Args:
        product: The product of queries and keys.
        added: The tensors that are added to it.
        merged: For each added tensor, the shape that turns it back into `[batch, heads, ...]`, or None if it needs
            none.
        filled: The conditions that are true where the scores are filled.
    """

    product: ir.Node | None = None
    added: list[ir.Value] = field(default_factory=list)
    merged: list[ir.Value | None] = field(default_factory=list)
    filled: list[ir.Value] = field(default_factory=list)


def fuse_eager_attention(model: ir.Model) -> int:
    """Fuse the attention around each softmax over keys.

    Returns:
        The number of attentions that were fused.
    """
    return sum(_fuse(model, node) for node in list(model.graph) if node.op_type == "Softmax" and node.domain == "")


def _fuse(model: ir.Model, softmax: ir.Node) -> int:
    behind = _behind(softmax)
    scores = _Scores()
    value = softmax.inputs[0]
    if behind is None or value is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return 0
    if not _take_apart(value, scores, None) or scores.product is None:
        return 0
    product = scores.product
    queries, keys = _heads_of(product.inputs[0]), _heads_of(product.inputs[1])
    if queries is None or keys is None:
        return 0
    transposed = bool(product.attributes.get_int("transB", 0)) if product.op_type == "FusedMatMul" else False
    if queries.turned or keys.turned == transposed:
        return 0
    values, last = behind
    if len({(queries.heads, queries.width), (keys.heads, keys.width), (values.heads, values.width)}) != 1:
        return 0
    alpha = product.attributes.get_float("alpha", 1.0) if product.op_type == "FusedMatMul" else 1.0
    scale = queries.factor * keys.factor * alpha
    if values.factor != 1.0:
        return 0
    lengths, bias = _masks_and_bias(model, scores, last)
    attributes = {"num_heads": queries.heads, "scale": float(scale)}
    sources = (queries.source, keys.source, values.source)
    packed = _packed(model, sources, str(softmax.name))
    if packed is not None:
        inputs = [*packed, lengths, None, bias]
        node = ir.node("Attention", inputs, attributes, domain=CONTRIB, name=f"{softmax.name}_attention")
    else:
        inputs = [*sources, None, lengths, bias]
        node = ir.node("MultiHeadAttention", inputs, attributes, domain=CONTRIB, name=f"{softmax.name}_attention")
    node.outputs[0].name = node.name
    # The ladder names the node by its module. The softmax is no module of its own, so it carries the attention's.
    node.metadata_props.update(softmax.metadata_props)
    model.graph.insert_before(last, node)
    replace_value(last.outputs[0], node.outputs[0])
    model.graph.remove(last, safe=True)
    return 1


def _take_apart(value: ir.Value, scores: _Scores, shape: ir.Value | None) -> bool:
    """Fill `scores` from the value, and return whether the product of queries and keys is part of it.

    `shape` is the shape that the parts are later reshaped to, if they have batch and heads in one axis.
    """
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("MatMul", "FusedMatMul"):
        if _heads_of(node.inputs[0]) is None or _heads_of(node.inputs[1]) is None:
            return False
        scores.product = node
        return True
    inputs = [item for item in node.inputs if item is not None]
    if node.op_type == "Where" and len(inputs) == 3 and (scalar_of(inputs[1]) or 0.0) <= -1e4 and shape is None:
        if not _take_apart(inputs[2], scores, shape):
            return False
        scores.filled.append(inputs[0])
        return True
    if node.op_type == "Reshape" and shape is None and _rank(inputs[0]) == 3 and _rank(value) == 4:
        return _take_apart(inputs[0], scores, inputs[1])
    if node.op_type == "Add":
        for one, other in (inputs, inputs[::-1]):
            if _take_apart(one, scores, shape):
                scores.added.append(other)
                scores.merged.append(shape)
                return True
    return False


def _heads_of(value: ir.Value | None) -> _Heads | None:
    """Return how the value was made from `[batch, sequence, heads * width]`, or None if it was not."""
    chain: list[ir.Node] = []
    factor = 1.0
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        scalar = scalar_of(node.inputs[1]) if node.op_type in ("Mul", "Div") else None
        if scalar:
            factor *= scalar if node.op_type == "Mul" else 1 / scalar
        elif node.op_type in ("Transpose", "Reshape"):
            chain.append(node)
            if node.op_type == "Reshape" and _rank(node.inputs[0]) == 3 and _rank(node.outputs[0]) == 4:
                break
        else:
            return None
        value = node.inputs[0]
    if not chain or value is None or chain[-1].outputs[0].shape is None or chain[-1].inputs[0] is None:
        return None
    heads, width = chain[-1].outputs[0].shape[2:]
    axes = ["batch", "sequence", "heads", "width"]
    for node in reversed(chain[:-1]):
        if node.op_type == "Transpose":
            axes = [axes[place] for place in node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))]
        elif axes[:2] == ["batch", "heads"] and _rank(node.outputs[0]) == 3:
            axes = ["both", *axes[2:]]
        else:
            return None
    if not isinstance(heads, int) or not isinstance(width, int) or axes[:-2] not in (["batch", "heads"], ["both"]):
        return None
    return _Heads(chain[-1].inputs[0], heads, width, axes[-1] == "sequence", factor)


def _behind(softmax: ir.Node) -> tuple[_Heads, ir.Node] | None:
    """Return the values that the softmax is multiplied with, and the node that joins the heads again."""
    node = _only_user(softmax.outputs[0])
    if node is not None and node.op_type == "Reshape":
        node = _only_user(node.outputs[0])
    if node is None or node.op_type != "MatMul":
        return None
    values = _heads_of(node.inputs[1])
    node = _only_user(node.outputs[0])
    if node is not None and node.op_type == "Reshape" and _rank(node.outputs[0]) == 4:
        node = _only_user(node.outputs[0])
    if node is None or node.op_type != "Transpose" or list(node.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
        return None
    last = _only_user(node.outputs[0])
    if values is None or values.turned or last is None or last.op_type != "Reshape" or _rank(last.outputs[0]) != 3:
        return None
    return values, last


def _masks_and_bias(model: ir.Model, scores: _Scores, before: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the lengths, if a part of the scores masks padding, and the sum of all other parts that are added."""
    padding, parts = False, []
    for value, shape in zip(scores.added, scores.merged, strict=True):
        if shape is None and masks_padding(model, value):
            padding = True
            continue
        expand = made_by(value, "Expand")
        if expand is not None and _rank(expand.inputs[0]) == 4:
            value = expand.inputs[0]  # the operator broadcasts it by itself
        parts.append(value if shape is None else _add(model, before, "Reshape", [value, shape]))
    for condition in scores.filled:
        if fills_padding(model, condition):
            padding = True
            continue
        low, zero = (
            add_initializer(model, f"{before.name}_{name}_{len(parts)}", np.array(number, np.float32))
            for name, number in (("low", -1e9), ("zero", 0.0))
        )
        parts.append(_add(model, before, "Where", [condition, low, zero]))
    while len(parts) > 1:
        parts = [_add(model, before, "Add", parts[:2]), *parts[2:]]
    return lengths_of(model) if padding else None, parts[0] if parts else None


def _packed(
    model: ir.Model, sources: tuple[ir.Value, ...], name: str
) -> tuple[ir.Value | None, ir.Value, ir.Value] | None:
    """Return the input, weights and bias of a single product, or None.

    There is one if queries, keys and values are three products of the same input.
    """
    inputs, weights, biases = [], [], []
    for source in sources:
        add = made_by(source, "Add")
        if add is None or len(list(source.uses())) != 1:
            return None
        for value, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
            product = made_by(value, "MatMul")
            if product is not None and is_constant(product.inputs[1]) and bias is not None and is_constant(bias):
                matrix = product.inputs[1]
                assert matrix is not None, "a constant"
                inputs.append(product.inputs[0])
                weights.append(array_of(matrix))
                biases.append(array_of(bias).reshape(-1))
                break
    if len(inputs) != 3 or len(set(inputs)) != 1 or len({weight.shape for weight in weights}) != 1:
        return None
    packed = add_initializer(model, f"{name}_weights", np.concatenate(weights, axis=1))
    return inputs[0], packed, add_initializer(model, f"{name}_bias", np.concatenate(biases))


def _add(model: ir.Model, before: ir.Node, op_type: str, inputs: list[ir.Value]) -> ir.Value:
    node = ir.node(op_type, inputs, name=f"{before.name}_{op_type}_{len(list(model.graph))}")
    node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.consumers())
    return users[0] if len(users) == 1 else None


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else -1
