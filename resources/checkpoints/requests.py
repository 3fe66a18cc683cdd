"""Requests from a user's file, or the task's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.catalog.entries import ModelEntry
from resources.errors import CatalogError
from resources.tasks import TASKS

if TYPE_CHECKING:
    from resources.pipelines.base import Item, Pipeline

#: Fewer are no sample of anything: of 20, one alone that differs misses every rate of .98.
FEWEST_ITEMS = 20


def evaluation_requests(entry: ModelEntry, settings: dict[str, Any], max_tokens: int) -> tuple[list[Item], list[Any]]:
    """The user's evaluation requests with their right answers, or the task's own. Raises CatalogError.

    settings, max_tokens: the checkpoint's, for its pipeline.
    """
    if entry.evaluation is None:
        items = TASKS[entry.task].items(settings, max_tokens)
        return items, [None] * len(items)
    found = _read(entry, "evaluation", entry.evaluation, settings)
    return [item for item, _ in found], [right for _, right in found]


def sampled_requests(entry: ModelEntry, settings: dict[str, Any], most: int) -> list[Item]:
    """The first requests of the user's sample. Raises CatalogError."""
    assert entry.sample is not None, "there is a sample only where the catalog names one"
    return [item for item, _ in _read(entry, "sample", entry.sample, settings, most)]


def require_answers(model: str, field: str, pipeline: Pipeline, items: list[Item]) -> None:
    """Raise CatalogError for a request of the user's that the model's releases would refuse, however it is asked."""
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
    """Each line's requests with the right answer or None. Raises CatalogError naming model, field, file and line."""
    path, task = Path(file), TASKS[entry.task]
    where = f"{entry.name}: {field}: {path}"
    try:
        # Not splitlines: a text may hold a line separator of Unicode, which JSON does not escape.
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
                raise ValueError("it is no JSON object")
            unknown = sorted(set(data) - set(task.fields))
            if unknown:
                raise ValueError(f"{unknown[0]!r} is no field of {entry.task}; there are {', '.join(task.fields)}")
            found += task.read(settings, data)
        except ValueError as error:
            raise CatalogError(f"{where}, line {number}: {error}. Mend the line, or remove it.") from None
    if len(found) < FEWEST_ITEMS:
        raise CatalogError(f"{where} holds {len(found)} requests; at least {FEWEST_ITEMS} are needed to say anything.")
    return found
