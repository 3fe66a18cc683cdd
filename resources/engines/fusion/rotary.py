"""Fuse rotary positions (ModernBERT): `Split` and `RotaryEmbedding` between one packed product and attention.

In the exported graph queries and keys are each cut out of the product, transposed, cut in halves, negated, joined,
multiplied twice, added and transposed back. Those are fourteen passes over memory, and one is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resources.engines.graphs import CONTRIB, add_initializer, array_of, is_constant, made_by, replace_value


@dataclass(frozen=True)
class _Part:
    """One of the three parts of `linear`, `[batch, sequence, 3 * heads * width]`.

    Args:
        linear: The packed product of queries, keys and values.
        place: The number of the part: 0 for queries, 1 for keys, 2 for values.
        heads: The number of heads.
        width: The width of a head.
        angles: fp32 `[1, sequence, width / 2]` for parts that are rotated by their position, or None for values.
    """

    linear: ir.Value
    place: int
    heads: int
    width: int
    angles: ir.Value | None


def fuse_rotary_attention(model: ir.Model) -> int:
    """Rewrite the nodes between the packed product and each attention.

    Returns:
        The number of attentions that were rewritten.
    """
    count = 0
    caches: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in [node for node in model.graph if node.op_type == "MultiHeadAttention" and node.domain == CONTRIB]:
        queries, keys, values = (_part(value) for value in node.inputs[:3])
        if (
            queries is None
            or keys is None
            or values is None
            or len({part.linear for part in (queries, keys, values)}) > 1
        ):
            continue
        places = (queries.place, keys.place, values.place)
        if places != (0, 1, 2) or queries.angles is None or queries.angles is not keys.angles or values.angles:
            continue
        if queries.angles not in caches:
            caches[queries.angles] = _caches(model, queries.angles)
        split = ir.node(
            "Split", [queries.linear], {"axis": -1, "num_outputs": 3}, num_outputs=3, name=f"{node.name}_parts"
        )
        start = add_initializer(model, f"{node.name}_start", np.zeros(1, np.int64))
        turned = []
        for part, value in zip((queries, keys), split.outputs, strict=False):
            given = [value, start, *caches[queries.angles]]
            new = ir.node(
                "RotaryEmbedding", given, {"num_heads": part.heads}, domain=CONTRIB, name=f"{node.name}_{part.place}"
            )
            turned.append(new)
        for number, output in enumerate(split.outputs):
            output.name, output.type = f"{node.name}_part_{number}", ir.TensorType(ir.DataType.FLOAT)
            output.shape = ir.Shape(["batch", "sequence", queries.heads * queries.width])
        for new in turned:
            new.outputs[0].name, new.outputs[0].type = f"{new.name}_turned", ir.TensorType(ir.DataType.FLOAT)
            new.outputs[0].shape = split.outputs[0].shape
            new.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, [split, *turned])
        for place, value in enumerate((turned[0].outputs[0], turned[1].outputs[0], split.outputs[2])):
            node.replace_input_with(place, value)
        _tidy(node, queries.heads * queries.width)
        count += 1
    return count


def fuse_skip_normalization(model: ir.Model) -> int:
    """Replace a sum and its normalization with one operator that outputs both.

    The rule is for normalizations without a bias.

    Returns:
        The number of replacements.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "LayerNormalization" and node.domain == ""]:
        add = made_by(node.inputs[0], "Add")
        if add is None or node.attributes.get_int("axis", -1) != -1 or any(out.uses() for out in node.outputs[1:]):
            continue
        if any(is_constant(item) or item is None or len(item.shape or ()) != 3 for item in add.inputs):
            continue
        given = [*add.inputs, *node.inputs[1:3]]
        new = ir.node(
            "SkipLayerNormalization",
            given,
            {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
            domain=CONTRIB,
            num_outputs=4,
            name=f"{node.name}_skip",
        )
        new.metadata_props.update(node.metadata_props)
        for number, output in enumerate(new.outputs):
            output.name = f"{new.name}_{number}"
        model.graph.insert_before(node, new)
        total, normalized = add.outputs[0], node.outputs[0]
        replace_value(normalized, new.outputs[0])
        model.graph.remove(node, safe=True)
        if total.uses() or total.is_graph_output():
            replace_value(total, new.outputs[3])
        model.graph.remove(add, safe=True)
        count += 1
    return count


def _part(value: ir.Value | None) -> _Part | None:
    """Return which part of the packed product an input of the attention is, or None if it is none.

    The input has the shape `[batch, sequence, heads * width]`.
    """
    joined = made_by(value, "Reshape")
    inner = joined.inputs[0] if joined is not None else None
    turned = made_by(inner, "Transpose")
    if turned is None:
        return _cut(inner, None)
    if list(turned.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
        return None
    total = made_by(turned.inputs[0], "Add")
    if total is None:
        return None
    for plain, crossed in (tuple(total.inputs), tuple(reversed(total.inputs))):
        by_cos, by_sin = made_by(plain, "Mul"), made_by(crossed, "Mul")
        cos = _angles(by_cos.inputs[1], "Cos") if by_cos is not None else None
        sin = _angles(by_sin.inputs[1], "Sin") if by_sin is not None else None
        if by_cos is None or by_sin is None or cos is None or cos is not sin:
            continue
        x = by_cos.inputs[0]
        back = made_by(x, "Transpose")
        if back is None or not _is_half_turned(by_sin.inputs[0], x):
            continue
        if list(back.attributes.get_ints("perm", ())) == [0, 2, 1, 3]:
            return _cut(back.inputs[0], cos)
    return None


def _cut(value: ir.Value | None, angles: ir.Value | None) -> _Part | None:
    """Return which part of `[batch, sequence, 3, heads, width]` the value is, or None if it is none.

    The value has the shape `[batch, sequence, heads, width]`.
    """
    squeeze = made_by(value, "Squeeze")
    piece = made_by(squeeze.inputs[0] if squeeze is not None else None, "Slice")
    whole = made_by(piece.inputs[0] if piece is not None else None, "Reshape")
    if piece is None or whole is None or whole.inputs[0] is None or whole.outputs[0].shape is None:
        return None
    shape = list(whole.outputs[0].shape)
    if len(shape) != 5 or shape[2] != 3 or not isinstance(shape[3], int) or not isinstance(shape[4], int):
        return None
    limits = [_number(item) for item in piece.inputs[1:4]]
    if None in limits or limits[2] not in (2, -3) or limits[1] != (limits[0] or 0) + 1:
        return None
    return _Part(whole.inputs[0], int(limits[0] or 0), shape[3], shape[4], angles)


def _angles(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """Return the angles that the sine or cosine is taken of, or None.

    They are the angles of half the width, which the graph joins with themselves.
    """
    spread = made_by(value, "Unsqueeze")
    function = made_by(spread.inputs[0] if spread is not None else None, op_type)
    joined = made_by(function.inputs[0] if function is not None else None, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.inputs[0] is not joined.inputs[1]:
        return None
    return joined.inputs[0]


def _is_half_turned(value: ir.Value | None, x: ir.Value | None) -> bool:
    """Return whether the value is the second half of `x`, negated, followed by the first half."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or x is None or x.shape is None:
        return False
    negated = made_by(joined.inputs[0], "Neg")
    second = made_by(negated.inputs[0] if negated is not None else None, "Slice")
    first = made_by(joined.inputs[1], "Slice")
    width = x.shape[-1]
    if first is None or second is None or first.inputs[0] is not x or second.inputs[0] is not x:
        return False
    if not isinstance(width, int):
        return False
    ends = _number(first.inputs[2]), _number(second.inputs[2])
    return (_number(first.inputs[1]), ends[0], _number(second.inputs[1])) == (0, width // 2, width // 2) and (
        ends[1] is not None and ends[1] >= width
    )


def _number(value: ir.Value | None) -> int | None:
    if value is None or not is_constant(value) or array_of(value).size != 1:
        return None
    return int(array_of(value).reshape(-1)[0])


def _caches(model: ir.Model, angles: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the cosine and sine of the angles, fp32 `[sequence, width / 2]`.

    They are computed once for all layers that share the angles.
    """
    axis = add_initializer(model, f"{angles.name}_first", np.zeros(1, np.int64))
    squeeze = ir.node("Squeeze", [angles, axis], name=f"{angles.name}_rows")
    functions = [ir.node(kind, [squeeze.outputs[0]], name=f"{angles.name}_{kind}") for kind in ("Cos", "Sin")]
    for node in (squeeze, *functions):
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.FLOAT)
    producer = angles.producer()
    assert producer is not None, "the angles are computed by a node"
    model.graph.insert_after(producer, [squeeze, *functions])
    return functions[0].outputs[0], functions[1].outputs[0]


def _tidy(node: ir.Node, width: int) -> None:
    """Remove two reshapes after the attention that undo each other, and an expansion of its bias to the same shape."""
    users = list(node.outputs[0].consumers())
    if len(users) == 1 and users[0].op_type == "Reshape":
        after = list(users[0].outputs[0].consumers())
        last = after[0].outputs[0] if len(after) == 1 and after[0].op_type == "Reshape" else None
        if last is not None and last.shape is not None and len(last.shape) == 3 and last.shape[-1] == width:
            replace_value(last, node.outputs[0])
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    expand = made_by(bias, "Expand")
    inner = expand.inputs[0] if expand is not None else None
    if inner is not None and bias is not None and inner.shape is not None and inner.shape == bias.shape:
        node.replace_input_with(5, inner)
