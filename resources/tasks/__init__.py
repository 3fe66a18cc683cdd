"""The tasks that can be served, by name.

A new task needs a module here, a pipeline in resources.pipelines, and a line in each of the two lists.
"""

from resources.tasks.base import CheckpointFiles, Gates, Metrics, Options, SpecialTokens, Task
from resources.tasks.classification import ClassificationTask
from resources.tasks.embedding import EmbeddingTask
from resources.tasks.fill_mask import FillMaskTask
from resources.tasks.question_answering import QuestionAnsweringTask
from resources.tasks.reranking import RerankingTask
from resources.tasks.token_classification import TokenClassificationTask
from resources.tasks.zero_shot_classification import ZeroShotClassificationTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        EmbeddingTask(),
        ClassificationTask(),
        RerankingTask(),
        TokenClassificationTask(),
        QuestionAnsweringTask(),
        ZeroShotClassificationTask(),
        FillMaskTask(),
    )
}

__all__ = ["TASKS", "CheckpointFiles", "Gates", "Metrics", "Options", "SpecialTokens", "Task"]
