"""The lengths and batches that TensorRT tunes an engine for, as optimization profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from resources.catalog.entries import Shape, TensorRtSettings
from resources.errors import EngineError


@dataclass(frozen=True)
class Profile:
    """Batches of 1 to `batch` rows of `shortest` to `longest` tokens each, which run fastest at the shape `best`."""

    shortest: int
    longest: int
    batch: int
    best: Shape

    def __str__(self) -> str:
        return f"1x{self.shortest} to {self.batch}x{self.longest}, best at {self.best}"


@dataclass(frozen=True)
class Tuning:
    """The settings of an engine that is tuned to shapes.

    Args:
        caches: The folder of the timings that builders share from build to build.
        seconds: How long a build may take. The builder then gives up and keeps its timings; a builder that is killed
            loses them.
    """

    profiles: tuple[Profile, ...]
    settings: TensorRtSettings
    caches: Path
    seconds: float


def profiles_of(buckets: Sequence[int], shapes: Sequence[Shape], max_batch_size: int, most: int) -> tuple[Profile, ...]:
    """Return at most `most` profiles that hold every length up to the last bucket, each length in one profile.

    If there are more buckets than profiles, a profile ends first at each bucket that one of the shapes falls into, and
    then at the buckets that best divide the widest profile. Each profile is tuned for the middle one, by tokens, of the
    shapes within it. A profile that is tuned for its smallest shape slows the largest one down, and the other way
    round.

    Args:
        buckets: The lengths that rows are padded to, in ascending order.
        shapes: The shapes that are served.
        max_batch_size: The largest batch of every profile.
        most: The largest number of profiles.
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
    """Check that no profile is longer than the model accepts.

    TensorRT builds such a profile, and the engine then reads beyond the end of a table.

    Raises:
        EngineError: A profile is too long.
    """
    for profile in profiles:
        if profile.longest > max_tokens:
            raise EngineError(
                f"{model}: an optimization profile reaches {profile.longest} tokens ({profile}), but this checkpoint "
                f"takes at most {max_tokens}. Shorten `shapes` in the models file, or the buckets of the checkpoint."
            )


def _widest(ends: Sequence[int]) -> float:
    """Return the largest ratio between two neighbouring ends.

    The caller passes the shortest bucket as an end, so the first profile counts from there.
    """
    inner = sorted(set(ends))
    return max((high / low for low, high in pairwise(inner)), default=1.0)


def _best(shapes: Sequence[Shape], shortest: int, longest: int, max_batch_size: int) -> Shape:
    inside = [shape for shape in shapes if shortest <= shape.sequence <= longest]
    if not inside:  # no served shape has such a length: take the longest, with the median batch size
        batches = sorted(shape.batch for shape in shapes) or [1]
        return Shape(batch=min(batches[len(batches) // 2], max_batch_size), sequence=longest)
    inside.sort(key=lambda shape: (shape.batch * shape.sequence, shape.sequence))
    return inside[len(inside) // 2]
