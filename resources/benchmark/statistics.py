"""Statistics of timings, as pure functions over lists of milliseconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from resources.artifacts.records import Latency

#: With fewer samples the 99th percentile is the maximum or close to it, and adds no information.
SAMPLES_FOR_P99 = 100
#: Windows of pairs agree when the largest median ratio is within this factor of the smallest.
AGREEMENT = 1.05
WINDOWS_THAT_MUST_AGREE = 3


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of an ascending list lies, linearly interpolated as numpy's default is."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples_ms: Sequence[float], batch: int) -> Latency:
    """Summarize the latencies of a batch.

    Args:
        samples_ms: The time of each run.
        batch: The number of rows in the batch, for the throughput.

    Raises:
        ValueError: There are no samples.
    """
    if not samples_ms:
        raise ValueError("no samples")
    ordered = sorted(samples_ms)
    mean = statistics.fmean(ordered)
    return Latency(
        count=len(ordered),
        mean_ms=mean,
        std_ms=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        p50_ms=percentile(ordered, 0.5),
        p90_ms=percentile(ordered, 0.9),
        p99_ms=percentile(ordered, 0.99) if len(ordered) >= SAMPLES_FOR_P99 else None,
        max_ms=ordered[-1],
        throughput_per_s=batch * 1000.0 / mean,
    )


def median_ratio(baseline_ms: Sequence[float], candidate_ms: Sequence[float]) -> float:
    """Return the median, over the pairs, of baseline time divided by candidate time.

    Above 1, the candidate is faster. The ratio is taken for each pair, because other work on the machine slows both
    sides of a pair down and affects their ratio less.
    """
    return statistics.median(b / c for b, c in zip(baseline_ms, candidate_ms, strict=True))


def windows_agree(ratios: Sequence[float]) -> bool:
    """Return whether the ratios of the last windows are within 5 percent of each other."""
    last = ratios[-WINDOWS_THAT_MUST_AGREE:]
    return len(last) == WINDOWS_THAT_MUST_AGREE and max(last) <= AGREEMENT * min(last)


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of ratios, which is 1 for the ratios 2 (twice as fast) and 0.5 (half as fast).

    Raises:
        ValueError: There are no values.
    """
    return statistics.geometric_mean(values)
