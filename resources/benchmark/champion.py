"""Making the champion an artifact: reads the reports, applies the gates of today's catalog, chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resources.accuracy.measuring import missed_gates
from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import BenchmarkReport, Champion, Contest, EvaluationSet
from resources.artifacts.store import Made
from resources.benchmark.ranking import EQUAL, OBJECTIVES, contest, judge, require_champion, tell
from resources.catalog.entries import ModelEntry
from resources.engines.specs import BASELINE, SERVED
from resources.settings.workspace import Workspace
from resources.tasks import TASKS

#: What a choice depends on, beside what it is made among.
CODE = ("resources.benchmark.ranking", "resources.benchmark.champion")
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


def make_champion(
    workspace: Workspace,
    entry: ModelEntry,
    target: str,
    reports: Sequence[BenchmarkReport],
    evaluation: EvaluationSet,
    served: Served | None = None,
) -> Made[Champion]:
    """The best accurate engine by the entry's objective. Raises NoChampionError.

    Gates are applied here and not when measuring, so that a changed gate costs no new benchmark. All reports are on
    that evaluation set, at the same shapes and on the same machine. served: what serves the same checkpoint now stays,
    if it is accurate, unless another is better by more than the noise. Where no report measured it, the best of the
    others replaces it, and the record's contest says so.
    """
    baseline = next((report for report in reports if report.engine == BASELINE), None)
    # Measured again under its own name, or one of the candidates.
    ours = [item for item in reports if served is not None and item.engine_digest == served.engine_digest]
    serving = next((item.engine for item in ours if item.status == "measured"), None)
    verdicts = judge(
        reports,
        lambda report: gates_missed(entry, report),
        entry.objective,
        baseline.engine_size_bytes if baseline is not None else 1,
        serving,
    )
    best = require_champion(entry.name, target, verdicts)
    chosen = next(report for report in reports if report.engine == best.engine)
    met = None
    if served is not None and serving is None:
        met = Contest(
            release=served.release,
            engine=SERVED,
            served_score=None,
            challenger=best.engine,
            challenger_score=best.score,
            margin=EQUAL,
            outcome="unmeasured",
        )
    # A candidate that serves and is the best has nobody to be compared with: an unchanged run has the same champion.
    elif served is not None and serving is not None and (serving == SERVED or serving != best.engine):
        met = contest(reports, verdicts, entry.objective, serving, served.release)
    # What was beaten serves no more when the same candidates are judged again, and that is the same champion.
    stays = best.engine == SERVED
    made_of = Fingerprint.of(
        "champion",
        # What was measured, and not only what it was measured of: one that failed is measured again.
        # Why another was not measured is told in other words every time: how much memory it had, say.
        reports={
            report.engine: report.model_dump_json(exclude={"build_seconds", "peak_memory_bytes", "usage", "made_of"})
            if report.status == "measured"
            else f"{report.engine_digest} {report.status}"
            for report in reports
            if stays or report.engine != SERVED
        },
        evaluation=evaluation.digest,
        gates=entry.accuracy_gates().model_dump(),
        objective=entry.objective,
        **({"contest": met.model_dump()} if met is not None and stays else {}),
        code=code_versions(*CODE),
    )

    def make(folder: Path) -> Champion:
        del folder
        assert best.score is not None, "an eligible engine was measured"
        gain, count = f"{best.score:.2f} times better than PyTorch", sum(verdict.eligible for verdict in verdicts)
        place = (
            "the best" if best.score == max(verdict.score or 0 for verdict in verdicts if verdict.eligible) else "one"
        )
        story = f" {tell(met)}" if met is not None else ""
        return Champion(
            digest=made_of.digest,
            model=entry.name,
            target=target,
            engine=chosen.engine,
            engine_digest=chosen.engine_digest,
            evaluation_digest=evaluation.digest,
            setting=chosen.setting,
            objective=entry.objective,
            score=best.score,
            reason=f"{chosen.engine} is {gain} by {OBJECTIVES[entry.objective]} (geometric mean over "
            f"{len(chosen.timings)} shapes), {place} of {count} accurate engines.{story}{_doubt(chosen, baseline)}",
            verdicts=verdicts,
            contest=met,
        )

    return workspace.store.get_or_make(Champion, made_of, make, light=True)
