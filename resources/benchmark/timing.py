"""Timing engines in turns, so that whatever disturbs the machine disturbs all of them.

The pipeline times a candidate against PyTorch, `refinery bench` any number of engines: a pair is the case of two.
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

#: Runs before anything is timed: the first run allocates, the second is the first with warm caches.
WARM_UP_RUNS = 3
#: One turn runs for about this long, then the next engine has its turn.
TURN_MS = 60.0
MOST_RUNS_A_TURN = 20
#: Calls faster than this get one untimed run at the beginning of each turn: another engine has just had the caches.
COLD_BELOW_MS = 30.0
#: Rounds have one sample of each engine; of two they are pairs.
FEWEST_PAIRS = 20
FEWEST_PAIRS_A_WINDOW = 4
MOST_PAIRS_A_WINDOW = 40


class Contestant(Protocol):
    """What takes turns: a resources.processes.isolation.Worker that holds a resources.benchmark.worker.EngineWorker."""

    def call(self, method: str, *args: Any) -> Any: ...


@dataclass
class PairSamples:
    """Raw milliseconds at one shape; the same index is one pair, measured within one turn of each other."""

    baseline_ms: list[float]
    candidate_ms: list[float]
    baseline_runs: int  # untimed ones included
    candidate_runs: int


@dataclass(frozen=True)
class Turns:
    """What several engines took at one shape, in the order in which they were given; the first is the baseline.

    times_ms: raw milliseconds of each; the same index is one round, measured within one turn of each other.
    window_speedups: of each, the median ratio to the baseline in each window; 1 for the baseline itself.
    agreed: the last windows agreed for every engine; False: the time bound ended the measuring.
    runs: of each, untimed ones included. memory_bytes: of each, see EngineWorker.memory.
    """

    shape: Shape
    times_ms: list[list[float]]
    window_speedups: list[list[float]]
    agreed: bool
    runs: list[int]
    memory_bytes: list[int]

    @property
    def rounds(self) -> int:
        return len(self.times_ms[0])

    def speedup(self, engine: int, over: int = 0) -> float:
        """How many times faster an engine is than another: the median over the rounds."""
        return median_ratio(self.times_ms[over], self.times_ms[engine])

    def timing(self, engine: int) -> ShapeTiming:
        """An engine beside the baseline."""
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
    """Who goes first, second and so on in a turn: each turn begins with the next one.

    With more than two, every other cycle runs backwards, or each would always come after the same neighbour.
    """
    order = [(place + turn) % count for place in range(count)]
    return order[::-1] if count > 2 and turn // count % 2 else order


def take_turns(contestants: Sequence[Contestant], texts: Sequence[str], shape: Shape, seconds: float) -> Turns:
    """Run all in turns until the last windows' ratios to the first agree, or `seconds` are over.

    Never stops early with fewer than 20 rounds, nor with too few for a 99th percentile where those fit into the time.
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
            # All of a turn or nothing of it: the same index is the same round.
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
    if not times[0]:  # one run of each took all the time there was
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
    """A candidate and the baseline in turns at one shape, see `take_turns`."""
    turns = take_turns([baseline, candidate], texts, shape, seconds)
    return turns.timing(1), PairSamples(turns.times_ms[0], turns.times_ms[1], turns.runs[0], turns.runs[1])


def time_shapes(
    baseline: Contestant, candidate: Contestant, texts: Sequence[str], shapes: Sequence[Shape], seconds: float
) -> tuple[list[ShapeTiming], dict[str, PairSamples]]:
    """Every shape within `seconds` together."""
    timings: list[ShapeTiming] = []
    samples: dict[str, PairSamples] = {}
    for shape, share in shares(shapes, seconds):
        timing, samples[str(shape)] = time_shape(baseline, candidate, texts, shape, share)
        timings.append(timing)
    return timings, samples


def shares(shapes: Sequence[Shape], seconds: float) -> Iterator[tuple[Shape, float]]:
    """The shapes, quick ones first, each with its seconds when its turn has come.

    What a quick shape leaves over goes to the later, slower ones.
    """
    deadline = time.monotonic() + seconds
    ordered = sorted(shapes, key=lambda item: item.batch * item.sequence)
    # Shares by the fourth root of the work: a large batch needs more time for its twenty pairs than a small one for
    # its hundred, but not as many times more as it is larger. Of 45 s the default shapes get 5, 8, 13 and 19.
    weights = [(shape.batch * shape.sequence) ** 0.25 for shape in ordered]
    for number, shape in enumerate(ordered):
        yield shape, max(0.0, deadline - time.monotonic()) * weights[number] / sum(weights[number:])
