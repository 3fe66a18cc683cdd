"""Fuse the three embeddings and their normalization into one operator, `EmbedLayerNormalization`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from resources.engines.fusion.masks import MASK, lengths_node
from resources.engines.graphs import (
    CONTRIB,
    add_initializer,
    array_of,
    cut,
    is_constant,
    made_by,
    replace_value,
    subgraph_inputs,
)
from resources.engines.onnxruntime.sessions import session_of_bytes

_TRIED = ((1, 1), (2, 5), (3, 12))


@dataclass
class _Tables:
    """The tables whose rows are added up.

    Args:
        word: The table that `input_ids` index.
        segment: The table that `token_type_ids` index.
        position: The table that positions index.
        positions: The indices into `position`, or None if they are 0, 1, 2, ... in every row.
        rows: The rows `[width]` that are added to every token.
    """

    word: ir.Value | None = None
    segment: ir.Value | None = None
    position: ir.Value | None = None
    positions: ir.Value | None = None
    rows: list[np.ndarray] = field(default_factory=list)


def fuse_embeddings(model: ir.Model) -> int:
    """Fuse the embeddings at the beginning of the graph.

    The operator also counts the tokens of each row, so the nodes that did so are removed.

    Returns:
        1 if the embeddings were fused, else 0.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    for node in model.graph:
        simple = node.op_type == "LayerNormalization" and node.domain == ""
        skip = node.op_type == "SkipLayerNormalization" and node.domain == CONTRIB
        if not (simple or skip) or any(output.uses() for output in node.outputs[1:]):
            continue
        scale, bias = (node.inputs[2:4] if skip else node.inputs[1:3]) if len(node.inputs) >= 3 + skip else (None, None)
        if scale is None or bias is None or (skip and len(node.inputs) > 4 and node.inputs[4] is not None):
            return 0
        terms = _terms(node.inputs[0]) + (_terms(node.inputs[1]) if skip else [])
        tables = _tables(model, inputs, terms)
        if tables is None:
            return 0
        _write(model, node, tables, inputs, scale, bias)
        return 1
    return 0


def _terms(value: ir.Value | None) -> list[ir.Value | None]:
    """Return the values whose sum is the value."""
    add = made_by(value, "Add")
    return [value] if add is None else [*_terms(add.inputs[0]), *_terms(add.inputs[1])]


def _tables(model: ir.Model, inputs: dict[str, ir.Value], terms: list[ir.Value | None]) -> _Tables | None:
    found = _Tables()
    for term in terms:
        gather = made_by(term, "Gather")
        axis = 0 if gather is None else gather.attributes.get_int("axis", 0)
        if gather is None or axis != 0 or not is_constant(gather.inputs[0]):
            return None
        table, indices = gather.inputs[0], gather.inputs[1]
        assert table is not None and indices is not None, "a Gather node has two inputs"
        if indices is inputs.get("input_ids") and found.word is None:
            found.word = table
        elif indices is inputs.get("token_type_ids") and found.segment is None:
            found.segment = table
        else:
            kind = _kind_of_indices(model, inputs, indices)
            if kind == "zeros":
                found.rows.append(array_of(table)[0])
            elif kind in ("positions", "numbers") and found.position is None:
                found.position = table
                found.positions = indices if kind == "numbers" else None
            else:
                return None
    return found if found.word is not None and found.position is not None else None


def _kind_of_indices(model: ir.Model, inputs: dict[str, ir.Value], indices: ir.Value) -> str:
    """Return the kind of the indices, which is found by running them at several shapes.

    Returns:
        `zeros`; `positions` if they are 0, 1, 2, ... in every row; `numbers` if they are others, `[batch, sequence]`;
        or an empty string for anything else.
    """
    read, shaped = subgraph_inputs(indices)
    if not read <= {"input_ids", MASK}:
        return ""
    session = session_of_bytes(ir.to_proto(cut(model, [str(indices.name)])).SerializeToString())
    needed = {item.name for item in session.get_inputs()}
    kinds = {"zeros", "positions", "numbers"}
    generator = np.random.default_rng(0)
    for rows, tokens in _TRIED:
        shape = (rows, tokens)
        feed = {name: generator.integers(0, 2, shape) for name in (read | shaped) & set(inputs) & needed}
        answer = session.run(None, feed)[0]
        if answer.shape not in ((1, tokens), shape):
            return ""
        if answer.any():
            kinds.discard("zeros")
        if read or not (answer == np.arange(tokens)).all():
            kinds.discard("positions")
        if answer.shape != shape:
            kinds.discard("numbers")
    return next((kind for kind in ("zeros", "positions", "numbers") if kind in kinds), "")


def _write(
    model: ir.Model, old: ir.Node, tables: _Tables, inputs: dict[str, ir.Value], scale: ir.Value, bias: ir.Value
) -> None:
    assert tables.word is not None and tables.position is not None, "_tables has checked both"
    position = tables.position
    if tables.rows:
        added = (array_of(position) + sum(tables.rows)).astype(array_of(position).dtype)
        position = add_initializer(model, f"{position.name}_and_rows", added)
    casts: list[ir.Node] = []

    def as_int32(value: ir.Value) -> ir.Value:
        node = ir.node("Cast", [value], {"to": ir.DataType.INT32}, name=f"{value.name}_int32")
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.INT32)
        node.outputs[0].shape = value.shape
        casts.append(node)
        return node.outputs[0]

    ids = as_int32(inputs["input_ids"])
    segments = as_int32(inputs["token_type_ids"]) if tables.segment is not None else None
    counting = lengths_node(model)
    mask = counting.inputs[0] if counting is not None else None
    if counting is not None and counting.inputs[0] is not None:
        cast = counting.inputs[0].producer()
        assert cast is not None, "the mask is cast before it is counted"
        model.graph.remove(cast)
        casts.append(cast)
    numbers = [] if tables.positions is None else [as_int32(tables.positions)]
    given = [ids, segments, tables.word, position, tables.segment, scale, bias, mask, *numbers]
    epsilon = old.attributes.get_float("epsilon", 1e-5)
    node = ir.node(
        "EmbedLayerNormalization",
        given,
        {"epsilon": epsilon},
        domain=CONTRIB,
        num_outputs=2,
        name=f"{old.name}_embed",
    )
    node.metadata_props.update(old.metadata_props)
    node.outputs[0].name, node.outputs[1].name = f"{old.name}_embedded", f"{old.name}_lengths"
    node.outputs[1].type = ir.TensorType(ir.DataType.INT32)
    model.graph.insert_before(old, [*casts, node])
    replace_value(old.outputs[0], node.outputs[0])
    model.graph.remove(old, safe=True)
    if counting is not None:
        replace_value(counting.outputs[0], node.outputs[1])
        model.graph.remove(counting, safe=True)
