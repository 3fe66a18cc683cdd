"""The number of threads that an engine gets, chosen by measurement.

The largest number of threads is not always the fastest: two hyper-threads share one core's arithmetic, and at small
batches the distribution of work costs more than it saves. Settings are compared in pairs that take turns, as candidates
are compared with PyTorch. The sweep starts with the most threads and compares the fastest setting so far with the next
smaller number, until a smaller number is clearly slower.
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
#: Settings within this factor of the fastest count as equal, and the one that uses less of the machine is chosen.
NOISE = 1.02
#: The sweep ends at a setting that is slower than the fastest so far by this factor, because fewer threads would be
#: slower still.
HOPELESS = 1.15
#: Two settings are compared only if this many pairs at every shape fit into the remaining time.
FEWEST_PAIRS = 4

#: A comparison returns, by shape, how many times faster the second setting is than the first. It returns None if too
#: little time is left.
Compare = Callable[[ThreadSetting, ThreadSetting], dict[str, float] | None]


def thread_counts(budget: int, physical: int) -> tuple[int, ...]:
    """Return the numbers of threads to try, the largest first: the budget, the physical cores and the powers of two."""
    counts = {budget, min(physical, budget)} | {2**power for power in range(budget.bit_length())}
    return tuple(sorted((count for count in counts if 1 <= count <= budget), reverse=True))


def choose(trials: Sequence[ThreadTrial]) -> ThreadSetting:
    """Choose, among the settings within the noise of the fastest, the one with the fewest threads.

    Between two settings with the same number of threads, the one whose threads sleep while they wait is preferred.
    """
    fastest = max(trial.score for trial in trials)
    equal = [trial.setting for trial in trials if trial.score * NOISE >= fastest]
    return min(equal, key=lambda setting: (setting.threads, setting.spinning))


def sweep(counts: Sequence[int], compare: Compare, *, can_sleep: bool) -> tuple[ThreadSetting, tuple[ThreadTrial, ...]]:
    """Find the setting for an engine, and return it with the trials that it rests on.

    Args:
        counts: The numbers of threads to try, the largest first.
        compare: Compares two settings.
        can_sleep: Whether the runtime lets threads sleep while they wait. Sleeping is tried once, with the number of
            threads that won.
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
    """A comparison of settings on the real engine, with two settings loaded at a time.

    A comparison measures all shapes or none, because small batches alone would favour fewer threads. A comparison that
    does not fit into the time is not begun. The object is a context manager, and its processes end when it is left.

    Args:
        start: Loads the engine with a setting in a process of its own. This time is not counted.
        texts: The texts that fill the batches.
        shapes: The shapes to measure.
        seconds: The time that all runs of the engine together may take.
        comparisons: The largest number of comparisons that will be made.
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
        """Return how many times faster the challenger is, by shape, or None if too little time is left."""
        for setting in [other for other in self._workers if other != rival]:
            self._workers.pop(setting).close()
        worker = self._worker(rival)
        started = time.monotonic()
        if self._pass_seconds is None:
            self._pass_seconds = self._time_pass(worker, started + self._seconds)
            self._seconds -= time.monotonic() - started
        # At worst, the time of a run grows by the same factor by which the number of threads shrinks.
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
        """Return the seconds that one run at every shape takes, or infinity if a comparison would take too long."""
        total = before = 0.0
        tokens = 0
        for shape in self._shapes:
            size = shape.batch * shape.sequence
            left = deadline - time.monotonic()
            # Larger batches are seldom slower per token, so the previous shape bounds the time of the next one.
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
