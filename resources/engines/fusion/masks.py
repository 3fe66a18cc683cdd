"""Replace the attention mask with one length for each row, which ONNX Runtime's attention kernels accept directly.

An exporter turns the mask into a tensor `[batch, 1, sequence, sequence]` with thirty operators, and kernels that have
to read it are slower. On an H200 the fastest attention kernel of ONNX Runtime accepts lengths and does not accept such
a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from resources.engines.graphs import CONTRIB, add_initializer, cut, is_op, subgraph_inputs
from resources.engines.onnxruntime.sessions import session_of_bytes

MASK = "attention_mask"
#: The shapes at which a mask is tried: rows, tokens and the lengths of the rows. They cover one row, no padding, a
#: single token, and rows of the same length.
_TRIED = ((1, 1, (1,)), (1, 5, (5,)), (3, 7, (7, 1, 4)), (2, 18, (9, 18)), (2, 33, (33, 33)))
#: A number that is added to a score masks it if it is at most this.
_MASKED = -1e4
#: The places of two inputs of ONNX Runtime's operators: the lengths, and the tensor that is added to the scores.
_PLACES = {"Attention": (3, 5), "MultiHeadAttention": (4, 5)}


def masks_to_lengths(model: ir.Model) -> int:
    """Make attention read lengths where the tensor that is added to its scores only masks padding.

    Returns:
        The number of attentions that were changed.
    """
    found: dict[ir.Value, bool] = {}
    count = 0
    for node in list(model.graph):
        if node.op_type not in _PLACES or node.domain != CONTRIB:
            continue
        length_place, bias_place = _PLACES[node.op_type]
        bias = node.inputs[bias_place] if len(node.inputs) > bias_place else None
        if bias is None or (len(node.inputs) > length_place and node.inputs[length_place] is not None):
            continue
        if bias not in found:
            found[bias] = masks_padding(model, bias)
        if not found[bias]:
            continue
        node.replace_input_with(bias_place, None)
        node.replace_input_with(length_place, lengths_of(model))
        count += 1
    return count


def masks_padding(model: ir.Model, bias: ir.Value) -> bool:
    """Return whether the value is 0 for keys that are text and masks keys that are padding, for all queries and heads.

    The subgraph is not matched but run with masks of several shapes. It may read only the mask and shapes.
    """
    for mask, answer in _tries(model, bias):
        keys = mask[:, None, None, :] == 1
        if answer is None:
            return False
        expected = np.broadcast_to(keys, answer.shape)
        if not ((answer == 0) == expected).all() or not (answer[~expected] <= _MASKED).all():
            return False
    return True


def fills_padding(model: ir.Model, condition: ir.Value) -> bool:
    """Return whether the value is true for keys that are padding and false for others, for all queries that are text.

    Queries that are padding do not matter, because their answers are not read. The subgraph is run as in
    `masks_padding`.
    """
    for mask, answer in _tries(model, condition):
        if answer is None:
            return False
        queries = np.broadcast_to(mask[:, None, :, None] == 1, answer.shape)
        padding = np.broadcast_to(mask[:, None, None, :] == 0, answer.shape)
        if not (answer.astype(bool) == padding)[queries].all():
            return False
    return True


def _tries(model: ir.Model, value: ir.Value) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield masks `[rows, tokens]` and the value for each, `[rows, heads, queries, keys]`.

    If the subgraph reads other inputs or its result has another shape, the value is None and nothing follows.
    """
    read, shaped = subgraph_inputs(value)
    if read != {MASK}:
        yield np.zeros((0, 0)), None
        return
    session = session_of_bytes(ir.to_proto(cut(model, [str(value.name)])).SerializeToString())
    needed = {item.name for item in session.get_inputs()}
    for rows, tokens, lengths in _TRIED:
        mask = (np.arange(tokens) < np.array(lengths)[:, None]).astype(np.int64)
        feed = {name: mask if name == MASK else np.zeros((rows, tokens), np.int64) for name in {MASK, *shaped} & needed}
        answer = session.run(None, feed)[0]
        if answer.ndim != 4 or answer.shape[-1] != tokens or answer.shape[-2] not in (1, tokens):
            yield mask, None
            return
        yield mask, np.broadcast_to(answer, (rows, answer.shape[1], tokens, tokens))


def lengths_of(model: ir.Model) -> ir.Value:
    """Return the number of tokens in each row that are text, int32 `[batch]`.

    The nodes that compute it are added once.
    """
    known = lengths_node(model)
    if known is not None:
        return known.outputs[0]
    mask = next(item for item in model.graph.inputs if item.name == MASK)
    axes = add_initializer(model, "lengths_axes", np.array([1], dtype=np.int64))
    cast = ir.node("Cast", [mask], {"to": ir.DataType.INT32}, name="lengths_mask")
    total = ir.node("ReduceSum", [cast.outputs[0], axes], {"keepdims": 0}, name="lengths")
    cast.outputs[0].name, total.outputs[0].name = "lengths_mask", "lengths"
    for node, shape in ((cast, mask.shape), (total, mask.shape[:1] if mask.shape else None)):
        node.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        node.outputs[0].shape = ir.Shape(shape) if shape is not None else None
    first = next(iter(model.graph))
    model.graph.insert_before(first, [cast, total])
    return total.outputs[0]


def lengths_node(model: ir.Model) -> ir.Node | None:
    """Return the node that computes the lengths, or None if `lengths_of` has not added one."""
    return next((node for node in model.graph if node.name == "lengths" and is_op(node, "ReduceSum")), None)
