"""The asset of the texts and of PyTorch's answers, with which every engine of a model is compared."""

from assets.factory import Done, Look, Metadata, artifact_asset
from resources.artifacts.records import EvaluationSet
from resources.steps.evaluation_set import EVALUATION_SET


def _show(done: Done[EvaluationSet]) -> Metadata:
    record = done.record
    return {
        "requests": record.items,
        "rows": record.rows,
        "longest_tokens": record.longest_tokens,
        "width": record.width,
    }


evaluation_set = artifact_asset(
    EVALUATION_SET,
    Look.of(
        "sources",
        {"dataset", "pytorch"},
        "Real texts of many lengths, and the answer of PyTorch in fp32 to each of them alone.",
    ),
    _show,
)
