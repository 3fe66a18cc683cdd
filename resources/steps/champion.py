"""The steps `champion/<target>`: the engine that is to be served, and why."""

from __future__ import annotations

from collections.abc import Sequence

from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import BenchmarkReport, Champion, Engine
from resources.benchmark.champion import choose
from resources.checkpoints.shapes import shapes_of
from resources.machine.device import describe_device
from resources.steps.benchmark import BenchmarkStep, MeasuringStep, ServedBenchmarkStep
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.engine import EngineStep
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.step import Expected, NotYetKnownError, Recipe, Step, Work


class ChampionStep(Step[Champion]):
    """Choose the best accurate engine by the entry's objective. Raises NoChampionError where there is none.

    Gates are applied here and not when an engine is measured, so that a changed gate costs no new benchmark.
    """

    record = Champion
    code = (
        "resources.accuracy.measuring",
        "resources.benchmark.champion",
        "resources.benchmark.ranking",
        "resources.benchmark.statistics",
        "resources.steps.champion",
        "resources.tasks",
    )
    follows_its_inputs = True

    def __init__(
        self,
        target: str,
        engines: Sequence[EngineStep],
        benchmarks: Sequence[BenchmarkStep],
        served: ServedBenchmarkStep,
    ) -> None:
        super().__init__(f"champion/{target}", [*benchmarks, served])
        self.target, self.engines, self.served = target, tuple(engines), served
        self.benchmarks: tuple[MeasuringStep, ...] = (*benchmarks, served)
        self.baseline = served.baseline

    def recipe(self, work: Work) -> Recipe[Champion]:
        """See Step."""
        reports, served = self.reports(work), self.served.incumbent(work).served
        choice = choose(work.entry, self.target, reports, work.get(EVALUATION_SET), served)
        made_of = Fingerprint.of("champion", **choice.parts, code=code_versions(*self.code))
        return Recipe.of_ready(made_of, choice.champion.model_copy(update={"digest": made_of.digest}))

    def reports(self, work: Work) -> list[BenchmarkReport]:
        """Return the newest report on every engine that has one, without those that cannot be compared.

        After a run of some engines only, the reports on the others may be of another revision, shape or machine.
        """
        found = work.there(self.benchmarks)
        entry, workspace = work.entry, work.workspace
        evaluation, baseline = work.get(EVALUATION_SET), work.get(self.baseline)
        shapes = {str(shape) for shape in shapes_of(entry, work.get(CHECKPOINT))}
        return [
            report
            for report in found
            if report.evaluation_digest == evaluation.digest
            and report.baseline_digest == baseline.digest
            and report.threads == workspace.threads(entry)
            and report.device == describe_device(self.target)
            and (not report.timings or {timing.shape for timing in report.timings} == shapes)
        ]

    def engine(self, work: Work, champion: Champion) -> Engine:
        """Return the champion's engine. Raises NotYetKnownError in a plan."""
        name = f"engines/{self.target}/{champion.engine}"
        found = work.named(Engine, name)
        if isinstance(found, Expected):
            raise NotYetKnownError(name)
        return found
