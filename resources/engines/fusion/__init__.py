"""Rewrite the exported graph in ONNX Runtime's own operators.

`onnxruntime.transformers.optimizer` knows only the patterns of the old exporter, and fuses no attention in the graphs
of the current one. The rules of `onnxscript` fuse most of it, and the rules of this package fuse the rest. A rule that
replaces a whole subgraph (a mask, positions) recognizes the subgraph by the results that it computes at many shapes,
not by the operators that the exporter chose. A new release of the exporter then does not silently prevent the fusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def fuse(source: Path) -> tuple[onnx_ir.Model, dict[str, int]]:
    """Return the fused graph, and how often each rule was applied.

    The fused graph reads its attention mask as lengths. Rows must therefore be padded on the right, as the served
    tokenizer pads them.
    """
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    from resources.engines.fusion.activations import fuse_fast_gelu
    from resources.engines.fusion.attention import pack_attention
    from resources.engines.fusion.eager import fuse_eager_attention
    from resources.engines.fusion.embeddings import fuse_embeddings
    from resources.engines.fusion.masks import masks_to_lengths
    from resources.engines.fusion.pooling import fuse_mean_pooling, fuse_normalization
    from resources.engines.fusion.rotary import fuse_rotary_attention, fuse_skip_normalization
    from resources.engines.graphs import drop_unused, name_nodes

    model, stock = optimize_for_ort(onnx_ir.load(source))
    name_nodes(model)
    own = {
        "eager_attention": fuse_eager_attention(model),
        "rotary_attention": fuse_rotary_attention(model),
        "skip_normalization": fuse_skip_normalization(model),
        "attention_packed": pack_attention(model),
        "mask_as_lengths": masks_to_lengths(model),
        "fast_gelu": fuse_fast_gelu(model),
        "embed_layer_norm": fuse_embeddings(model),
        "mean_pooling": fuse_mean_pooling(model),
        "normalization": fuse_normalization(model),
    }
    drop_unused(model)
    counts = {**{name: int(count) for name, count in stock.items()}, **own}
    return model, {name: count for name, count in counts.items() if count}
