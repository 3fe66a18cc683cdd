"""Small functions on onnx_ir graphs, shared by fusion, quantization and half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

#: The domain of ONNX Runtime's own operators.
CONTRIB = "com.microsoft"
#: The metadata key of nodes that are never computed in half precision. Its value is the reason.
SINGLE = "refinery.single"


def array_of(value: ir.Value) -> np.ndarray:
    """Return the numbers of a constant."""
    assert value.const_value is not None, f"{value.name} is not a constant"
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Return whether the value is a weight or another constant of the graph."""
    return value is not None and value.is_initializer() and value.const_value is not None


def scalar_of(value: ir.Value | None) -> float | None:
    """Return the number of a constant with one element, or None for any other value."""
    if value is None or not is_constant(value):
        return None
    array = array_of(value)
    return float(array.reshape(-1)[0]) if array.size == 1 else None


def add_initializer(model: ir.Model, name: str, value: np.ndarray) -> ir.Value:
    """Add a constant to the graph and return it."""
    result = ir.Value(name=name, const_value=ir.tensor(value, name=name))
    result.shape, result.type = ir.Shape(value.shape), ir.TensorType(ir.DataType.from_numpy(value.dtype))
    model.graph.register_initializer(result)
    return result


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    """Return whether the node is an operator of that type and domain."""
    return node is not None and node.op_type == op_type and node.domain == domain


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """Return the node that computes the value if it is an operator of that type and domain, else None."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type, domain) else None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Make all readers of the old value read the new one.

    If the old value is an output of the graph, the new one takes over its name, type and shape.
    """
    new.shape, new.type = new.shape or old.shape, new.type or old.type
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_before"
        new.name, new.shape, new.type = name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and weights that no other node reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def by_name(model: ir.Model) -> dict[str, ir.Node]:
    """Return the nodes that have a name, by name."""
    return {node.name: node for node in model.graph if node.name}


def name_nodes(model: ir.Model) -> None:
    """Give a name to every node that has none."""
    for number, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{number}"


def module_path(node: ir.Node) -> str:
    """Return the PyTorch name of the checkpoint's module that the node comes from, else the node's own name.

    The exporter writes it into the node's `namespace`: a list of `path: class`, from the outermost module to the
    operator itself, with slashes between.
    """
    namespace = node.metadata_props.get("namespace", "")
    modules = [part.split(": ", 1)[0] for part in namespace.split("/")[:-1]]
    return modules[-1] if modules and modules[-1] else str(node.name)


def unique(names: Sequence[str]) -> list[str]:
    """Return the names, with a number appended to each one that occurs more than once."""
    counts: dict[str, int] = {}
    result = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name}#{counts[name]}")
    return result


def subgraph_inputs(value: ir.Value) -> tuple[set[str], set[str]]:
    """Return the names of the graph inputs that the value depends on.

    Returns:
        The inputs whose numbers are read, and the inputs of which only the shape is read.
    """
    read: set[str] = set()
    shaped: set[str] = set()
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if node is None:
            if current.is_graph_input():
                read.add(str(current.name))
            continue
        for item in node.inputs:
            if item is None or item in seen:
                continue
            if node.op_type == "Shape" and item.is_graph_input():
                shaped.add(str(item.name))
                continue
            seen.add(item)
            waiting.append(item)
    return read, shaped - read


def cut(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of the model that computes only the values of those names.

    Its inputs are those that the values need.
    """
    copy = model.clone()
    values: dict[str, ir.Value] = {str(value.name): value for value in _values(copy)}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    drop_unused(copy)
    for value in list(copy.graph.inputs):
        if not value.uses() and str(value.name) not in names:
            copy.graph.inputs.remove(value)
    # Small constants may be stored in a file too. The copy may be used where that file is missing.
    return ir.external_data.load_to_model(copy)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs
