"""The choice of the champion: the best engine whose report keeps the gates of the current catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resources.accuracy.measuring import missed_gates
from resources.artifacts.records import BenchmarkReport, CandidateVerdict, Champion, Contest, EvaluationSet
from resources.benchmark.ranking import EQUAL, OBJECTIVES, contest, judge, require_champion, tell
from resources.catalog.entries import ModelEntry
from resources.engines.specs import BASELINE, SERVED
from resources.tasks import TASKS

#: The median of fewer pairs is unreliable.
FEW_PAIRS = 5
#: PyTorch, measured beside itself, should take the same time. If it differs by more than this factor, all other figures
#: of that machine may be wrong by as much.
NOISY = 1.5


@dataclass(frozen=True)
class Served:
    """The release that serves now: its number, and the digest of the engine that it was made of."""

    release: int
    engine_digest: str


def gates_missed(entry: ModelEntry, report: BenchmarkReport) -> list[str]:
    """Return the accuracy gates of the model's catalog entry that a measured report misses, each as a sentence."""
    assert report.accuracy is not None, "only measured reports have gates to miss"
    return missed_gates(TASKS[entry.task], report.accuracy, entry.accuracy_gates())


def _doubt(report: BenchmarkReport, baseline: BenchmarkReport | None) -> str:
    """Return a warning about the samples behind a score, or an empty text if they are reliable.

    Args:
        report: The report with the score.
        baseline: The report on PyTorch, measured beside itself.
    """
    apart = max((max(one.speedup, 1 / one.speedup) for one in baseline.timings), default=1.0) if baseline else 1.0
    if apart > NOISY:
        return (
            " Do not rely on this score: the machine was so busy that two measurements of PyTorch differed by a factor "
            f"of {apart:.1f} at one shape. Raise benchmark.seconds in the models file, or measure on a quiet machine."
        )
    fewest = min((timing.pairs for timing in report.timings), default=FEW_PAIRS)
    if fewest >= FEW_PAIRS:
        return ""
    return (
        f" For one shape, only {fewest} pair{'' if fewest == 1 else 's'} of samples could be taken, because the "
        "machine was slow or busy. Before you rely on this score, raise benchmark.seconds in the models file, or "
        "measure on a quiet machine."
    )


@dataclass(frozen=True)
class Choice:
    """A champion, and the facts that the choice depends on.

    Args:
        champion: The record, still without a digest.
        parts: The parts of the champion's fingerprint: all that the choice depends on.
    """

    champion: Champion
    parts: dict[str, Any]


def choose(
    entry: ModelEntry,
    target: str,
    reports: Sequence[BenchmarkReport],
    evaluation: EvaluationSet,
    served: Served | None = None,
) -> Choice:
    """Choose the best accurate engine by the entry's objective.

    Args:
        entry: The model's catalog entry.
        target: The target that the champion is for.
        reports: Reports on that evaluation set, at the same shapes and on the same machine.
        evaluation: The evaluation set.
        served: The release that serves the same checkpoint now. If its engine is accurate, it stays, unless another
            engine is better by more than the noise. If no report measured it, the best of the others replaces it, and
            the record's contest says so.

    Raises:
        NoChampionError: No engine is accurate enough to be served.
    """
    baseline = next((report for report in reports if report.engine == BASELINE), None)
    # The served engine was measured again under its own name, or it is one of the candidates.
    ours = [item for item in reports if served is not None and item.engine_digest == served.engine_digest]
    serving = next((item.engine for item in ours if item.status == "measured"), None)
    baseline_bytes = baseline.engine_size_bytes if baseline is not None else 1
    verdicts = judge(reports, lambda report: gates_missed(entry, report), entry.objective, baseline_bytes, serving)
    best = require_champion(entry.name, target, verdicts)
    met = _contest(entry, reports, verdicts, best, served, serving)
    # If the served engine loses, its report is left out of the fingerprint. It no longer serves when the same
    # candidates are judged again, and the champion must then be the same.
    stays = best.engine == SERVED
    parts = {
        # A measured report counts with its figures, because a benchmark that failed is measured again under the same
        # digest. An unmeasured report counts without its reason, because the wording of a reason varies, for example
        # by the amount of free memory.
        "reports": {
            report.engine: report.model_dump_json(exclude={"build_seconds", "peak_memory_bytes", "usage", "made_of"})
            if report.status == "measured"
            else f"{report.engine_digest} {report.status}"
            for report in reports
            if stays or report.engine != SERVED
        },
        "evaluation": evaluation.digest,
        "gates": entry.accuracy_gates().model_dump(),
        "objective": entry.objective,
        **({"contest": met.model_dump()} if met is not None and stays else {}),
    }
    chosen = next(report for report in reports if report.engine == best.engine)
    assert best.score is not None, "an eligible engine was measured"
    champion = Champion(
        digest="",
        model=entry.name,
        target=target,
        engine=chosen.engine,
        engine_digest=chosen.engine_digest,
        evaluation_digest=evaluation.digest,
        setting=chosen.setting,
        objective=entry.objective,
        score=best.score,
        reason=_reason(entry, verdicts, best.score, chosen, met) + _doubt(chosen, baseline),
        verdicts=verdicts,
        contest=met,
    )
    return Choice(champion, parts)


def _contest(
    entry: ModelEntry,
    reports: Sequence[BenchmarkReport],
    verdicts: Sequence[CandidateVerdict],
    best: CandidateVerdict,
    served: Served | None,
    serving: str | None,
) -> Contest | None:
    """Return how the served engine stands against the best one, or None if there is nothing to compare.

    Args:
        entry: The model's catalog entry.
        reports: All reports.
        verdicts: The verdicts on these reports.
        best: The verdict on the champion.
        served: The release that serves now.
        serving: The name under which the served engine was measured, or None if it was not.
    """
    if served is None:
        return None
    if serving is None:
        return Contest(
            release=served.release,
            engine=SERVED,
            served_score=None,
            challenger=best.engine,
            challenger_score=best.score,
            margin=EQUAL,
            outcome="unmeasured",
        )
    # If the served engine is a candidate and the best one, there is no contest, so that an unchanged run has the same
    # champion.
    if serving == SERVED or serving != best.engine:
        return contest(reports, verdicts, entry.objective, serving, served.release)
    return None


def _reason(
    entry: ModelEntry,
    verdicts: Sequence[CandidateVerdict],
    score: float,
    chosen: BenchmarkReport,
    met: Contest | None,
) -> str:
    gain, count = f"{score:.2f} times better than PyTorch", sum(verdict.eligible for verdict in verdicts)
    place = "the best" if score == max(verdict.score or 0 for verdict in verdicts if verdict.eligible) else "one"
    story = f" {tell(met)}" if met is not None else ""
    return (
        f"{chosen.engine} is {gain} by {OBJECTIVES[entry.objective]} (geometric mean over {len(chosen.timings)} "
        f"shapes), {place} of {count} accurate engines.{story}"
    )
