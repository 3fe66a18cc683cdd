"""Measuring in turns, with real child processes."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from resources.benchmark.timing import FEWEST_PAIRS, in_order, take_turns, time_shape, time_shapes
from resources.catalog.entries import Shape
from resources.processes.isolation import Limits, Worker


class FakeProbe:
    """Stands in for resources.benchmark.worker.EngineWorker: sleeps for a set time instead of running an engine."""

    def __init__(self, name, milliseconds, log):
        self._name, self._seconds, self._log, self._count = name, milliseconds / 1000, log, 0

    def prepare(self, *shape):
        self._count = 0

    def burst(self, warm, timed):
        samples = []
        for number in range(warm + timed):
            started = time.perf_counter_ns()
            time.sleep(self._seconds)
            self._count += 1
            if number >= warm:
                samples.append((time.perf_counter_ns() - started) / 1e6)
        with Path(self._log).open("a") as log:
            log.write(self._name)
        return samples

    def memory(self):
        return 1000

    def runs(self):
        return self._count


@pytest.fixture
def pair(tmp_path):
    def make(baseline_ms, candidate_ms):
        arguments = {"limits": Limits(timeout_s=60), "what": "probe"}
        log = str(tmp_path / "turns")
        return (
            Worker(FakeProbe, "b", baseline_ms, log, **arguments),
            Worker(FakeProbe, "c", candidate_ms, log, **arguments),
        )

    made = []

    def start(*milliseconds):
        made.extend(make(*milliseconds))
        return made[-2:]

    yield start
    for worker in made:
        worker.close()


def test_ratio_pairs_windows_and_turns(pair, tmp_path):
    baseline, candidate = pair(4, 2)
    timing, samples = time_shape(baseline, candidate, [], Shape(batch=1, sequence=16), seconds=8)
    assert timing.speedup == pytest.approx(2.0, rel=0.5)
    assert timing.pairs == len(samples.baseline_ms) == len(samples.candidate_ms) >= 100
    assert timing.candidate.p99_ms is not None
    assert timing.agreed
    assert samples.candidate_runs > timing.pairs  # warm-up was run, and not counted as samples
    turns = (tmp_path / "turns").read_text()
    # After the first run of each, they take turns, and who begins changes.
    assert turns.startswith("bc" + "bccb")


def test_the_bound_ends_what_does_not_agree(pair):
    baseline, candidate = pair(60, 40)
    started = time.monotonic()
    timing, _ = time_shape(baseline, candidate, [], Shape(batch=1, sequence=16), seconds=1.0)
    assert time.monotonic() - started < 5
    assert not timing.agreed
    assert 1 <= timing.pairs < FEWEST_PAIRS
    assert timing.candidate.p99_ms is None


def test_one_run_longer_than_the_bound_is_still_a_sample(pair):
    baseline, candidate = pair(120, 60)
    timing, _ = time_shape(baseline, candidate, [], Shape(batch=1, sequence=16), seconds=0.01)
    assert timing.pairs == 1
    assert timing.speedup > 1


def test_all_shapes_are_measured_within_one_bound(pair):
    baseline, candidate = pair(10, 5)
    shapes = [Shape(batch=2, sequence=8), Shape(batch=1, sequence=8), Shape(batch=4, sequence=8)]
    started = time.monotonic()
    timings, samples = time_shapes(baseline, candidate, [], shapes, seconds=3)
    assert time.monotonic() - started < 8
    assert [timing.shape for timing in timings] == ["1x8", "2x8", "4x8"]
    assert set(samples) == {"1x8", "2x8", "4x8"}


def test_any_number_take_turns(tmp_path):
    log, limits = str(tmp_path / "turns"), Limits(timeout_s=60)
    workers = [
        Worker(FakeProbe, name, milliseconds, log, limits=limits, what="probe")
        for name, milliseconds in (("a", 12), ("b", 6), ("c", 3))
    ]
    try:
        turns = take_turns(workers, [], Shape(batch=1, sequence=16), seconds=3)
    finally:
        for worker in workers:
            worker.close()
    assert {len(times) for times in turns.times_ms} == {turns.rounds}
    assert turns.speedup(2) == pytest.approx(4.0, rel=0.5)
    assert turns.speedup(2, over=1) == pytest.approx(2.0, rel=0.5)
    assert turns.speedup(1, over=2) == pytest.approx(0.5, rel=0.5)
    assert turns.timing(0).speedup == 1.0
    assert turns.timing(1).candidate.count == turns.rounds
    assert (tmp_path / "turns").read_text().startswith("abc" + "abcbcacab" + "cbaacbbac")


def test_who_goes_first_changes_and_so_do_neighbours():
    # Two simply change places: what the pipeline has always measured.
    assert [in_order(2, turn) for turn in range(4)] == [[0, 1], [1, 0], [0, 1], [1, 0]]
    for count in (3, 4, 7):
        orders = [in_order(count, turn) for turn in range(2 * count)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert all(sum(order[0] == number for order in orders) == 2 for number in range(count))
        before = {(first, second) for order in orders for first, second in pairwise(order)}
        assert all((second, first) in before for first, second in before)
