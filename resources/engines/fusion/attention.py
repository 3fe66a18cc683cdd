"""Pack the weights of fused attention for ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from resources.engines.graphs import CONTRIB, add_initializer, array_of, is_constant, made_by


def pack_attention(model: ir.Model) -> int:
    """Join the three weights of each fused attention into the single weight that it reads.

    Returns:
        The number of attentions whose weights were joined.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain != CONTRIB:
            continue
        joined = made_by(node.inputs[1], "Concat")
        if joined is None or not all(is_constant(item) for item in joined.inputs):
            continue
        packed = np.concatenate([array_of(item) for item in joined.inputs if item is not None], axis=-1)
        node.replace_input_with(1, add_initializer(model, f"{node.name}_weight", packed))
        if not joined.outputs[0].uses():
            model.graph.remove(joined, safe=True)
        count += 1
    return count
