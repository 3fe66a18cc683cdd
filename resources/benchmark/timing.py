"""Timing of engines in turns, so that a disturbance of the machine affects all of them.

The pipeline times a candidate against PyTorch. `refinery bench` times any number of engines together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from resources.artifacts.records import ShapeTiming
from resources.benchmark.statistics import SAMPLES_FOR_P99, median_ratio, summarize, windows_agree
from resources.catalog.entries import Shape

#: Runs before the timed ones. The first run allocates, and the second is the first with warm caches.
WARM_UP_RUNS = 3
#: One turn takes about this long, then the next engine runs.
TURN_MS = 60.0
MOST_RUNS_A_TURN = 20
#: If the fastest engine's run is shorter than this, each turn begins with one untimed run, because another engine has
#: just filled the caches.
COLD_BELOW_MS = 30.0
#: A round has one sample of each engine. With two engines, a round is a pair.
FEWEST_PAIRS = 20
FEWEST_PAIRS_A_WINDOW = 4
MOST_PAIRS_A_WINDOW = 40


class Contestant(Protocol):
    """One engine that takes turns with others.

    It is a resources.processes.isolation.Worker that holds a resources.benchmark.worker.EngineWorker, or wraps one.
    `call` calls a method of that EngineWorker in its process, and returns its result.
    """

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the contestant, and return what it returns."""


@dataclass
class PairSamples:
    """Raw milliseconds at one shape. Times with the same index are one pair, measured within one turn of each other."""

    baseline_ms: list[float]
    candidate_ms: list[float]
    baseline_runs: int  # The runs include untimed ones.
    candidate_runs: int


@dataclass(frozen=True)
class Turns:
    """The times of several engines at one shape.

    All lists have one element for each engine, in the order in which the engines were given. The first engine is the
    baseline.

    Args:
        shape: The shape of the batch.
        times_ms: Each engine's raw times. Times with the same index are one round, measured within one turn of each
            other.
        window_speedups: Each engine's median speedup over the baseline in each window. It is 1 for the baseline.
        agreed: Whether the last windows agreed for every engine. If False, the time ended the measurement.
        runs: The number of runs of each engine, untimed runs included.
        memory_bytes: The memory of each engine, as EngineWorker.memory returns it.
    """

    shape: Shape
    times_ms: list[list[float]]
    window_speedups: list[list[float]]
    agreed: bool
    runs: list[int]
    memory_bytes: list[int]

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return len(self.times_ms[0])

    def speedup(self, engine: int, over: int = 0) -> float:
        """Return how many times faster an engine is than another, as the median over the rounds.

        Args:
            engine: The index of the engine.
            over: The index of the other engine.
        """
        return median_ratio(self.times_ms[over], self.times_ms[engine])

    def timing(self, engine: int) -> ShapeTiming:
        """Return the timing of the engine with that index against the baseline."""
        return ShapeTiming(
            shape=str(self.shape),
            baseline=summarize(self.times_ms[0], self.shape.batch),
            candidate=summarize(self.times_ms[engine], self.shape.batch),
            speedup=self.speedup(engine),
            window_speedups=tuple(self.window_speedups[engine]),
            agreed=self.agreed,
            pairs=self.rounds,
            candidate_memory_bytes=self.memory_bytes[engine],
            baseline_memory_bytes=self.memory_bytes[0],
        )


def in_order(count: int, turn: int) -> list[int]:
    """Return the order in which `count` engines run in a turn.

    Each turn begins with the next engine. With more than two engines, every other cycle of turns runs backwards, so
    that an engine does not always follow the same neighbour.
    """
    order = [(place + turn) % count for place in range(count)]
    return order[::-1] if count > 2 and turn // count % 2 else order


def take_turns(contestants: Sequence[Contestant], texts: Sequence[str], shape: Shape, seconds: float) -> Turns:
    """Run the engines in turns until the last windows agree on each one's speedup, or until `seconds` are over.

    Agreement does not end the measurement before 20 rounds, nor before there are enough rounds for a 99th percentile
    if those fit into the time.
    """
    deadline = time.monotonic() + seconds
    for contestant in contestants:
        contestant.call("prepare", texts, shape.batch, shape.sequence)
    first = [contestant.call("burst", WARM_UP_RUNS - 1, 1)[0] for contestant in contestants]
    runs = max(1, min(MOST_RUNS_A_TURN, math.floor(TURN_MS / max(first))))
    warm = 1 if min(first) < COLD_BELOW_MS else 0
    times: list[list[float]] = [[] for _ in contestants]
    windows: list[list[float]] = [[] for _ in contestants]
    fits = 0.9 * seconds * 1000 / (sum(first) * (1 + warm / runs))
    enough = SAMPLES_FOR_P99 if fits > SAMPLES_FOR_P99 else FEWEST_PAIRS
    per_window = min(MOST_PAIRS_A_WINDOW, max(FEWEST_PAIRS_A_WINDOW, 2 * runs))
    agreed = False
    while not agreed:
        start = len(times[0])
        while len(times[0]) - start < per_window and time.monotonic() < deadline:
            # The samples of a turn are added only once every engine has run, so that the same index is the same round.
            order = in_order(len(contestants), len(times[0]) // runs)
            timed = {place: contestants[place].call("burst", warm, runs) for place in order}
            for place, samples in timed.items():
                times[place] += samples
        if len(times[0]) - start >= min(per_window, FEWEST_PAIRS_A_WINDOW):
            for place, samples in enumerate(times):
                windows[place].append(median_ratio(times[0][start:], samples[start:]))
        if time.monotonic() >= deadline:
            break
        agreed = len(times[0]) >= enough and all(windows_agree(ratios) for ratios in windows)
    if not times[0]:  # The warm-up took all the time, so its last run is the only sample.
        times = [[sample] for sample in first]
    return Turns(
        shape=shape,
        times_ms=times,
        window_speedups=windows,
        agreed=agreed,
        runs=[contestant.call("runs") for contestant in contestants],
        memory_bytes=[contestant.call("memory") for contestant in contestants],
    )


def time_shape(
    baseline: Contestant, candidate: Contestant, texts: Sequence[str], shape: Shape, seconds: float
) -> tuple[ShapeTiming, PairSamples]:
    """Time a candidate and the baseline in turns at one shape, as `take_turns` does."""
    turns = take_turns([baseline, candidate], texts, shape, seconds)
    return turns.timing(1), PairSamples(turns.times_ms[0], turns.times_ms[1], turns.runs[0], turns.runs[1])


def time_shapes(
    baseline: Contestant, candidate: Contestant, texts: Sequence[str], shapes: Sequence[Shape], seconds: float
) -> tuple[list[ShapeTiming], dict[str, PairSamples]]:
    """Time a candidate and the baseline in turns at every shape, within `seconds` for all shapes together."""
    timings: list[ShapeTiming] = []
    samples: dict[str, PairSamples] = {}
    for shape, share in shares(shapes, seconds):
        timing, samples[str(shape)] = time_shape(baseline, candidate, texts, shape, share)
        timings.append(timing)
    return timings, samples


def shares(shapes: Sequence[Shape], seconds: float) -> Iterator[tuple[Shape, float]]:
    """Yield the shapes, the smallest first, each with the seconds that it may take.

    The time that a shape does not use goes to the later, larger ones.
    """
    deadline = time.monotonic() + seconds
    ordered = sorted(shapes, key=lambda item: item.batch * item.sequence)
    # A share is proportional to the fourth root of the number of tokens. A large batch needs more time for its twenty
    # pairs than a small one for its hundred, but its time grows more slowly than its size. With 45 s, the default
    # shapes get 5, 8, 13 and 19 s.
    weights = [(shape.batch * shape.sequence) ** 0.25 for shape in ordered]
    for number, shape in enumerate(ordered):
        yield shape, max(0.0, deadline - time.monotonic()) * weights[number] / sum(weights[number:])
