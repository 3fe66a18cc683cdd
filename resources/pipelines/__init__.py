"""The code that runs before and after an engine. It turns texts into rows of token ids, and outputs into answers.

The evaluation, the benchmarks and the released models use this one package. A released model carries a copy of it
beside its `model.py`. So the code that is measured is the code that serves, and the server needs no `transformers`.
The package needs `tokenizers` and numpy (1 or 2), and nothing else of this project. Its imports of its own modules are
relative, so that the copy works.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Pipeline

PIPELINE_FILE = "pipeline.json"
#: The module and the class of each task's pipeline.
_PIPELINES = {
    "embedding": ("numbers", "TextPipeline"),
    "classification": ("numbers", "ClassifyingPipeline"),
    "reranking": ("numbers", "PairPipeline"),
    "token-classification": ("token_classification", "TokenClassificationPipeline"),
    "question-answering": ("question_answering", "QuestionAnsweringPipeline"),
    "zero-shot-classification": ("zero_shot_classification", "ZeroShotClassificationPipeline"),
    "fill-mask": ("fill_mask", "FillMaskPipeline"),
}


def pipeline_class(task: str) -> type[Pipeline]:
    """Return the class of a task's pipeline.

    The class is imported on demand, because Dagster's definitions must load without numpy.
    """
    module, name = _PIPELINES[task]
    found: type[Pipeline] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def open_pipeline(folder: str) -> Pipeline:
    """Return the pipeline that a folder's `pipeline.json`, `encoder.json` and `tokenizer.json` describe."""
    from .tokenization import TextEncoder

    described = json.loads((Path(folder) / PIPELINE_FILE).read_text(encoding="utf-8"))
    return pipeline_class(described["task"])(TextEncoder.from_folder(folder), described["settings"])
