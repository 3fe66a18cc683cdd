"""The independent reference: the answers, end to end from text, of the library that users would use otherwise.

Engines are compared with PyTorch's answers. This project reads the checkpoint to compute those, so a mistake in that
reading would be in the engines and in their baseline. PyTorch's answers must therefore equal the answers of
sentence-transformers or of transformers' pipeline, which read the checkpoint on their own, before any engine is
compared with them.
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
#: The largest number of requests that an error message names.
_NAMED = 3
_MOST_CHARACTERS = 60


@dataclass(frozen=True)
class LibraryComparison:
    """The result of the comparison with the library.

    The fields have the meaning of those of resources.artifacts.records.Reference.
    """

    library: str
    compared: int
    refused: int
    rows: int
    retokenized: tuple[str, ...]


def compare_with_library(
    checkpoint: Checkpoint, source: Path, trust: Trust, evaluation: Path, folder: Path, threads: int
) -> LibraryComparison:
    """Compare PyTorch's answers with the library's answers, and write the library's answers into the folder.

    This function runs in a child process.

    Args:
        checkpoint: The checkpoint's record.
        source: The folder with the checkpoint's files.
        trust: Whether the checkpoint's own code and its pickles may run.
        evaluation: The folder of the evaluation set.
        folder: The folder for the library's answers.
        threads: The number of threads that PyTorch uses.

    Raises:
        CheckpointError: The answers or the token ids differ, or the library cannot answer. The message names the texts.
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
        # Some libraries do not truncate, and fail on a text that is longer than the model's positions.
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
    return LibraryComparison(library.name, len(answers) - refused, refused, rows, retokenized)


def _answers(answer: Any, items: Iterable[Item]) -> tuple[list[Any], list[tuple[Item, str]]]:
    """Return the library's answers, and each item on which it fails with its error message.

    An answer is None where the library gives none.
    """
    answers: list[Any] = []
    failures: list[tuple[Item, str]] = []
    for item in items:
        try:
            answers.append(answer(item))
        except BaseException as error:
            # tokenizers is written in Rust, and its panics do not derive from Exception. It panics, for example, when a
            # question leaves the context less room than the overlap of two windows.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            answers.append(None)
            failures.append((item, first_line(error)))
    return answers, failures


def _require_tokens(who: str, pipeline: Pipeline, tokenizer: Any, items: list[Item]) -> int:
    """Check that transformers' tokenizer gives the same token ids as the release, and return the number of rows.

    Args:
        who: The model and revision, for the error message.
        pipeline: The pipeline that the release serves.
        tokenizer: transformers' tokenizer of the checkpoint.
        items: The requests of the evaluation set.

    Raises:
        CheckpointError: The token ids of a row differ.
    """
    encoder = pipeline.encoder
    segments = [segment for item in items for segment in pipeline.segments(item)]
    # The items do not always hold a text that is longer than the limit, so one is added.
    long = long_text(encoder.max_tokens)
    pair = (long, "a") if encoder.strategy == "only_first" else ("a", long)
    segments.append(encoder.enough((long,) if len(segments[0]) == 1 else pair, windows=pipeline.windows))
    cutting: dict[str, Any] = {"truncation": encoder.strategy, "max_length": encoder.max_tokens}
    if pipeline.windowed:
        cutting |= {"stride": encoder.stride, "return_overflowing_tokens": True}
    ids: list[list[int]] = []
    expected: list[list[int]] = []
    texts: list[str] = []
    # Classifiers take single texts and pairs of texts, and the tokenizer takes one kind at a time.
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
    """Yield the texts for which transformers' default tokenizer gives other ids than tokenizer.json as trained.

    Args:
        own: The tokenizer as transformers loads it on its own.
        trained: The tokenizer with tokenizer.json as it was trained.
        items: The requests to tokenize.
    """
    # A tokenizer that is written in Python has no backend.
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
