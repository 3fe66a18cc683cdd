"""The steps `benchmarks/<target>/<engine>`: how accurate an engine is, and how fast beside PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint, code_versions, library_versions
from resources.artifacts.records import BenchmarkReport, Engine
from resources.checkpoints.shapes import shapes_of
from resources.engines.specs import SERVED
from resources.errors import EngineError
from resources.machine.device import describe_device, physical_cores
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.engine import EngineStep, sources_of
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.step import Expected, Recipe, Step, Work
from resources.triton.served import Candidate, Incumbent, find_incumbent


class MeasuringStep(Step[BenchmarkReport]):
    """Measure an engine on real text, in turns with the baseline. An engine that breaks is recorded as failed."""

    record = BenchmarkReport
    code = (
        "resources.accuracy",
        "-resources.accuracy.gate_check",
        "-resources.accuracy.reference",
        "resources.benchmark",
        "-resources.benchmark.champion",
        "-resources.benchmark.ranking",
        "-resources.benchmark.side_by_side",
        "resources.processes.isolation",
        "resources.tasks",
        "resources.pipelines",
        "resources.steps.benchmark",
    )

    def __init__(self, name: str, baseline: EngineStep, engines: Iterable[EngineStep]) -> None:
        target = baseline.target
        super().__init__(f"benchmarks/{target}/{name}", [*engines, EVALUATION_SET])
        self.target, self.baseline = target, baseline

    def _of(self, work: Work, engine: Engine | Expected, beside: Sequence[str] = ()) -> Recipe[BenchmarkReport]:
        """Return the recipe of the report on one engine.

        `beside` has the digests of the engines that it is compared with. A change in them causes a new measurement.
        """
        entry, workspace, checkpoint = work.entry, work.workspace, work.get(CHECKPOINT)
        baseline, evaluation = work.expected(self.baseline), work.expected(EVALUATION_SET)
        threads, device = workspace.threads(entry), describe_device(self.target)
        shapes = shapes_of(entry, checkpoint)
        made_of = Fingerprint.of(
            "benchmark",
            model=entry.name,
            # The same inputs may give another engine, because the ladder stops after a time.
            engine=[engine.digest, engine.content_digest],
            baseline=baseline.digest,
            evaluation=evaluation.digest,
            shapes=[str(shape) for shape in shapes],
            batch=entry.max_batch_size,
            seconds=entry.benchmark.seconds,
            threads=[threads, workspace.baseline_threads(entry), physical_cores()],
            device=device,
            **({"beside": sorted(beside)} if beside else {}),
            code=code_versions(*self.code),
            libraries=library_versions("numpy", "tokenizers"),
        )
        if isinstance(engine, Expected):
            return Recipe(made_of, None)
        built = engine
        record = BenchmarkReport(
            digest=made_of.digest,
            model=entry.name,
            engine=engine.name,
            engine_digest=engine.digest,
            baseline_digest=baseline.digest,
            evaluation_digest=evaluation.digest,
            target=self.target,
            status="skipped",
            threads=threads,
            device=device,
            engine_size_bytes=engine.size_bytes or checkpoint.weights_bytes,
        )
        if engine.status != "built":
            # Not `skipped` for a failed build: that is tried again, and then this must be measured again too.
            status = "failed" if engine.status == "failed" else "skipped"
            reason = f"{engine.status}: {engine.reason}"
            return Recipe.of_ready(made_of, record.model_copy(update={"status": status, "reason": reason}))

        work.found(ONNX_GRAPH)  # read now, like everything that is measured: its pointer may move until then

        def make(folder: Path) -> BenchmarkReport:
            from resources.benchmark.measuring import measure

            known = work.get(EVALUATION_SET)
            work.store.require_whole(built, known, checkpoint)
            rival = work.get(self.baseline)
            try:
                return measure(workspace, entry, built, rival, known, sources_of(work), shapes, record, folder)
            except EngineError as error:
                return record.model_copy(update={"status": "failed", "reason": str(error)})

        return Recipe(made_of, make)


class BenchmarkStep(MeasuringStep):
    """Measure one of the engines that compete."""

    def __init__(self, engine: EngineStep, baseline: EngineStep) -> None:
        # The baseline's too, because every candidate is measured in turns with it.
        super().__init__(engine.spec.name, baseline, sorted({baseline, engine}, key=lambda step: step.name))
        self.engine = engine

    def recipe(self, work: Work) -> Recipe[BenchmarkReport]:
        """See Step. An engine that was not built is skipped."""
        return self._of(work, work.expected(self.engine))


class ServedBenchmarkStep(MeasuringStep):
    """Measure the engine of the release that serves once more, beside the candidates.

    Nothing is measured if no release serves, or if one of the candidates is the engine that serves.
    """

    def __init__(self, engines: Sequence[EngineStep], baseline: EngineStep) -> None:
        super().__init__(SERVED, baseline, engines)
        self.engines = tuple(engines)

    def recipe(self, work: Work) -> Recipe[BenchmarkReport] | None:
        """See Step. The engine is kept under a name, so that it can be released again if it stays the champion."""
        incumbent = self.incumbent(work)
        if incumbent.engine is None:
            return None
        # In a plan, an engine that is yet to be built may prove identical to the one that serves. Then it is not known.
        built = [engine.digest for engine in work.there(self.engines) if engine.status == "built"]
        found = self._of(work, incumbent.engine, built)
        points = {f"engines/{self.target}/{SERVED}": incumbent.engine}
        return Recipe(found.made_of, found.make, found.ready, points=points)

    def incumbent(self, work: Work) -> Incumbent:
        """Return what serves now, as a rival of the candidates."""
        return work.once(f"incumbent/{self.target}", lambda: self._find_incumbent(work))

    def _find_incumbent(self, work: Work) -> Incumbent:
        candidates = [
            Candidate(step.spec.name, found.digest, found.content_digest)
            for step in self.engines
            if (found := work.found(step)) is not None
        ]
        return find_incumbent(
            work.workspace, work.store, work.entry.name, self.target, work.get(CHECKPOINT), candidates
        )
