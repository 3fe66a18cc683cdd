"""The choice of the shapes to benchmark: the user's own, those of the user's sample, or the default ones."""

from __future__ import annotations

from collections.abc import Iterable

from resources.artifacts.records import Checkpoint, LengthProfile
from resources.catalog.entries import DEFAULT_SHAPES, ModelEntry, Shape
from resources.errors import CheckpointError

#: The batch size for requests of the usual length. Single requests are benchmarked too.
_USUAL_BATCH = 8


def shapes_of(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """Return the shapes to optimize for.

    Raises:
        CheckpointError: A shape of the entry is longer than the checkpoint accepts.
    """
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
    """Return four shapes: one usual request, one long request, a batch of usual and the largest batch of long ones.

    The usual length is the median of the sample, and the long length is the 95th percentile. Each is padded to its
    bucket, as the rows of a release are.
    """
    usual, long = (lengths.bucket(lengths.percentile(share)) for share in (0.5, 0.95))
    return [(1, usual), (1, long), (_USUAL_BATCH, usual), (max_batch_size, long)]


def _clamped(shapes: Iterable[tuple[int, int]], entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """Reduce the shapes to the largest batch and length that are served, and remove duplicates."""
    batch, tokens = entry.max_batch_size, checkpoint.max_tokens
    clamped = (Shape(batch=min(rows, batch), sequence=min(length, tokens)) for rows, length in shapes)
    return tuple(dict.fromkeys(clamped))
