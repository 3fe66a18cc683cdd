"""The reference from outside: what the library answers that users would have used, end to end from text.

Engines are compared with PyTorch's answers, and those are made by our own reading of the checkpoint. A mistake there
would be in both. So PyTorch's answers have to equal those of sentence-transformers or of transformers' pipeline, each
of which reads the checkpoint by itself, before any engine is compared with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import Checkpoint
from resources.boundary.trust import Trust
from resources.checkpoints.collect import checkpoint_files
from resources.errors import CheckpointError, first_line
from resources.tasks import TASKS
from resources.tasks.samples import long_text

if TYPE_CHECKING:
    from resources.pipelines.base import Item, Pipeline

ANSWERS_FILE = "answers.json"
#: Texts and differences that an error or a record names.
_NAMED = 3
_MOST_CHARACTERS = 60


@dataclass(frozen=True)
class Comparison:
    """What comparing with the library came to; the fields are those of the record."""

    library: str
    compared: int
    refused: int
    rows: int
    retokenized: tuple[str, ...]


def compare_with_library(
    checkpoint: Checkpoint, source: Path, trust: Trust, evaluation: Path, folder: Path, threads: int
) -> Comparison:
    """Compare PyTorch's answers with the library's, and write those into the folder. Runs in a child process.

    Args:
        source: The checkpoint's folder.
        evaluation: The folder of the evaluation set.

    Raises:
        CheckpointError: The answers differ. The message has the texts.
    """
    import torch

    from resources.checkpoints.tokenizer import load_tokenizers
    from resources.pipelines import open_pipeline

    torch.set_num_threads(threads)
    who = f"{checkpoint.model}, revision {checkpoint.revision}"
    known, pipeline, task = read_evaluation_set(evaluation), open_pipeline(str(source)), TASKS[checkpoint.task]
    own, trained = load_tokenizers(source, trust.trust_remote_code)
    rows = _require_tokens(who, pipeline, trained, known.items)
    retokenized = tuple(text[:_MOST_CHARACTERS] for text in _retokenized(own, trained, known.items))
    library = task.library(
        checkpoint_files(checkpoint, source, trust),
        checkpoint.settings,
        trained,
        pipeline.encoder,
        **trust.load_arguments,
    )
    answers, failures = _answers(library.answer, known.items)
    for item, failure in failures:
        # Some libraries know no limit, and fail where a text is longer than the model has positions.
        if all(row.tokens < pipeline.encoder.max_tokens for row in pipeline.rows([item])[0]):
            raise CheckpointError(
                f"{who}: {library.name} fails on {len(failures)} requests of the evaluation set, the first that is not "
                f"too long being {_shown(item)}: {failure}. Try the checkpoint with that library alone. If it fails on "
                "requests of your own evaluation file only, remove them there."
            )
    if all(answer is None for answer in answers):
        raise CheckpointError(
            f"{who}: {library.name} answers none of the {len(answers)} requests of the evaluation set, the first being "
            f"{_shown(known.items[0])}. Give requests that it takes."
        )
    wrong = [
        (item, why)
        for item, expected, answer in zip(known.items, answers, known.baseline, strict=True)
        if expected is not None and (why := task.difference(checkpoint.settings, expected, answer))
    ]
    if wrong:
        raise CheckpointError(
            f"{who}: this release would answer otherwise than {library.name} for {len(wrong)} of {len(answers)} "
            f"requests: {_named(wrong)}. Nothing is built, because no engine could be right. Open an issue of "
            "transformer-refinery with this message, config.json and the tokenizer's files."
        )
    _write(folder / ANSWERS_FILE, answers)
    refused = sum(answer is None for answer in answers)
    return Comparison(library.name, len(answers) - refused, refused, rows, retokenized)


def _answers(answer: Any, items: Iterable[Item]) -> tuple[list[Any], list[tuple[Item, str]]]:
    """Return the library's answers, None where it gives none, and what it says of the items on which it fails."""
    answers: list[Any] = []
    failures: list[tuple[Item, str]] = []
    for item in items:
        try:
            answers.append(answer(item))
        except BaseException as error:
            # A panic of tokenizers, which is written in Rust, is no Exception: where a question leaves the context less
            # room than windows share, say.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            answers.append(None)
            failures.append((item, first_line(error)))
    return answers, failures


def _require_tokens(who: str, pipeline: Pipeline, tokenizer: Any, items: list[Item]) -> int:
    """The rows of the items. Raises CheckpointError where the tokenizer's own ids are others than those that serve."""
    encoder = pipeline.encoder
    segments = [segment for item in items for segment in pipeline.segments(item)]
    # What is longer than any limit is not always among the items.
    long = long_text(encoder.max_tokens)
    pair = (long, "a") if encoder.strategy == "only_first" else ("a", long)
    segments.append(encoder.enough((long,) if len(segments[0]) == 1 else pair, windows=pipeline.windows))
    cutting: dict[str, Any] = {"truncation": encoder.strategy, "max_length": encoder.max_tokens}
    if pipeline.windowed:
        cutting |= {"stride": encoder.stride, "return_overflowing_tokens": True}
    ids: list[list[int]] = []
    expected: list[list[int]] = []
    texts: list[str] = []
    # Classifiers take texts and pairs of them.
    for _, group in groupby(sorted(segments, key=len), key=len):
        same = [*group]
        for segment, encoding in zip(same, encoder.tokens(same), strict=True):
            windows = (encoding, *(encoding.overflowing if pipeline.windowed else ()))
            ids += [window.ids for window in windows]
            texts += [" | ".join(segment)] * len(windows)
        expected += tokenizer(*([*part] for part in zip(*same, strict=True)), **cutting)["input_ids"]
    wrong = [number for number, (first, second) in enumerate(zip(ids, expected, strict=True)) if first != second]
    if wrong:
        raise CheckpointError(
            f"{who}: this release would give the model other tokens than transformers does for {len(wrong)} of "
            f"{len(ids)} rows, the first being of {texts[wrong[0]][:_MOST_CHARACTERS]!r}. Nothing is "
            "built. Open an issue of transformer-refinery with this message and the tokenizer's files."
        )
    return len(ids)


def _retokenized(own: Any, trained: Any, items: Iterable[Item]) -> Iterator[str]:
    """Yield the texts that transformers by itself tokenizes otherwise than with tokenizer.json as it was trained."""
    # A tokenizer that exists only in Python has no backend.
    backend = getattr(own, "backend_tokenizer", None)
    if backend is not None and backend.to_str() == trained.backend_tokenizer.to_str():
        return
    for text in dict.fromkeys(text for item in items for text in item.values()):
        if own(text, truncation=True)["input_ids"] != trained(text, truncation=True)["input_ids"]:
            yield text


def _named(wrong: list[tuple[Item, str]]) -> str:
    said = [f"{_shown(item)}: {why}" for item, why in wrong[:_NAMED]]
    return "; ".join([*said, "..."] if len(wrong) > _NAMED else said)


def _shown(item: Item) -> str:
    return ", ".join(repr(text[:_MOST_CHARACTERS]) for text in item.values())


def _write(path: Path, answers: list[Any]) -> None:
    plain = [answer.tolist() if hasattr(answer, "tolist") else answer for answer in answers]
    path.write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
