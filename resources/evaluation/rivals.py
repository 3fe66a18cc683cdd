"""Several engines of one model, measured together: those still in it, and why the others are not.

One that cannot be loaded, breaks or is stopped by a limit is out, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from resources.artifacts.fingerprint import fingerprint
from resources.artifacts.records import Accuracy, BenchmarkReport, Engine, EvaluationSet
from resources.catalog import ModelEntry, Shape
from resources.device import describe_device
from resources.engines import BASELINE, Sources
from resources.errors import EngineError
from resources.evaluation.benchmark import measure_accuracy, open_probe
from resources.evaluation.evaluation_set import read_evaluation_set
from resources.evaluation.texts import texts_of
from resources.evaluation.timing import Turns, shares, take_turns
from resources.isolation import Worker
from resources.tasks import TASKS
from resources.workspace import Workspace

#: Called with what a step is called and what came of it.
Progress = Callable[[str, str], None]


class _FellError(Exception):
    """An engine broke while others were measured with it."""

    def __init__(self, contestant: _Contestant, error: EngineError) -> None:
        super().__init__(str(error))
        self.contestant = contestant


class _Contestant:
    """A loaded engine that says who it was when it breaks."""

    def __init__(self, engine: str, worker: Worker) -> None:
        self.engine, self._worker = engine, worker

    def call(self, method: str, *args: Any) -> Any:
        try:
            return self._worker.call(method, *args)
        except EngineError as error:
            raise _FellError(self, error) from error

    def close(self) -> None:
        self._worker.close()


class Rivals:
    """The engines of one comparison: those still in it, and why the others are not."""

    def __init__(
        self,
        workspace: Workspace,
        entry: ModelEntry,
        sources: Sources,
        evaluation: EvaluationSet,
        engines: Sequence[Engine],
        shapes: Sequence[Shape],
        seconds: float,
        say: Progress,
    ) -> None:
        self._workspace, self._entry, self._sources, self._evaluation = workspace, entry, sources, evaluation
        self._engines, self._shapes, self._seconds, self._say = engines, shapes, seconds, say
        self._reasons = {
            engine.name: f"{engine.status}: {engine.reason}" for engine in engines if engine.status != "built"
        }
        self._skipped = {engine.name for engine in engines if engine.status == "unsupported"}
        self._accuracy: dict[str, Accuracy] = {}
        self._turns: list[tuple[list[str], Turns]] = []

    def run(self, accuracy: bool) -> None:
        """Measure accuracy engine by engine, then speed with all of them loaded."""
        self._require_rivals()
        known = read_evaluation_set(self._workspace.store.folder(self._evaluation))
        started = time.monotonic()
        task, settings = TASKS[self._entry.task], self._sources.checkpoint.settings
        for engine in self._left() if accuracy else []:
            try:
                # In a process of its own: allocators keep what the largest batch took, and memory is reported by shape.
                with self._start(engine) as worker:
                    answered = worker.call("answers", known.items, self._entry.max_batch_size)
            except EngineError as error:
                self._drop(engine.name, str(error))
                continue
            self._accuracy[engine.name] = measure_accuracy(task, settings, known, answered)
            self._say(f"accuracy/{engine.name}", f"measured after {time.monotonic() - started:.1f} s")
        with ExitStack() as stack:
            contestants = []
            for engine in self._left():
                try:
                    contestants.append(_Contestant(engine.name, stack.enter_context(self._start(engine))))
                except EngineError as error:
                    self._drop(engine.name, str(error))
            # The bound is for all of it; a machine so slow that nothing is left still gets its few samples.
            seconds = max(self._seconds - (time.monotonic() - started), self._seconds / 4)
            for shape, share in shares(self._shapes, seconds):
                turns = self._at(shape, contestants, texts_of(known.items), share)
                rounds = f"{turns.rounds} rounds of {len(contestants)} engines"
                self._say(str(shape), rounds + ("" if turns.agreed else ", until the time was over"))

    def _at(self, shape: Shape, contestants: list[_Contestant], texts: Sequence[str], seconds: float) -> Turns:
        """All in turns at one shape; one that breaks is out, and the others begin again in what is left of the time."""
        deadline = time.monotonic() + seconds
        while True:
            self._require_rivals()
            try:
                turns = take_turns(contestants, texts, shape, max(0.0, deadline - time.monotonic()))
            except _FellError as fell:
                contestants.remove(fell.contestant)
                fell.contestant.close()
                self._drop(fell.contestant.engine, f"at {shape}: {fell}")
                continue
            self._turns.append(([contestant.engine for contestant in contestants], turns))
            return turns

    def _start(self, engine: Engine) -> Worker:
        model, target, workspace = self._entry.name, engine.target, self._workspace
        threads = workspace.baseline_threads if engine.name == BASELINE else workspace.threads
        return Worker(
            open_probe,
            engine,
            self._workspace.store.folder(engine),
            self._sources,
            threads(self._entry),
            limits=self._workspace.limits,
            what=f"{model}: comparing {engine.name} on {target}",
            log=self._workspace.log(model, f"bench-{target}-{engine.name}"),
        )

    def _left(self) -> list[Engine]:
        return [engine for engine in self._engines if engine.name not in self._reasons]

    def _drop(self, engine: str, reason: str) -> None:
        if engine == BASELINE:  # texts that do not fit a shape, for one; and then there is nothing to compare with
            raise EngineError(f"{self._entry.name}: PyTorch, which all are compared with, cannot be measured: {reason}")
        self._reasons[engine] = f"failed: {reason}"
        self._say(f"engines/{engine}", self._reasons[engine])

    def _require_rivals(self) -> None:
        """Raise EngineError where PyTorch is alone or not there itself."""
        left = [engine.name for engine in self._left()]
        if BASELINE not in left or len(left) < 2:
            reasons = "".join(f"\n  {engine}: {reason}" for engine, reason in self._reasons.items())
            raise EngineError(
                f"{self._entry.name}: there is nothing to compare on {self._engines[0].target}: {BASELINE} and at "
                f"least one engine beside it are needed, and there is {' and '.join(left) or 'neither'}.{reasons}"
            )

    def reports(self) -> list[BenchmarkReport]:
        """One of each engine, in their order."""
        threads = self._workspace.threads(self._entry)
        baseline = self._engines[0]
        digest = fingerprint(
            "comparison",
            engines=[[engine.digest, engine.content_digest] for engine in self._engines],
            evaluation=self._evaluation.digest,
            shapes=[str(shape) for shape in self._shapes],
            threads=threads,
        )
        reports = []
        for engine in self._engines:
            report = BenchmarkReport(
                digest=digest,
                model=self._entry.name,
                engine=engine.name,
                engine_digest=engine.digest,
                baseline_digest=baseline.digest,
                evaluation_digest=self._evaluation.digest,
                target=engine.target,
                status="skipped" if engine.name in self._skipped else "failed",
                reason=self._reasons.get(engine.name, ""),
                threads=threads,
                baseline_threads=self._workspace.baseline_threads(self._entry),
                device=describe_device(engine.target),
                engine_size_bytes=engine.size_bytes or self._sources.checkpoint.weights_bytes,
            )
            if not report.reason:
                timings = tuple(turns.timing(names.index(engine.name)) for names, turns in self._turns)
                accuracy = self._accuracy.get(engine.name)
                update = {"status": "measured", "accuracy": accuracy, "timings": timings}
                report = report.model_copy(update=update)
            reports.append(report)
        return reports

    def ratios(self) -> dict[str, dict[str, dict[str, float]]]:
        """See Comparison; of those that were measured to the end."""
        left = [engine.name for engine in self._left()]
        return {
            str(turns.shape): {
                one: {other: turns.speedup(names.index(one), names.index(other)) for other in left if other != one}
                for one in left
            }
            for names, turns in self._turns
        }

    def samples(self) -> dict[str, dict[str, list[float]]]:
        """See Comparison; of all that took part, to the end or not."""
        return {str(turns.shape): dict(zip(names, turns.times_ms, strict=True)) for names, turns in self._turns}
