"""Fuse GELU by tanh (ALBERT's `gelu_new`), which the stock rules leave as eight operators."""

from __future__ import annotations

import onnx_ir as ir

from resources.engines.graphs import CONTRIB, array_of, is_constant, made_by, replace_value, scalar_of

_ROOT, _CUBIC = 0.7978845608, 0.044715


def fuse_fast_gelu(model: ir.Model) -> int:
    """Replace x/2 (1 + tanh(sqrt(2/pi) (x + .044715 x^3))) with `FastGelu`, including a bias before it.

    Returns:
        The number of replacements.
    """
    count = 0
    for tanh in [node for node in model.graph if node.op_type == "Tanh"]:
        matched = _match(tanh)
        if matched is None:
            continue
        x, last = matched
        add = made_by(x, "Add")
        inputs: list[ir.Value | None] = [x]
        if add is not None:
            for value, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
                if bias is not None and is_constant(bias) and array_of(bias).ndim == 1:
                    inputs = [value, bias]
        node = ir.node("FastGelu", inputs, domain=CONTRIB, name=f"{last.name}_fast_gelu")
        node.outputs[0].name = node.name
        node.metadata_props.update(last.metadata_props)
        model.graph.insert_before(last, node)
        replace_value(last.outputs[0], node.outputs[0])
        model.graph.remove(last, safe=True)
        count += 1
    return count


def _match(tanh: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """Return the input and the last node of the GELU that the tanh is part of, or None if it is part of none."""
    scaled = made_by(tanh.inputs[0], "Mul")
    inner = _without(scaled, _ROOT)
    total = made_by(inner, "Add")
    if total is None:
        return None
    for x, cubic in (tuple(total.inputs), tuple(reversed(total.inputs))):
        power = made_by(_without(made_by(cubic, "Mul"), _CUBIC), "Pow")
        if x is None or power is None or power.inputs[0] is not x or scalar_of(power.inputs[1]) != 3.0:
            continue
        for plus in tanh.outputs[0].consumers():
            if plus.op_type != "Add" or _without(plus, 1.0) is not tanh.outputs[0]:
                continue
            for last in plus.outputs[0].consumers():
                halves = [item for item in last.inputs if item is not plus.outputs[0]]
                if last.op_type == "Mul" and halves and _without(made_by(halves[0], "Mul"), 0.5) is x:
                    return x, last
    return None


def _without(node: ir.Node | None, number: float) -> ir.Value | None:
    """Return the other input of a node that has two inputs if one of them is that number, else None."""
    if node is None or len(node.inputs) != 2:
        return None
    for value, constant in (tuple(node.inputs), tuple(reversed(node.inputs))):
        given = scalar_of(constant)
        if given is not None and abs(given - number) <= 1e-5 * abs(number):
            return value
    return None
