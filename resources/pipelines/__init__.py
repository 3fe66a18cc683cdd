"""What stands before and behind an engine: texts to rows of token ids, the engine's numbers to answers.

One package for all that ask an engine: the evaluation, the benchmarks, and the released models, which carry a copy
of it beside their `model.py`. So what is measured is what serves, and the server needs no `transformers`.
Needs `tokenizers` and numpy (1 or 2), and nothing else of this project; imports inside it are relative for that.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Pipeline

PIPELINE_FILE = "pipeline.json"
#: By task: module and class.
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
    """The pipeline of a task. Imported when asked for: definitions are loaded without numpy."""
    module, name = _PIPELINES[task]
    found: type[Pipeline] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def open_pipeline(folder: str) -> Pipeline:
    """The pipeline described by `pipeline.json`, `encoder.json` and `tokenizer.json` in a folder."""
    from .tokenization import TextEncoder

    described = json.loads((Path(folder) / PIPELINE_FILE).read_text(encoding="utf-8"))
    return pipeline_class(described["task"])(TextEncoder.from_folder(folder), described["settings"])
