"""The asset of the answers of sentence-transformers or transformers, the library that users would have used."""

from assets.factory import Done, Look, Metadata, artifact_asset
from assets.materialization import table
from resources.artifacts.records import Reference
from resources.steps.reference import REFERENCE


def _show(done: Done[Reference]) -> Metadata:
    record = done.record
    if record.retokenized:
        done.context.log.warning(
            f"{record.model}: transformers itself tokenizes {len(record.retokenized)} texts of the evaluation set in "
            "another way than the tokenizer.json that the model was trained with, the first being "
            f"{record.retokenized[0]!r}. The release serves that file, so for such texts its answers are not those of "
            "transformers."
        )
    return {
        "library": record.library,
        "answers_that_are_equal": record.compared,
        "requests_that_the_library_refuses": record.refused,
        "rows_tokenized_as_transformers_does": record.rows,
        "texts_that_transformers_tokenizes_otherwise": table({"text": ""}, [[text] for text in record.retokenized]),
    }


reference = artifact_asset(
    REFERENCE,
    Look.of(
        "sources",
        {"huggingface"},
        "The answers of sentence-transformers or transformers to the evaluation set, end to end from text. The answers "
        "of PyTorch, which engines are compared with, have to equal these.",
    ),
    _show,
)
