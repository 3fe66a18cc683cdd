"""The tasks that can be served, by name. A new one is a module here and a line below."""

from resources.tasks.base import CheckpointFiles, Gates, Task
from resources.tasks.classification import ClassificationTask
from resources.tasks.embedding import EmbeddingTask

TASKS: dict[str, Task] = {task.name: task for task in (EmbeddingTask(), ClassificationTask())}

__all__ = ["TASKS", "CheckpointFiles", "Gates", "Task"]
