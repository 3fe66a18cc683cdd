"""The evaluation set: real requests, and the answers that PyTorch gives to them in fp32 without padding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.accuracy.batches import equal_length_batches, plan_batches
from resources.artifacts.records import Checkpoint
from resources.boundary.trust import Trust
from resources.checkpoints.collect import checkpoint_files
from resources.checkpoints.requests import require_answers
from resources.errors import CheckpointError
from resources.tasks import TASKS

if TYPE_CHECKING:
    from resources.accuracy.inference import Run
    from resources.pipelines.base import Item, Pipeline

BASELINE_NUMBERS = "baseline.npy"
BASELINE_DOCUMENTS = "baseline.json"
ITEMS_FILE = "items.json"
_BATCH = 16
#: One request in this many is also answered in padded batches.
_PADDED_EVERY = 8


@dataclass(frozen=True)
class Baseline:
    """The size of PyTorch's answers to an evaluation set.

    Args:
        rows: The number of rows that PyTorch answered.
        width: The number of values in the output for each row or token.
        longest_tokens: The number of tokens of the longest row.
    """

    rows: int
    width: int
    longest_tokens: int


def _require_padding(checkpoint: Checkpoint, pipeline: Pipeline, run: Run, items: list[Item], alone: list[Any]) -> None:
    """Check that padding does not change the model's answers, because a server pads the texts of one batch.

    Args:
        checkpoint: The checkpoint that the model was loaded from.
        pipeline: The checkpoint's pipeline.
        run: Runs PyTorch on one batch.
        items: The requests of the evaluation set.
        alone: PyTorch's answer to each request without padding.

    Raises:
        CheckpointError: An answer in a padded batch differs from the answer without padding.
    """
    from resources.accuracy.inference import answer_items

    task, some = TASKS[checkpoint.task], items[::_PADDED_EVERY]
    bucket = pipeline.encoder.bucket
    padded = answer_items(
        pipeline,
        run,
        some,
        lambda lengths: plan_batches([*chain.from_iterable(lengths)], bucket, _BATCH),
        per_token=task.per_token,
    )
    for item, expected, found in zip(some, alone[::_PADDED_EVERY], padded.answers or [None] * len(some), strict=True):
        why = task.difference(checkpoint.settings, expected, found) if found is not None else padded.broken
        if why:
            raise CheckpointError(
                f"{checkpoint.model}, revision {checkpoint.revision}: PyTorch itself answers otherwise where a text is "
                f"padded, which every server has to do: {', '.join(repr(text[:60]) for text in item.values())}: {why}. "
                "Such a model cannot be served in batches; give another checkpoint."
            )


@dataclass(frozen=True)
class Evaluation:
    """The contents of an evaluation set.

    Args:
        items: The requests.
        baseline: PyTorch's answer to each item: fp32 `[width]`, or a JSON document.
        right: The right answer to each item where the user gave one, else None.
    """

    items: list[Item]
    baseline: list[Any]
    right: list[Any]


def read_evaluation_set(folder: Path) -> Evaluation:
    """Read the evaluation set that `answer_requests` wrote into the folder."""
    data = json.loads((folder / ITEMS_FILE).read_text(encoding="utf-8"))
    if (folder / BASELINE_NUMBERS).is_file():
        import numpy as np

        baseline = list(np.load(folder / BASELINE_NUMBERS))
    else:
        baseline = json.loads((folder / BASELINE_DOCUMENTS).read_text(encoding="utf-8"))
    return Evaluation(data["items"], baseline, data["right"])


def answer_requests(
    checkpoint: Checkpoint,
    source: Path,
    trust: Trust,
    items: list[Item],
    right: list[Any],
    folder: Path,
    threads: int,
) -> Baseline:
    """Let PyTorch answer the requests, and write requests and answers into the folder.

    This function runs in a child process.

    Args:
        checkpoint: The checkpoint's record.
        source: The folder with the checkpoint's files.
        trust: Whether the checkpoint's own code and its pickles may run.
        items: The requests.
        right: The right answer to each request, or None.
        folder: The folder of the evaluation set.
        threads: The number of threads that PyTorch uses.

    Raises:
        CheckpointError: The answers cannot serve as a baseline: they hold NaN or infinity, they change with padding, or
            they say too little to judge an engine by.
    """
    import numpy as np
    import torch

    from resources.accuracy.inference import answer_items
    from resources.pipelines import open_pipeline

    torch.set_num_threads(threads)
    pipeline, task = open_pipeline(str(source)), TASKS[checkpoint.task]
    require_answers(checkpoint.model, "evaluation", pipeline, items)
    module = task.module(checkpoint_files(checkpoint, source, trust), **trust.load_arguments)

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            answer: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
        return answer.astype(np.float32)

    answered = answer_items(
        pipeline,
        run,
        items,
        lambda lengths: equal_length_batches(list(chain.from_iterable(lengths)), _BATCH),
        per_token=task.per_token,
    )
    if answered.broken:
        raise CheckpointError(
            f"{checkpoint.model}, revision {checkpoint.revision}: PyTorch itself gives {answered.broken} of the "
            "evaluation set in fp32, so there is nothing to serve. The weights are damaged or the training diverged: "
            "give another checkpoint."
        )
    _require_padding(checkpoint, pipeline, run, items, answered.answers)
    lacking = task.too_little(checkpoint.settings, answered.answers)
    if lacking:
        raise CheckpointError(
            f"{checkpoint.model}, revision {checkpoint.revision}: {lacking} to judge an engine by. Give requests of "
            "your own, such as this model is for: evaluation, in the models file."
        )
    if pipeline.structured:
        text = json.dumps(answered.answers, ensure_ascii=False)
        (folder / BASELINE_DOCUMENTS).write_text(text, encoding="utf-8")
    else:
        np.save(folder / BASELINE_NUMBERS, np.stack(answered.answers))
    data = {"items": items, "right": right}
    (folder / ITEMS_FILE).write_text(json.dumps(data, ensure_ascii=False, indent=0), encoding="utf-8")
    return Baseline(answered.rows, answered.width, answered.longest_tokens)
