"""The choice of the champion, as a pure function of the reports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from resources.artifacts.records import BenchmarkReport, CandidateVerdict, Contest, ShapeTiming
from resources.benchmark.statistics import AGREEMENT, geometric_mean
from resources.catalog.entries import Objective
from resources.engines.specs import BASELINE
from resources.errors import NoChampionError

#: The name of each objective in texts for people.
OBJECTIVES: dict[Objective, str] = {
    "p50": "median latency",
    "p90": "90th percentile of latency",
    "memory": "peak memory",
    "size": "size on disk",
}

#: Two scores within this factor are equal, however precisely each was measured, because the same engine differs by as
#: much when it is measured again minutes later on a shared machine. It is the factor within which the windows of one
#: benchmark agree.
EQUAL = AGREEMENT
#: Quantile of the normal distribution by which scores must lie apart. It leaves one chance in forty that a challenger
#: only seems better. `_student` widens it, because a few windows estimate their own spread badly.
_QUANTILE = 1.96
#: The margin where the noise is unknown, as it is with a single sample. No two engines differ by this factor.
_UNKNOWN = 100.0


def score(report: BenchmarkReport, objective: Objective, baseline_size_bytes: int) -> float:
    """Return how many times better than PyTorch an engine is, as the geometric mean over the shapes.

    The mean is geometric because ratios multiply: an engine that is twice as fast at one shape and half as fast at
    another has gained nothing.

    Args:
        report: A report with the status "measured".
        objective: The objective of the model's catalog entry.
        baseline_size_bytes: The size of PyTorch's weights, for the objective "size".
    """
    if objective == "size":
        return baseline_size_bytes / max(1, report.engine_size_bytes)
    ratios: dict[Objective, Callable[[ShapeTiming], float]] = {
        "p50": lambda timing: timing.speedup,
        "p90": lambda timing: timing.baseline.p90_ms / timing.candidate.p90_ms,
        "memory": lambda timing: max(1, timing.baseline_memory_bytes) / max(1, timing.candidate_memory_bytes),
    }
    return geometric_mean([ratios[objective](timing) for timing in report.timings])


def margin(one: BenchmarkReport, other: BenchmarkReport, objective: Objective) -> float:
    """Return the factor by which the scores of two measured reports must differ for one of them to be better."""
    if objective in ("memory", "size"):  # Counts of bytes have no noise.
        return EQUAL
    parts = [
        (variance / len(report.timings) ** 2, freedom)
        for report in (one, other)
        for variance, freedom in map(_variance, report.timings)
    ]
    if any(freedom < 1 for _, freedom in parts):
        return _UNKNOWN
    variance = sum(part for part, _ in parts)
    if variance == 0.0:
        return EQUAL
    # Welch and Satterthwaite give the degrees of freedom of a sum of variances that were estimated separately.
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    # The bound is applied before the exponential, which would overflow.
    return max(EQUAL, math.exp(min(math.log(_UNKNOWN), _student(freedom) * math.sqrt(variance))))


def _variance(timing: ShapeTiming) -> tuple[float, int]:
    """Return the variance of the logarithm of one shape's ratio, and its degrees of freedom.

    Both come from the shape's windows, or from its samples if there is only one window.
    """
    if len(timing.window_speedups) > 1:
        logarithms = [math.log(ratio) for ratio in timing.window_speedups]
        return statistics.variance(logarithms) / len(logarithms), len(logarithms) - 1
    sides = (timing.baseline, timing.candidate)
    return sum((side.std_ms / side.mean_ms) ** 2 / side.count for side in sides), sides[0].count - 1


def _student(freedom: float) -> float:
    """Return Student's quantile for `_QUANTILE`, by its expansion in 1 / freedom.

    The expansion is formula 26.7.5 of Abramowitz and Stegun. From two degrees of freedom on, it is correct to one
    percent.
    """
    z = _QUANTILE
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def judge(
    reports: Sequence[BenchmarkReport],
    missed: Callable[[BenchmarkReport], list[str]],
    objective: Objective,
    baseline_size_bytes: int,
    served: str | None = None,
) -> tuple[CandidateVerdict, ...]:
    """Return one verdict for each report, the best first.

    The first verdict is the engine to serve, if it is eligible.

    Args:
        reports: The reports to judge.
        missed: Returns the accuracy gates that a measured report misses, each as a sentence.
        objective: The objective of the model's catalog entry.
        baseline_size_bytes: The size of PyTorch's weights, for the objective "size".
        served: The name under which the engine that serves now was measured. If that engine is accurate, it comes
            first, unless others are better by more than the noise of both. The best of those then comes first.
    """
    eligible: list[tuple[float, BenchmarkReport]] = []
    verdicts = []
    for report in reports:
        if report.status != "measured":
            verdicts.append(_out(report, None, report.reason))
            continue
        value = score(report, objective, baseline_size_bytes)
        gates = missed(report)
        if report.engine == BASELINE:
            verdicts.append(
                _out(report, value, "the baseline: the other engines are compared with it, and it is never served")
            )
        elif gates:
            verdicts.append(_out(report, value, "not accurate enough: " + "; ".join(gates)))
        else:
            eligible.append((value, report))
    # Equal scores are sorted by name, so that the same reports always give the same champion.
    eligible.sort(key=lambda item: (-item[0], item[1].engine))
    name, kept = OBJECTIVES[objective], ""
    serving = next((item for item in eligible if item[1].engine == served), None)
    if serving is not None:
        (best, fastest), (value, report) = eligible[0], serving
        first = next(
            item for item in eligible if item is serving or item[0] >= value * margin(item[1], report, objective)
        )
        if first is not eligible[0]:
            eligible.remove(first)
            eligible.insert(0, first)
            apart = margin(fastest, report, objective)
            kept = (
                f"{', and it serves now' if first is serving else ''}: {fastest.engine} with a score of {best:.2f} is "
                f"not better than the engine that serves now by more than the noise, a factor of {apart:.2f}"
            )
    ranked = []
    for place, (value, report) in enumerate(eligible):
        if place == 0:
            text = f"champion: {value:.2f} times better than PyTorch by {name}{kept}"
        else:
            how = "accurate, but" if value <= eligible[0][0] else "accurate, and better only within the noise:"
            text = (
                f"{how} {value:.2f} times better than PyTorch where {eligible[0][1].engine} is {eligible[0][0]:.2f} "
                "times better"
            )
        ranked.append(CandidateVerdict(engine=report.engine, score=value, eligible=True, verdict=text))
    return (*ranked, *verdicts)


def _out(report: BenchmarkReport, value: float | None, why: str) -> CandidateVerdict:
    return CandidateVerdict(engine=report.engine, score=value, eligible=False, verdict=why)


def contest(
    reports: Sequence[BenchmarkReport],
    verdicts: Sequence[CandidateVerdict],
    objective: Objective,
    served: str,
    release: int,
) -> Contest:
    """Return how the engine that serves stands against the best of the others.

    Args:
        reports: All reports.
        verdicts: The verdicts of `judge` on these reports.
        objective: The objective of the model's catalog entry.
        served: The name under which the engine that serves was measured.
        release: The number of the release that serves.
    """
    by_name = {report.engine: report for report in reports}
    ours = next((verdict for verdict in verdicts if verdict.engine == served and verdict.eligible), None)
    others = [verdict for verdict in verdicts if verdict.eligible and verdict.engine != served]
    best = others[0] if others else None  # This is the winner if another engine than the served one wins.
    apart = margin(by_name[best.engine], by_name[served], objective) if best is not None and ours is not None else EQUAL
    found = Contest(
        release=release,
        engine=served,
        served_score=ours.score if ours is not None else None,
        challenger=best.engine if best is not None else None,
        challenger_score=best.score if best is not None else None,
        margin=apart,
        outcome="replaced",
    )
    if best is None:
        return found.model_copy(update={"outcome": "inaccurate"})
    if ours is None or verdicts[0].engine != served:
        return found
    assert best.score is not None and ours.score is not None, "an eligible engine was measured"
    return found.model_copy(update={"outcome": "slower" if best.score * apart < ours.score else "equal"})


def tell(met: Contest) -> str:
    """Return the contest's outcome as one or two sentences."""
    new = (
        f"{met.challenger} with a score of {met.challenger_score:.2f}"
        if met.challenger is not None
        else "no new engine"
    )
    if met.outcome == "unmeasured":
        return (
            f"The engine that release {met.release} serves could not be measured again, and {new} replaces it without "
            "a comparison. To bring the old engine back, run `refinery rollback`."
        )
    if met.served_score is None:
        return f"The engine that release {met.release} serves is not accurate any more."
    ours = f"the engine that release {met.release} serves (score when measured again: {met.served_score:.2f})"
    return {
        "replaced": f"It replaces {ours}, because it is better by more than the noise, a factor of {met.margin:.2f}.",
        "equal": (
            f"It is {ours}, and it stays: the best new engine, {new}, is equal within the noise, a factor of "
            f"{met.margin:.2f}."
        ),
        "slower": f"It is {ours}, and it stays: the best new engine, {new}, is worse.",
        "inaccurate": f"It is {ours}, and it stays: {new} is accurate.",
    }[met.outcome]


def require_champion(model: str, target: str, verdicts: Sequence[CandidateVerdict]) -> CandidateVerdict:
    """Return the first verdict.

    Raises:
        NoChampionError: The first verdict's engine may not be served. The message has every candidate's reason.
    """
    if verdicts and verdicts[0].eligible:
        return verdicts[0]
    reasons = "".join(f"\n  {verdict.engine}: {verdict.verdict}" for verdict in verdicts) or "\n  nothing was measured"
    raise NoChampionError(
        f"{model}: no engine for {target} is accurate enough to be served, so nothing is published and the release "
        f"that served before goes on serving.{reasons}\nLoosen the model's gates in the models file if such answers "
        "are good enough for you, or let more engines compete."
    )
