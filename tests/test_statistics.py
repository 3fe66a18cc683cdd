"""Summaries of timings: what is reported must be what was measured, at the edges too."""

import statistics

import numpy as np
import pytest

from resources.benchmark.statistics import geometric_mean, median_ratio, percentile, summarize, windows_agree


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(share, count):
    values = sorted(np.random.default_rng(count).lognormal(size=count).tolist())
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)))


def test_summary_of_few_samples_has_no_p99_but_its_maximum():
    latency = summarize([3.0, 1.0, 2.0], batch=4)
    assert (latency.count, latency.p99_ms, latency.max_ms, latency.p50_ms) == (3, None, 3.0, 2.0)
    assert latency.std_ms == pytest.approx(statistics.stdev([1.0, 2.0, 3.0]))
    # Four rows every two milliseconds.
    assert latency.throughput_per_s == pytest.approx(2000.0)


def test_p99_appears_at_a_hundred_samples():
    assert summarize([1.0] * 99, batch=1).p99_ms is None
    assert summarize([1.0] * 99 + [50.0], batch=1).p99_ms == pytest.approx(1.49)


def test_one_sample_has_no_deviation_and_none_is_refused():
    assert summarize([5.0], batch=1).std_ms == 0.0
    with pytest.raises(ValueError, match="no samples"):
        summarize([], batch=1)


def test_ratio_is_taken_pair_by_pair():
    # A neighbour slowed the middle pair down: the ratio of medians would be 2.5.
    assert median_ratio([10.0, 50.0, 20.0], [5.0, 25.0, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError):
        median_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("ratios", "agree"),
    [
        ([2.0, 2.0], False),
        ([2.0, 2.05, 2.1], True),
        ([2.0, 2.0, 2.11], False),
        ([9.0, 2.0, 2.02, 2.05], True),
        ([], False),
    ],
)
def test_windows_agree_within_five_percent_of_the_last_three(ratios, agree):
    assert windows_agree(ratios) is agree


def test_geometric_mean_of_opposite_ratios_is_one():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
