"""Which shapes are benchmarked: the user's own, those of the user's texts, or the usual ones."""

from __future__ import annotations

from collections.abc import Iterable

from resources.artifacts.records import Checkpoint, LengthProfile
from resources.catalog.entries import DEFAULT_SHAPES, ModelEntry, Shape
from resources.errors import CheckpointError

#: Batches of requests of the usual length, beside single ones.
_USUAL_BATCH = 8


def shapes_of(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """The shapes to optimize for. Raises CheckpointError where one is longer than the checkpoint takes."""
    if entry.shapes is None and checkpoint.lengths is not None:
        return _clamped(_usual_and_long(checkpoint.lengths, entry.max_batch_size), entry, checkpoint)
    if entry.shapes is None:
        return _clamped(((shape.batch, shape.sequence) for shape in DEFAULT_SHAPES), entry, checkpoint)
    for shape in entry.shapes:
        if shape.sequence > checkpoint.max_tokens:
            raise CheckpointError(
                f"{entry.name}: shapes: {shape} is longer than this checkpoint takes ({checkpoint.max_tokens} tokens). "
                "Shorten it in the models file."
            )
    return entry.shapes


def _usual_and_long(lengths: LengthProfile, max_batch_size: int) -> list[tuple[int, int]]:
    """One request of the usual length, one of the long ones, a batch of usual and the largest batch of long ones.

    Usual is the median, long the 95th percentile, each padded to its bucket: what an engine gets in service.
    """
    usual, long = (lengths.bucket(lengths.percentile(share)) for share in (0.5, 0.95))
    return [(1, usual), (1, long), (_USUAL_BATCH, usual), (max_batch_size, long)]


def _clamped(shapes: Iterable[tuple[int, int]], entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """The shapes within what is served, none twice."""
    batch, tokens = entry.max_batch_size, checkpoint.max_tokens
    clamped = (Shape(batch=min(rows, batch), sequence=min(length, tokens)) for rows, length in shapes)
    return tuple(dict.fromkeys(clamped))
