"""The exported graph in ONNX Runtime's own operators: what no stock rule knows, before and after the stock rules.

`onnxruntime.transformers.optimizer` knows the patterns of the old exporter only: on the graphs of today's it fuses no
attention at all. `onnxscript`'s rules fuse most of it, and ours do the rest. A rule of ours that replaces a whole
subgraph (a mask, positions) recognizes it by what it computes at shapes of all kinds, not by how an exporter spells
it, so that the next release of an exporter does not silently unfuse it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def fuse(source: Path) -> tuple[onnx_ir.Model, dict[str, int]]:
    """The fused graph, and how often each rule was applied.

    The result reads its attention mask as lengths: rows must be padded on the right, as the served tokenizer pads.
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
