"""Choose the champion: apply the gates of today's catalog to the reports, and take the best."""

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

#: A median of fewer pairs says little.
FEW_PAIRS = 5
#: PyTorch beside itself takes the same time; on a machine where it differs by more, so may everything else.
NOISY = 1.5


@dataclass(frozen=True)
class Served:
    """What serves now: the release's number, and the digest of the engine that it was made of."""

    release: int
    engine_digest: str


def gates_missed(entry: ModelEntry, report: BenchmarkReport) -> list[str]:
    """The accuracy gates of the model's catalog entry that a measured report misses."""
    assert report.accuracy is not None, "only measured reports have gates to miss"
    return missed_gates(TASKS[entry.task], report.accuracy, entry.accuracy_gates())


def _doubt(report: BenchmarkReport, baseline: BenchmarkReport | None) -> str:
    """What the reader of a score has to know of the samples behind it. baseline: PyTorch, measured beside itself."""
    apart = max((max(one.speedup, 1 / one.speedup) for one in baseline.timings), default=1.0) if baseline else 1.0
    if apart > NOISY:
        return (
            f" Do not rely on it: the machine was so busy that PyTorch and PyTorch differed by a factor of {apart:.1f} "
            "at one shape. Raise benchmark.seconds in the models file, or measure on a quiet one."
        )
    fewest = min((timing.pairs for timing in report.timings), default=FEW_PAIRS)
    if fewest >= FEW_PAIRS:
        return ""
    return (
        f" Of one shape only {fewest} pair{'' if fewest == 1 else 's'} of samples could be taken: the machine was slow "
        "or busy. Raise benchmark.seconds in the models file, or measure on a quiet one, before you rely on it."
    )


@dataclass(frozen=True)
class Choice:
    """A champion, and what the choice rests on.

    Args:
        champion: The record, as yet without a digest.
        parts: What the choice depends on, for its fingerprint.
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
    """Choose the best accurate engine by the entry's objective. Raises NoChampionError.

    Args:
        reports: Reports on that evaluation set, at the same shapes and on the same machine.
        served: What serves the same checkpoint now. If it is accurate it stays, unless another is better by more than
            the noise. Where no report measured it, the best of the others replaces it, and the record's contest says
            so.
    """
    baseline = next((report for report in reports if report.engine == BASELINE), None)
    # Measured again under its own name, or one of the candidates.
    ours = [item for item in reports if served is not None and item.engine_digest == served.engine_digest]
    serving = next((item.engine for item in ours if item.status == "measured"), None)
    baseline_bytes = baseline.engine_size_bytes if baseline is not None else 1
    verdicts = judge(reports, lambda report: gates_missed(entry, report), entry.objective, baseline_bytes, serving)
    best = require_champion(entry.name, target, verdicts)
    met = _contest(entry, reports, verdicts, best, served, serving)
    # What was beaten serves no more when the same candidates are judged again, and that is the same champion.
    stays = best.engine == SERVED
    parts = {
        # What was measured, and not only what it was measured of: one that failed is measured again.
        # Why another was not measured is told in other words every time: how much memory it had, say.
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
    """Return how what serves stands against the best; None where there is nothing to compare.

    Args:
        serving: The name of the report on what serves.
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
    # A candidate that serves and is the best has no rival: an unchanged run has the same champion.
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
