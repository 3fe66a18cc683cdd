"""Choosing the champion: a pure function of the reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resources.artifacts.records import BenchmarkReport, CandidateVerdict, ShapeTiming
from resources.catalog import Objective
from resources.engines import BASELINE
from resources.errors import NoChampionError
from resources.evaluation.statistics import geometric_mean

#: What each objective is called where people read it.
OBJECTIVES: dict[Objective, str] = {
    "p50": "median latency",
    "p90": "90th percentile of latency",
    "memory": "peak memory",
    "size": "size on disk",
}


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


def judge(
    reports: Sequence[BenchmarkReport],
    missed: Callable[[BenchmarkReport], list[str]],
    objective: Objective,
    baseline_size_bytes: int,
) -> tuple[CandidateVerdict, ...]:
    """One verdict a report, best first, the one to be served being the first if it is eligible.

    missed: the accuracy gates that a measured report misses, each as a sentence.
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
    name = OBJECTIVES[objective]
    ranked = []
    for place, (value, report) in enumerate(eligible):
        if place == 0:
            text = f"champion: {value:.2f} times better than PyTorch by {name}"
        else:
            text = f"accurate, but {value:.2f} times where {eligible[0][1].engine} is {eligible[0][0]:.2f}"
        ranked.append(CandidateVerdict(engine=report.engine, score=value, eligible=True, verdict=text))
    return (*ranked, *verdicts)


def _out(report: BenchmarkReport, value: float | None, why: str) -> CandidateVerdict:
    return CandidateVerdict(engine=report.engine, score=value, eligible=False, verdict=why)


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
