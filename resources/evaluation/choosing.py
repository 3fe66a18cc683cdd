"""Choosing the champion: a pure function of the reports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from resources.artifacts.records import BenchmarkReport, CandidateVerdict, Contest, ShapeTiming
from resources.catalog import Objective
from resources.engines import BASELINE
from resources.errors import NoChampionError
from resources.evaluation.statistics import AGREEMENT, geometric_mean

#: What each objective is called where people read it.
OBJECTIVES: dict[Objective, str] = {
    "p50": "median latency",
    "p90": "90th percentile of latency",
    "memory": "peak memory",
    "size": "size on disk",
}

#: Two scores within this factor are equal, however well each was measured: the same engine, measured again minutes
#: later on a shared machine, differs by as much. It is the factor within which windows of one benchmark agree.
EQUAL = AGREEMENT
#: Standard errors that scores have to lie apart: about one chance in forty that a challenger seems better and is not.
_ERRORS = 2.0


def score(report: BenchmarkReport, objective: Objective, baseline_size_bytes: int) -> float:
    """How many times better than PyTorch, as the geometric mean over the shapes. Needs a measured report.

    The geometric mean, because ratios multiply: an engine twice as fast at one shape and half as fast at another has
    gained nothing.
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
    """The factor by which the scores of two measured reports have to differ before one of them is better."""
    error = math.hypot(_error(one, objective), _error(other, objective))
    return max(EQUAL, math.exp(_ERRORS * error))


def _error(report: BenchmarkReport, objective: Objective) -> float:
    """Standard error of the logarithm of a score by latency; what is counted in bytes has none."""
    if objective in ("memory", "size"):
        return 0.0
    return math.sqrt(sum(_variance(timing) for timing in report.timings)) / len(report.timings)


def _variance(timing: ShapeTiming) -> float:
    """Of the logarithm of one shape's ratio: by its windows, or, where there is but one, by its samples."""
    if len(timing.window_speedups) > 1:
        logarithms = [math.log(ratio) for ratio in timing.window_speedups]
        return statistics.variance(logarithms) / len(logarithms)
    return sum((side.std_ms / side.mean_ms) ** 2 / side.count for side in (timing.baseline, timing.candidate))


def judge(
    reports: Sequence[BenchmarkReport],
    missed: Callable[[BenchmarkReport], list[str]],
    objective: Objective,
    baseline_size_bytes: int,
    served: str | None = None,
) -> tuple[CandidateVerdict, ...]:
    """One verdict a report, best first, the one to be served being the first if it is eligible.

    missed: the accuracy gates that a measured report misses, each as a sentence. served: the report on what serves
    now; if it is accurate it comes first, unless another is better by more than the noise of both.
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
            verdicts.append(_out(report, value, "the baseline: what the others are compared with, never served"))
        elif gates:
            verdicts.append(_out(report, value, "not accurate enough: " + "; ".join(gates)))
        else:
            eligible.append((value, report))
    # Equal scores: by name, so that the same reports always give the same champion.
    eligible.sort(key=lambda item: (-item[0], item[1].engine))
    name, kept = OBJECTIVES[objective], ""
    serving = next((item for item in eligible if item[1].engine == served), None)
    if serving is not None and serving != eligible[0]:
        best, (value, report) = eligible[0], serving
        apart = margin(best[1], report, objective)
        if best[0] < value * apart:
            eligible.remove(serving)
            eligible.insert(0, serving)
            kept = f", and serves: {best[1].engine} is not better by more than the noise, a factor of {apart:.2f}"
    ranked = []
    for place, (value, report) in enumerate(eligible):
        if place == 0:
            text = f"champion: {value:.2f} times better than PyTorch by {name}{kept}"
        else:
            how = "accurate, but" if value <= eligible[0][0] else "accurate, and better only within the noise:"
            text = f"{how} {value:.2f} times where {eligible[0][1].engine} is {eligible[0][0]:.2f}"
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
    """How what serves, by the report of that name, stands against the best of the others."""
    by_name = {report.engine: report for report in reports}
    ours = next((verdict for verdict in verdicts if verdict.engine == served and verdict.eligible), None)
    others = [verdict for verdict in verdicts if verdict.eligible and verdict.engine != served]
    best = max(others, key=lambda verdict: verdict.score or 0.0, default=None)
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
    """A contest in a sentence."""
    new = f"{met.challenger} with {met.challenger_score:.2f}" if met.challenger is not None else "nothing new"
    if met.served_score is None:
        return f"What release {met.release} serves is not accurate any more."
    ours = f"what release {met.release} serves, measured again, with {met.served_score:.2f}"
    return {
        "replaced": f"It replaces {ours}: better by more than the noise, a factor of {met.margin:.2f}.",
        "equal": f"It is {ours}, and stays: the best of what is new, {new}, is equal within {met.margin:.2f} times.",
        "slower": f"It is {ours}, and stays: the best of what is new, {new}, is worse.",
        "inaccurate": f"It is {ours}, and stays: {new} is accurate.",
    }[met.outcome]


def require_champion(model: str, target: str, verdicts: Sequence[CandidateVerdict]) -> CandidateVerdict:
    """The first verdict, if it may be served. Raises NoChampionError with every candidate's reason."""
    if verdicts and verdicts[0].eligible:
        return verdicts[0]
    reasons = "".join(f"\n  {verdict.engine}: {verdict.verdict}" for verdict in verdicts) or "\n  nothing was measured"
    raise NoChampionError(
        f"{model}: no engine for {target} is accurate enough to be served, so nothing is published and what served "
        f"before goes on serving.{reasons}\nLoosen the model's gates in the models file if such answers are good "
        "enough for you, or let more engines compete."
    )
