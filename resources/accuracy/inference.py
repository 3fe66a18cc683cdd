"""Answers to requests, computed by a pipeline and an engine in planned batches.

This module is imported in child processes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from resources.accuracy.batches import PlannedBatch, plan_alone, plan_batches
from resources.pipelines.base import Item, Pipeline, Row

#: A planner takes the lengths of all rows in tokens, grouped by request, and returns batches. The indices in a batch
#: count the rows of all requests.
Planner = Callable[[list[list[int]]], list[PlannedBatch]]
#: A run takes int64 arrays by input name and returns fp32 `[batch, width]` or `[batch, sequence, width]`.
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Answered:
    """The answers to a list of requests, or the reason why there are none.

    Args:
        answers: One answer for each request; empty if the engine's numbers are unusable.
        broken: The reason why the engine's numbers are unusable; empty if they are usable.
        rows: The number of rows that the engine answered.
        longest_tokens: The number of tokens of the longest row.
        width: The number of values in the output for each row or token.
    """

    answers: list[Any]
    broken: str = ""
    rows: int = 0
    longest_tokens: int = 0
    width: int = 0


def answer_items(
    pipeline: Pipeline, run: Run, items: Sequence[Item], plan: Planner, *, per_token: bool, width: int | None = None
) -> Answered:
    """Answer the items in the planned batches.

    Where an engine answers each token, the values of a row are cut to the row's own tokens before the pipeline sees
    them.

    Args:
        pipeline: Turns items into rows, and the engine's output into answers.
        run: Runs the engine on one batch.
        items: The requests to answer.
        plan: Plans the batches.
        per_token: Whether the engine answers each token and not each row.
        width: The width that the engine's output must have. None accepts any width.
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


#: A request reaches a server alone or in a batch with any other requests. Engines that compute their scales from each
#: batch answer the two cases differently, and both answers must be right.
WAYS = ("alone", "in company")


def answer_every_way(
    pipeline: Pipeline, run: Run, items: Sequence[Item], max_batch_size: int, *, per_token: bool, width: int
) -> Iterator[Answered]:
    """Yield the answers to all items, once for each of `WAYS`."""
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
