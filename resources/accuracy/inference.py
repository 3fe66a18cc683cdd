"""Requests through a pipeline and an engine, in planned batches. Lives in child processes only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from resources.accuracy.batches import PlannedBatch, plan_alone, plan_batches
from resources.pipelines.base import Item, Pipeline, Row

#: Batches of rows by their lengths in tokens, given by request; indices count the rows of all requests.
Planner = Callable[[list[list[int]]], list[PlannedBatch]]
#: int64 arrays by input name to fp32 `[batch, width]` or `[batch, sequence, width]`.
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Answered:
    """One answer a request, or, where there can be none, what is wrong with the engine's numbers."""

    answers: list[Any]
    broken: str = ""
    rows: int = 0
    longest_tokens: int = 0
    width: int = 0


def answer_items(
    pipeline: Pipeline, run: Run, items: Sequence[Item], plan: Planner, *, per_token: bool, width: int | None = None
) -> Answered:
    """Answers to the items. Each row's numbers are cut to its own tokens before the pipeline sees them.

    width: of the engine's output; any where it is None.
    """
    groups = pipeline.rows(items)
    rows = [row for group in groups for row in group]
    lengths = [row.tokens for row in rows]
    outputs: list[np.ndarray | None] = [None] * len(rows)
    for batch in plan([[row.tokens for row in group] for group in groups]):
        members = [rows[index] for index in batch.indices]
        output = run(pipeline.arrays(members, batch.length))
        broken = _wrong_shape(output, len(members), batch.length if per_token else None, width)
        if broken:
            return Answered([], broken)
        for index, values in zip(batch.indices, output, strict=True):
            outputs[index] = values[: lengths[index]] if per_token else values
    whole = [output for output in outputs if output is not None]
    assert len(whole) == len(rows), "the plan leaves rows out, and every later answer would be another's"
    bad = sum(not np.isfinite(output).all() for output in whole)
    if bad:
        return Answered([], f"NaN or infinity in the answers to {bad} of {len(whole)} rows")
    return Answered(
        _answers(pipeline, items, groups, whole),
        rows=len(rows),
        longest_tokens=max(lengths, default=0),
        width=whole[0].shape[-1] if whole else 0,
    )


#: How requests reach a server: by themselves, and in any company. Engines whose scales are computed from each batch
#: answer the two differently, and both have to be right.
WAYS = ("alone", "in company")


def answer_every_way(
    pipeline: Pipeline, run: Run, items: Sequence[Item], max_batch_size: int, *, per_token: bool, width: int
) -> Iterator[Answered]:
    """The answers to the items, once for each of the ways."""
    bucket = pipeline.encoder.bucket
    plans: dict[str, Planner] = {
        "alone": lambda lengths: plan_alone(lengths, bucket, max_batch_size),
        "in company": lambda lengths: plan_batches(list(chain.from_iterable(lengths)), bucket, max_batch_size),
    }
    for way in WAYS:
        yield answer_items(pipeline, run, items, plans[way], per_token=per_token, width=width)


def _answers(
    pipeline: Pipeline, items: Sequence[Item], groups: Sequence[list[Row]], outputs: Sequence[np.ndarray]
) -> list[Any]:
    remaining = iter(outputs)
    return [
        pipeline.answer(item, group, [next(remaining) for _ in group])
        for item, group in zip(items, groups, strict=True)
    ]


def _wrong_shape(output: np.ndarray, rows: int, tokens: int | None, width: int | None) -> str:
    expected = (rows, width) if tokens is None else (rows, tokens, width)
    fits = len(output.shape) == len(expected) and all(
        wanted is None or wanted == found for wanted, found in zip(expected, output.shape, strict=True)
    )
    return "" if fits else f"answers of shape {output.shape} where PyTorch gives {expected}"
