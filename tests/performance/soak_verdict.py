"""What the soak's report says: pure functions of its lines."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

GROWN = ("pss_bytes", "descriptors", "shm_bytes", "shm_files")
GROWTH = 0.03
#: Of the requests that fall due, so many are to be answered; commands take the processor too.
REACHED = 0.9
#: Beside these samples a median means little.
FEWEST_SAMPLES = 6


def judge(samples: Sequence[dict[str, Any]], *, warm_up_s: float, cycle_s: float) -> dict[str, dict[str, float]]:
    """The growth of each of GROWN as a share, with both medians.

    samples: with `t` in seconds since the load began, `at_rest`, and `models`, the number that is loaded. Each span is
    as many whole cycles long as fit twice into what follows the warm-up, so both hold the same releases. Empty where
    one of the spans has too few samples.
    """
    usual = Counter(one["models"] for one in samples if one["at_rest"]).most_common(1)
    counted = [one for one in samples if one["at_rest"] and one["t"] >= warm_up_s and one["models"] == usual[0][0]]
    if not counted:
        return {}
    end = samples[-1]["t"]
    half = (end - warm_up_s) / 2
    length = half // cycle_s * cycle_s or half
    first = [one for one in counted if one["t"] <= warm_up_s + length]
    last = [one for one in counted if one["t"] >= end - length]
    if min(len(first), len(last)) < FEWEST_SAMPLES:
        return {}
    found = {}
    for name in GROWN:
        before, after = (float(statistics.median(one[name] for one in span)) for span in (first, last))
        growth = after / before - 1 if before else float(after > 0)
        found[name] = {"first": before, "last": after, "growth": round(growth, 4)}
    return found


def verdict(
    lines: Mapping[str, Sequence[dict[str, Any]]], *, server_ended: bool, warm_up_s: float, cycle_s: float
) -> tuple[dict[str, Any], list[str]]:
    """Figures of the whole, and what was missed, a sentence each. lines: of the report, by their kind."""
    loads, changes = lines.get("load", []), lines.get("change", [])
    rate = lines["calibrated"][0]["rate_per_s"] if lines.get("calibrated") else 0.0
    counts = {key: sum(one[key] for one in loads) for key in ("answered", "failed", "wrong", "left_out")}
    seconds = loads[-1]["t"] if loads else 0.0
    reached = counts["answered"] / (rate * seconds) if rate and seconds else 0.0
    growth = judge(lines.get("sample", []), warm_up_s=warm_up_s, cycle_s=cycle_s)
    for key in ("failed", "wrong"):
        counts[key] += sum(one[key] for one in lines.get("calibrated", []))
    missed = [
        f"{counts[key]} requests {what}"
        for key, what in (("failed", "failed"), ("wrong", "were answered wrongly"))
        if counts[key]
    ]
    missed += [f"{one['command']} at {one['t']:.0f} s failed" for one in changes if not one["alright"]]
    missed += ["refinery serve ended by itself"] if server_ended else []
    missed += [f"{reached:.0%} of the load was reached"] if reached < REACHED else []
    missed += [] if growth else ["too few samples at rest to judge growth"]
    missed += [f"{name} grew by {found['growth']:.1%}" for name, found in growth.items() if found["growth"] >= GROWTH]
    p99 = sorted(one["p99_ms"] for one in loads if one["p99_ms"] is not None)
    figures = {
        **counts,
        "rate_per_s": rate,
        "reached": round(reached, 3),
        "changes": len(changes),
        "p99_ms_median_window": statistics.median(p99) if p99 else None,
        "p99_ms_worst_window": p99[-1] if p99 else None,
        "growth": growth,
    }
    return figures, missed
