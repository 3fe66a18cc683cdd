"""How many threads an engine gets, by measurement.

All cores are not always the fastest: two hyper-threads share one core's arithmetic, and at small batches handing work
over costs more than it saves. Settings meet in pairs, in turns, as candidates meet PyTorch: beginning with the most
threads, the fastest so far against the next smaller number, until fewer are clearly slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from resources.artifacts.records import ThreadSetting, ThreadTrial
from resources.benchmark.statistics import geometric_mean
from resources.benchmark.timing import WARM_UP_RUNS, time_shapes
from resources.catalog.entries import Shape
from resources.processes.isolation import Worker

#: The share of a benchmark's time that the sweep may take.
SHARE = 0.2
#: Within this factor of the fastest two settings are equal, and the one that leaves more of the machine is taken.
NOISE = 1.02
#: So many times slower than the fastest so far, still fewer threads are not tried: from there it only gets worse.
HOPELESS = 1.15
#: So many pairs at every shape have to fit into the time, or two settings are not compared.
FEWEST_PAIRS = 4

#: Times that the second setting is faster than the first, by shape; None where there is no time left to find out.
Compare = Callable[[ThreadSetting, ThreadSetting], dict[str, float] | None]


def thread_counts(budget: int, physical: int) -> tuple[int, ...]:
    """The numbers of threads that are worth a try, most first: the budget, the physical cores, the powers of two."""
    counts = {budget, min(physical, budget)} | {2**power for power in range(budget.bit_length())}
    return tuple(sorted((count for count in counts if 1 <= count <= budget), reverse=True))


def choose(trials: Sequence[ThreadTrial]) -> ThreadSetting:
    """Of the settings within the noise of the fastest, the one with the fewest threads; rather asleep than spinning."""
    fastest = max(trial.score for trial in trials)
    equal = [trial.setting for trial in trials if trial.score * NOISE >= fastest]
    return min(equal, key=lambda setting: (setting.threads, setting.spinning))


def sweep(counts: Sequence[int], compare: Compare, *, can_sleep: bool) -> tuple[ThreadSetting, tuple[ThreadTrial, ...]]:
    """The setting to take, and the trials that say so. counts: most first.

    can_sleep: whether the runtime lets threads sleep while they wait; tried once, with the number that won.
    """
    trials = [ThreadTrial(setting=ThreadSetting(threads=counts[0]), score=1.0)]
    for count in counts[1:]:
        fastest = max(trials, key=lambda trial: trial.score)
        trial = _try(ThreadSetting(threads=count), fastest, compare)
        if trial is None:
            break
        trials.append(trial)
        if trial.score * HOPELESS < fastest.score:
            break
    chosen = choose(trials)
    if can_sleep and chosen.threads > 1:
        rival = next(trial for trial in trials if trial.setting == chosen)
        asleep = _try(ThreadSetting(threads=chosen.threads, spinning=False), rival, compare)
        trials += [asleep] if asleep is not None else []
    return choose(trials), tuple(trials)


def _try(setting: ThreadSetting, rival: ThreadTrial, compare: Compare) -> ThreadTrial | None:
    speedups = compare(rival.setting, setting)
    if speedups is None:
        return None
    score = rival.score * geometric_mean(list(speedups.values()))
    return ThreadTrial(setting=setting, against=rival.setting, speedups=speedups, score=score)


class ThreadComparison:
    """Compares settings on the real engine, two of them loaded at a time, all within `seconds` of running it.

    start: loads the engine with a setting in a process of its own; that is not counted. comparisons: at most how many
    there will be. A comparison has all shapes or none: small batches alone would speak for fewer threads. What does
    not fit into the time is not begun. A context manager: leaving it ends the processes.
    """

    def __init__(
        self,
        start: Callable[[ThreadSetting], Worker],
        texts: Sequence[str],
        shapes: Sequence[Shape],
        seconds: float,
        comparisons: int,
    ) -> None:
        self._start, self._texts = start, texts
        self._shapes = sorted(shapes, key=lambda shape: shape.batch * shape.sequence)
        self._seconds, self._comparisons = seconds, comparisons
        self._workers: dict[ThreadSetting, Worker] = {}
        self._pass_seconds: float | None = None

    def __call__(self, rival: ThreadSetting, challenger: ThreadSetting) -> dict[str, float] | None:
        """Times that the challenger is faster, by shape; None where the time would not do."""
        for setting in [other for other in self._workers if other != rival]:
            self._workers.pop(setting).close()
        worker = self._worker(rival)
        started = time.monotonic()
        if self._pass_seconds is None:
            self._pass_seconds = self._time_pass(worker, started + self._seconds)
            self._seconds -= time.monotonic() - started
        # Work that is shared by fewer takes that much longer at the worst.
        runs = WARM_UP_RUNS + FEWEST_PAIRS
        least = runs * self._pass_seconds * (1 + rival.threads / challenger.threads)
        if least > self._seconds:
            return None
        other, share = self._worker(challenger), self._seconds / max(1, self._comparisons)
        started = time.monotonic()
        timings, _ = time_shapes(worker, other, self._texts, self._shapes, max(share, least))
        self._seconds, self._comparisons = self._seconds - (time.monotonic() - started), self._comparisons - 1
        return {timing.shape: timing.speedup for timing in timings}

    def _worker(self, setting: ThreadSetting) -> Worker:
        if setting not in self._workers:
            self._workers[setting] = self._start(setting)
        return self._workers[setting]

    def _time_pass(self, worker: Worker, deadline: float) -> float:
        """Seconds of one run at every shape; infinite as soon as it is clear that comparing would take too long."""
        total = before = 0.0
        tokens = 0
        for shape in self._shapes:
            size = shape.batch * shape.sequence
            left = deadline - time.monotonic()
            # Larger batches are seldom slower by the token, so the last one says about what the next takes at most.
            if before and WARM_UP_RUNS * (total + before * size / tokens) > left:
                return float("inf")
            worker.call("prepare", self._texts, shape.batch, shape.sequence)
            before, tokens = worker.call("burst", 1, 1)[0] / 1000, size
            total += before
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.close()
