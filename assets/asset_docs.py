"""The part of every asset's description in Dagster that says what it is made of, and when it is made anew."""

from dataclasses import dataclass

import dagster as dg

from resources.engines.specs import BASELINE


@dataclass(frozen=True)
class Provenance:
    """The inputs of an asset and the reasons to make it again, in Markdown.

    Args:
        made_of: The text that follows "Made of" in the description.
        again: The text that follows "Made anew when" in the description.
    """

    made_of: str
    again: str


#: The provenance by the first part of the asset's key.
PROVENANCE = {
    "checkpoint": Provenance(
        "the catalog's `source`: a Hub id, a folder, a Python package, MLflow's registry or object storage; and the "
        "lengths of its `sample`.",
        "the source holds another revision, or the entry's `task`, `options` or `sample` is another.",
    ),
    "evaluation_set": Provenance(
        "`checkpoint`, and the requests of the catalog's `evaluation`, or the ones that are shipped.",
        "weights, tokenizer, requests or `task` are others, or PyTorch, transformers or tokenizers.",
    ),
    "reference": Provenance(
        "`checkpoint`, as sentence-transformers or transformers reads it, and the requests of `evaluation_set`.",
        "one of these is another, or PyTorch, transformers, tokenizers or sentence-transformers.",
    ),
    "onnx_graph": Provenance(
        "the weights of `checkpoint`.",
        "these, `task` or the number of token ids are others, or PyTorch, transformers or ONNX's libraries. Not for "
        "another tokenizer with as many ids.",
    ),
    "engines": Provenance(
        "`onnx_graph`; in reduced precision also of `evaluation_set` and the gates, which it is built to keep.",
        "one of these, the runtime's library or, on a GPU, the device or its driver is another. One that failed is "
        "tried again by every run.",
    ),
    "benchmarks": Provenance(
        f"the engine, the baseline `{BASELINE}`, `evaluation_set`, and the catalog's `shapes` and `benchmark`.",
        "one of these, or the machine it is measured on, is another.",
    ),
    "champion": Provenance(
        "the reports on all engines and on what serves, the gates and the `objective`.",
        "one of these is another. What serves stays, unless something is better by more than the noise of both.",
    ),
    "serving_configuration": Provenance(
        "`champion`, its engine, and the catalog's `serving`.",
        "one of these, the mix of lengths, the embedded server or the machine is another.",
    ),
    "triton_repository": Provenance(
        "the champion's engine, the tokenizer and labels of `checkpoint`, and `serving_configuration`.",
        "one of these is another: then it is the next release, and none that is there is changed.",
    ),
    "serving_benchmark": Provenance(
        "the release that serves, in the mix of lengths of the catalog's `sample`, or of `evaluation_set`.",
        "another release serves, or the load, the embedded server or the machine is another.",
    ),
}


def documented(spec: dg.AssetSpec) -> dg.AssetSpec:
    """Return the spec with its description extended by what it is made of, and when it is made anew."""
    family = PROVENANCE[spec.key.path[0]]
    description = f"{spec.description}\n\n**Made of** {family.made_of}\n\n**Made anew when** {family.again}"
    return spec.replace_attributes(description=description)
