"""What TensorRT tunes an engine for: optimization profiles by the lengths and batches that are served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from resources.catalog.entries import Shape, TensorRtSettings
from resources.errors import EngineError


@dataclass(frozen=True)
class Profile:
    """Batches of 1 to `batch` rows, of `shortest` to `longest` tokens each, fastest at `best`."""

    shortest: int
    longest: int
    batch: int
    best: Shape

    def __str__(self) -> str:
        return f"1x{self.shortest} to {self.batch}x{self.longest}, best at {self.best}"


@dataclass(frozen=True)
class Tuning:
    """How an engine is built that is tuned to shapes.

    caches: a folder for what builds have timed, kept from build to build. seconds: when to give up, so that what was
    timed until then is kept; a builder that is killed loses it.
    """

    profiles: tuple[Profile, ...]
    settings: TensorRtSettings
    caches: Path
    seconds: float


def profiles_of(buckets: Sequence[int], shapes: Sequence[Shape], max_batch_size: int, most: int) -> tuple[Profile, ...]:
    """Profiles that hold every length up to the last bucket, each length in one of them alone; at most `most`.

    buckets: what rows are padded to, in order. Where there are more of them than profiles, those that the shapes fall
    into end a profile first, and then those that halve the widest one. Each is tuned for the middle one of the shapes
    within it, by tokens: tuned for the smallest the largest would suffer, and the other way round.
    """
    ends = [buckets[-1]]
    for shape in shapes:
        bucket = next((size for size in buckets if size >= shape.sequence), buckets[-1])
        if bucket not in ends and len(ends) < most:
            ends.append(bucket)
    while len(ends) < min(most, len(buckets)):
        left = [size for size in buckets if size not in ends]
        ends.append(min(left, key=lambda size: (_widest([buckets[0], *ends, size]), -size)))
    found, shortest = [], 1
    for longest in sorted(ends):
        found.append(Profile(shortest, longest, max_batch_size, _best(shapes, shortest, longest, max_batch_size)))
        shortest = longest + 1
    return tuple(found)


def check_profiles(model: str, profiles: Sequence[Profile], max_tokens: int) -> None:
    """Raise EngineError for a profile longer than the model takes: TensorRT builds it, and reads beyond a table."""
    for profile in profiles:
        if profile.longest > max_tokens:
            raise EngineError(
                f"{model}: an optimization profile reaches {profile.longest} tokens ({profile}), and this checkpoint "
                f"takes {max_tokens}. Shorten `shapes` in the models file, or the buckets of the checkpoint."
            )


def _widest(ends: Sequence[int]) -> float:
    """The largest ratio between the ends of neighbouring profiles; of the first, from the shortest bucket on."""
    inner = sorted(set(ends))
    return max((high / low for low, high in pairwise(inner)), default=1.0)


def _best(shapes: Sequence[Shape], shortest: int, longest: int, max_batch_size: int) -> Shape:
    inside = [shape for shape in shapes if shortest <= shape.sequence <= longest]
    if not inside:  # nobody asked for these lengths: the longest of them, in a batch of the usual size
        batches = sorted(shape.batch for shape in shapes) or [1]
        return Shape(batch=min(batches[len(batches) // 2], max_batch_size), sequence=longest)
    inside.sort(key=lambda shape: (shape.batch * shape.sequence, shape.sequence))
    return inside[len(inside) // 2]
