"""The answers of the library that users would have used."""

import dagster as dg

from assets.checkpoint import checkpoint
from assets.evaluation_set import evaluation_set
from assets.executor_tags import placement
from assets.materialization import OWNERS, materialized, remember, table
from assets.partitions import models
from resources.accuracy.reference import make_reference
from resources.artifacts.records import Checkpoint, EvaluationSet
from resources.settings.workspace import Workspace


@dg.asset(
    deps=[checkpoint, evaluation_set],
    partitions_def=models,
    group_name="sources",
    kinds={"huggingface"},
    owners=OWNERS,
    description="What sentence-transformers or transformers answers to the evaluation set, end to end from text. "
    "PyTorch's answers, which engines are compared with, have to equal these.",
    op_tags=placement(),
)
def reference(context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
    entry, store = workspace.entry(context.partition_key), workspace.store
    source = store.current(Checkpoint, f"checkpoint/{entry.name}")
    made = make_reference(workspace, entry, source, store.current(EvaluationSet, f"evaluation_set/{entry.name}"))
    folder = remember(store, f"reference/{entry.name}", made)
    record = made.record
    if record.retokenized:
        context.log.warning(
            f"{entry.name}: transformers itself tokenizes {len(record.retokenized)} texts of the evaluation set in "
            "another way than the tokenizer.json that the model was trained with, the first being "
            f"{record.retokenized[0]!r}. The release serves that file, so for such texts its answers are not those of "
            "transformers."
        )
    return materialized(
        made,
        folder,
        {
            "library": record.library,
            "answers_that_are_equal": record.compared,
            "requests_that_the_library_refuses": record.refused,
            "rows_tokenized_as_transformers_does": record.rows,
            "texts_that_transformers_tokenizes_otherwise": table({"text": ""}, [[text] for text in record.retokenized]),
        },
    )
