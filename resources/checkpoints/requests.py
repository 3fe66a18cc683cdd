"""The requests for evaluation and for length profiles, from a user's file or from the task itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.catalog.entries import ModelEntry
from resources.errors import CatalogError
from resources.tasks import TASKS

if TYPE_CHECKING:
    from resources.pipelines.base import Item, Pipeline

#: Fewer requests are too few for a rate. Even of 20, a single one that differs misses every rate of .98.
FEWEST_ITEMS = 20


def evaluation_requests(entry: ModelEntry, settings: dict[str, Any], max_tokens: int) -> tuple[list[Item], list[Any]]:
    """Return the user's evaluation requests with their right answers, or else the task's own requests.

    The task's own requests have None in place of each right answer.

    Args:
        entry: The entry that may name a file of requests.
        settings: The checkpoint's settings for its pipeline.
        max_tokens: The checkpoint's limit of tokens for a text.

    Raises:
        CatalogError: The user's file cannot be read or has a mistake.
    """
    if entry.evaluation is None:
        items = TASKS[entry.task].items(settings, max_tokens)
        return items, [None] * len(items)
    found = _read(entry, "evaluation", entry.evaluation, settings)
    return [item for item, _ in found], [right for _, right in found]


def sampled_requests(entry: ModelEntry, settings: dict[str, Any], most: int) -> list[Item]:
    """Return the requests of the first `most` lines of the user's sample.

    Raises:
        CatalogError: The sample cannot be read or has a mistake.
    """
    assert entry.sample is not None, "callers check that the entry names a sample"
    return [item for item, _ in _read(entry, "sample", entry.sample, settings, most)]


def require_answers(model: str, field: str, pipeline: Pipeline, items: list[Item]) -> None:
    """Check that the model's releases would answer each of the user's requests.

    Raises:
        CatalogError: The releases would refuse a request even if it is sent alone. The error names its number.
    """
    from resources.pipelines.limits import RefusedError

    for number, item in enumerate(items, start=1):
        try:
            pipeline.prepare(item)
        except RefusedError as error:
            raise CatalogError(
                f"{model}: {field}: request {number} would be refused: {error}. Remove it from the file, or shorten it."
            ) from None


def _read(
    entry: ModelEntry, field: str, file: str, settings: dict[str, Any], most: int | None = None
) -> list[tuple[Item, Any]]:
    """Return the requests of each line, each with its right answer or None.

    Raises:
        CatalogError: The file cannot be read, has a mistake, or holds fewer than FEWEST_ITEMS requests. The error names
            the model, the field, the file and the line.
    """
    path, task = Path(file), TASKS[entry.task]
    where = f"{entry.name}: {field}: {path}"
    try:
        # splitlines would also split at Unicode's line separators, which a JSON string may hold unescaped.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{where} cannot be read: {error}. Give a JSON Lines file in UTF-8.") from None
    found: list[tuple[Item, Any]] = []
    for number, line in enumerate(lines[:most], start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if not isinstance(data, dict):
                raise ValueError("it is not a JSON object")
            unknown = sorted(set(data) - set(task.fields))
            if unknown:
                raise ValueError(
                    f"{unknown[0]!r} is not a field of {entry.task}; its fields are {', '.join(task.fields)}"
                )
            found += task.read(settings, data)
        except ValueError as error:
            raise CatalogError(f"{where}, line {number}: {error}. Correct the line, or remove it.") from None
    if len(found) < FEWEST_ITEMS:
        raise CatalogError(f"{where} holds {len(found)} requests, but needs at least {FEWEST_ITEMS}. Add more.")
    return found
