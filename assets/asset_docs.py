"""What every asset is made of, what makes it anew, and the version of the code that makes it, in one place.

The version is that of the modules which the artifact's own fingerprint names, so that Dagster says of code what the
store and `refinery plan` say.
"""

from dataclasses import dataclass

import dagster as dg

from resources.accuracy import evaluation_set, reference
from resources.artifacts.fingerprint import code_version
from resources.benchmark import champion
from resources.benchmark import measuring as benchmark
from resources.checkpoints import collect
from resources.engines import rebuild
from resources.engines.specs import BASELINE, engine_spec
from resources.export import make as export
from resources.triton import release, search, serving_report


@dataclass(frozen=True)
class Provenance:
    """made_of, again: Markdown. code: modules and packages."""

    made_of: str
    again: str
    code: tuple[str, ...]


#: By the first part of the asset's key.
PROVENANCE = {
    "checkpoint": Provenance(
        "the catalog's `source`: a Hub id, a folder, a Python package, MLflow's registry or object storage; and the "
        "lengths of its `sample`.",
        "the source holds another revision, or the entry's `task`, `options` or `sample` is another.",
        collect.CODE,
    ),
    "evaluation_set": Provenance(
        "`checkpoint`, and the requests of the catalog's `evaluation`, or the ones that are shipped.",
        "weights, tokenizer, requests or `task` are others, or PyTorch, transformers or tokenizers.",
        evaluation_set.CODE,
    ),
    "reference": Provenance(
        "`checkpoint`, as sentence-transformers or transformers reads it, and the requests of `evaluation_set`.",
        "one of these is another, or PyTorch, transformers, tokenizers or sentence-transformers.",
        reference.CODE,
    ),
    "onnx_graph": Provenance(
        "the weights of `checkpoint`.",
        "these, `task` or the number of token ids are others, or PyTorch, transformers or ONNX's libraries. Not for "
        "another tokenizer with as many ids.",
        export.CODE,
    ),
    "engines": Provenance(
        "`onnx_graph`; in reduced precision also of `evaluation_set` and the gates, which it is built to keep.",
        "one of these, the runtime's library or, on a GPU, the device or its driver is another. One that failed is "
        "tried again by every run.",
        rebuild.CODE,
    ),
    "benchmarks": Provenance(
        f"the engine, the baseline `{BASELINE}`, `evaluation_set`, and the catalog's `shapes` and `benchmark`.",
        "one of these, or the machine it is measured on, is another.",
        benchmark.CODE,
    ),
    "champion": Provenance(
        "the reports on all engines and on what serves, the gates and the `objective`.",
        "one of these is another. What serves stays, unless something is better by more than the noise of both.",
        champion.CODE,
    ),
    "serving_configuration": Provenance(
        "`champion`, its engine, and the catalog's `serving`.",
        "one of these, the mix of lengths, the embedded server or the machine is another.",
        search.CODE,
    ),
    "triton_repository": Provenance(
        "the champion's engine, the tokenizer and labels of `checkpoint`, and `serving_configuration`.",
        "one of these is another: then it is the next release, and none that is there is changed.",
        (*release.CODE, *release.COPIED, *release.session_modules()),
    ),
    "serving_benchmark": Provenance(
        "the release that serves, in the mix of lengths of the catalog's `sample`, or of `evaluation_set`.",
        "another release serves, or the load, the embedded server or the machine is another.",
        serving_report.CODE,
    ),
}


def documented(spec: dg.AssetSpec) -> dg.AssetSpec:
    """The asset with the whole of its description, and its code's version."""
    family = PROVENANCE[spec.key.path[0]]
    description = f"{spec.description}\n\n**Made of** {family.made_of}\n\n**Made anew when** {family.again}"
    return spec.replace_attributes(description=description, code_version=code_version(*_code(spec.key, family)))


def _code(key: dg.AssetKey, family: Provenance) -> tuple[str, ...]:
    judged = key.path[0] == "engines" and engine_spec(key.path[-1]).examined
    return (*family.code, *rebuild.JUDGING) if judged else family.code
