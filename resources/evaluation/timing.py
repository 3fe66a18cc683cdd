"""Timing a candidate against PyTorch in turns, so that whatever disturbs the machine disturbs both."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from resources.artifacts.records import ShapeTiming
from resources.catalog import Shape
from resources.evaluation.statistics import SAMPLES_FOR_P99, median_ratio, summarize, windows_agree
from resources.isolation import Worker

#: Runs before anything is timed: the first run allocates, the second is the first with warm caches.
WARM_UP_RUNS = 3
#: One turn runs for about this long, then the other engine has its turn.
TURN_MS = 60.0
MOST_RUNS_A_TURN = 20
#: Calls faster than this get one untimed run at the beginning of each turn: the other engine has just had the caches.
COLD_BELOW_MS = 30.0
FEWEST_PAIRS = 20
FEWEST_PAIRS_A_WINDOW = 4
MOST_PAIRS_A_WINDOW = 40


@dataclass
class PairSamples:
    """Raw milliseconds at one shape; the same index is one pair, measured within one turn of each other."""

    baseline_ms: list[float] = field(default_factory=list)
    candidate_ms: list[float] = field(default_factory=list)
    baseline_runs: int = 0  # untimed ones included
    candidate_runs: int = 0


def time_shape(
    baseline: Worker, candidate: Worker, texts: Sequence[str], shape: Shape, seconds: float
) -> tuple[ShapeTiming, PairSamples]:
    """Run both in turns until the last windows' ratios agree, or `seconds` are over.

    Never stops early with fewer than 20 pairs, nor with too few for a 99th percentile where those fit into the time.
    """
    deadline = time.monotonic() + seconds
    for worker in (baseline, candidate):
        worker.call("prepare", texts, shape.batch, shape.sequence)
    first = [worker.call("burst", WARM_UP_RUNS - 1, 1)[0] for worker in (baseline, candidate)]
    runs = max(1, min(MOST_RUNS_A_TURN, math.floor(TURN_MS / max(first))))
    warm = 1 if min(first) < COLD_BELOW_MS else 0
    samples, ratios = PairSamples(), []
    fits = 0.9 * seconds * 1000 / (sum(first) * (1 + warm / runs))
    enough = SAMPLES_FOR_P99 if fits > SAMPLES_FOR_P99 else FEWEST_PAIRS
    per_window = min(MOST_PAIRS_A_WINDOW, max(FEWEST_PAIRS_A_WINDOW, 2 * runs))
    agreed = False
    while not agreed:
        start = len(samples.baseline_ms)
        while len(samples.baseline_ms) - start < per_window and time.monotonic() < deadline:
            # Who goes first changes with every turn.
            order = (baseline, candidate) if len(samples.baseline_ms) // runs % 2 == 0 else (candidate, baseline)
            timed = {worker: worker.call("burst", warm, runs) for worker in order}
            samples.baseline_ms += timed[baseline]
            samples.candidate_ms += timed[candidate]
        if len(samples.baseline_ms) - start >= min(per_window, FEWEST_PAIRS_A_WINDOW):
            ratios.append(median_ratio(samples.baseline_ms[start:], samples.candidate_ms[start:]))
        if time.monotonic() >= deadline:
            break
        agreed = len(samples.baseline_ms) >= enough and windows_agree(ratios)
    if not samples.baseline_ms:  # one run of each took all the time there was
        samples = PairSamples([first[0]], [first[1]])
    samples.baseline_runs, samples.candidate_runs = baseline.call("runs"), candidate.call("runs")
    timing = ShapeTiming(
        shape=str(shape),
        baseline=summarize(samples.baseline_ms, shape.batch),
        candidate=summarize(samples.candidate_ms, shape.batch),
        speedup=median_ratio(samples.baseline_ms, samples.candidate_ms),
        window_speedups=tuple(ratios),
        agreed=agreed,
        pairs=len(samples.baseline_ms),
        candidate_memory_bytes=candidate.call("memory"),
        baseline_memory_bytes=baseline.call("memory"),
    )
    return timing, samples


def time_shapes(
    baseline: Worker, candidate: Worker, texts: Sequence[str], shapes: Sequence[Shape], seconds: float
) -> tuple[list[ShapeTiming], dict[str, PairSamples]]:
    """Every shape within `seconds` together; what a quick shape leaves over goes to the later, slower ones."""
    deadline = time.monotonic() + seconds
    timings: list[ShapeTiming] = []
    samples: dict[str, PairSamples] = {}
    ordered = sorted(shapes, key=lambda item: item.batch * item.sequence)
    # Shares by the fourth root of the work: a large batch needs more time for its twenty pairs than a small one for
    # its hundred, but not as many times more as it is larger. Of 45 s the default shapes get 5, 8, 13 and 19.
    weights = [(shape.batch * shape.sequence) ** 0.25 for shape in ordered]
    for number, shape in enumerate(ordered):
        share = max(0.0, deadline - time.monotonic()) * weights[number] / sum(weights[number:])
        timing, samples[str(shape)] = time_shape(baseline, candidate, texts, shape, share)
        timings.append(timing)
    return timings, samples
