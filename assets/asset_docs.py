"""The part of every asset's description in Dagster that names its inputs and the changes that rebuild it."""

from dataclasses import dataclass

import dagster as dg

from resources.engines.specs import BASELINE


@dataclass(frozen=True)
class Provenance:
    """The inputs of an asset and the changes that rebuild it, in Markdown.

    Args:
        inputs: The text that follows "Made from" in the description.
        rebuilt: The text that follows "Rebuilt when" in the description.
    """

    inputs: str
    rebuilt: str


#: The provenance by the first part of the asset's key.
PROVENANCE = {
    "checkpoint": Provenance(
        "the catalog's `source` (a Hub id, a folder, a Python package, MLflow's registry or object storage), and the "
        "lengths of the texts in its `sample`.",
        "the source holds another revision, or the entry's `task`, `options` or `sample` changes.",
    ),
    "evaluation_set": Provenance(
        "`checkpoint`, and the requests of the catalog's `evaluation`, or by default the requests that are shipped.",
        "the weights, the tokenizer, the requests, `task`, PyTorch, transformers or tokenizers change.",
    ),
    "reference": Provenance(
        "`checkpoint`, as sentence-transformers or transformers reads it, and the requests of `evaluation_set`.",
        "one of these, PyTorch, transformers, tokenizers or sentence-transformers changes.",
    ),
    "onnx_graph": Provenance(
        "the weights of `checkpoint`.",
        "the weights, `task`, the number of token ids, PyTorch, transformers or ONNX's libraries change. Another "
        "tokenizer with the same number of ids does not rebuild the graph.",
    ),
    "engines": Provenance(
        "`onnx_graph`. An engine in reduced precision is also made from `evaluation_set` and the gates, because "
        "its builder searches for the fastest engine within them.",
        "one of these, the runtime's library or, on a GPU, the device or its driver changes. Every run tries a failed "
        "engine again.",
    ),
    "benchmarks": Provenance(
        f"the engine, the baseline `{BASELINE}`, `evaluation_set`, and the catalog's `shapes` and `benchmark`.",
        "one of these or the machine that measures changes.",
    ),
    "champion": Provenance(
        "the reports on all engines and on the engine that serves, the gates and the `objective`.",
        "one of these changes. The engine that serves stays, unless another one is better by more than the noise of "
        "both.",
    ),
    "serving_configuration": Provenance(
        "`champion`, its engine, and the catalog's `serving`.",
        "one of these, the mix of lengths, the embedded server or the machine changes.",
    ),
    "triton_repository": Provenance(
        "the champion's engine, the tokenizer and labels of `checkpoint`, and `serving_configuration`.",
        "one of these changes. The result is the next release, and older releases stay as they are.",
    ),
    "serving_benchmark": Provenance(
        "the release that serves, and the mix of lengths of the catalog's `sample` or of `evaluation_set`.",
        "another release serves, or the load, the embedded server or the machine changes.",
    ),
}


def documented(spec: dg.AssetSpec) -> dg.AssetSpec:
    """Return the spec with a description that also names its inputs and the changes that rebuild it."""
    family = PROVENANCE[spec.key.path[0]]
    description = f"{spec.description}\n\n**Made from** {family.inputs}\n\n**Rebuilt when** {family.rebuilt}"
    return spec.replace_attributes(description=description)
