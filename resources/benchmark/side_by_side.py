"""The comparison of several engines in one measurement, outside the pipeline: `refinery bench`.

The pipeline measures each candidate beside PyTorch alone, so two candidates' figures come from different minutes. Here
all engines are loaded at once and take turns, and any two are compared round by round. The engines are those of the
pipeline, from the same artifact store: engines in the store are reused, and missing ones are built. The reports are not
stored, because nothing in the pipeline depends on them. Every engine gets all threads here, whereas the pipeline
measures how many threads each one needs.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.accuracy.measuring import measure_accuracy
from resources.artifacts.fingerprint import fingerprint, library_versions
from resources.artifacts.records import (
    Accuracy,
    BenchmarkReport,
    CandidateVerdict,
    Checkpoint,
    Engine,
    EvaluationSet,
)
from resources.benchmark.champion import gates_missed
from resources.benchmark.measuring import open_engine_worker
from resources.benchmark.ranking import judge
from resources.benchmark.statistics import geometric_mean
from resources.benchmark.texts import texts_of
from resources.benchmark.timing import Turns, shares, take_turns
from resources.catalog.entries import ModelEntry, Shape
from resources.engines.interface import Sources
from resources.engines.specs import BASELINE, LIBRARIES
from resources.errors import CatalogError, EngineError
from resources.machine.device import describe_device
from resources.machine.lock import benchmarking
from resources.processes.isolation import Worker
from resources.settings.workspace import Workspace
from resources.tasks import TASKS

#: A callback that gets the name of a step and its result.
Progress = Callable[[str, str], None]


class Comparison(BaseModel):
    """The results of several engines of one model. All times are in milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    model: str
    revision: str
    task: str
    target: str
    device: str
    threads: int
    created: str = Field(description="Time in UTC, ISO 8601.")
    seconds: float = Field(description="Time limit of the whole measurement.")
    versions: dict[str, str]
    reports: tuple[BenchmarkReport, ...] = Field(
        description="The baseline comes first. A report without a measurement has a reason."
    )
    verdicts: tuple[CandidateVerdict, ...]
    ratios: dict[str, dict[str, dict[str, float]]] = Field(
        description="By shape and two engines: how many times faster the first one is, as the median over the rounds."
    )
    samples: dict[str, dict[str, list[float]]] = Field(
        description="By shape and engine. Samples with one index are of one round, in which the engines take turns."
    )

    @property
    def measured(self) -> list[str]:
        """The engines that were measured, the baseline first."""
        return [report.engine for report in self.reports if report.status == "measured"]

    def overall(self, engine: str, other: str) -> float:
        """Return how many times faster an engine is than another, as the geometric mean over the shapes."""
        return geometric_mean([ratios[engine][other] for ratios in self.ratios.values()])


def compare(
    workspace: Workspace,
    entry: ModelEntry,
    target: str,
    sources: Sources,
    evaluation: EvaluationSet,
    engines: Sequence[Engine],
    say: Progress,
    *,
    shapes: Sequence[Shape],
    seconds: float | None = None,
    accuracy: bool = True,
) -> Comparison:
    """Measure engines of a model and PyTorch in turns.

    Unsupported and failed engines are part of the result.

    Args:
        workspace: The workspace, with the artifact store and the limits on child processes.
        entry: The model's catalog entry.
        target: The target of the engines.
        sources: The checkpoint and the graph that the engines were built from.
        evaluation: The evaluation set.
        engines: The engines, with PyTorch's first.
        say: Is called with each step's name and its result.
        shapes: The shapes to measure.
        seconds: The time for the whole measurement. The default is the catalog's time for one candidate, multiplied by
            the number of candidates.
        accuracy: Whether the engines' answers are compared with PyTorch's too.

    Raises:
        EngineError: PyTorch cannot run, or no other engine is left to compare.
    """
    checkpoint = sources.checkpoint
    candidates = sum(engine.status == "built" for engine in engines[1:])
    bound = entry.benchmark.seconds * max(1, candidates) if seconds is None else seconds
    rivals = Rivals(workspace, entry, sources, evaluation, engines, shapes, bound, say)
    with benchmarking(lambda who: say("waiting", f"other work is under way on this machine: {who}")):
        rivals.run(accuracy)
    return Comparison(
        model=entry.name,
        revision=checkpoint.revision,
        task=checkpoint.task,
        target=target,
        device=describe_device(target),
        threads=workspace.threads(entry),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=bound,
        versions={
            "python": platform.python_version(),
            **library_versions(*sorted({"numpy", "tokenizers", *chain.from_iterable(LIBRARIES.values())})),
        },
        reports=tuple(rivals.reports()),
        verdicts=_verdicts(entry, rivals.reports(), accuracy),
        ratios=rivals.ratios(),
        samples=rivals.samples(),
    )


def checked_shapes(entry: ModelEntry, checkpoint: Checkpoint, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Return the shapes without duplicates.

    Raises:
        CatalogError: A shape is longer than the checkpoint takes, or a larger batch than is served.
    """
    for shape in shapes:
        if shape.sequence > checkpoint.max_tokens:
            raise CatalogError(
                f"{entry.name}: the shape {shape} is longer than this checkpoint takes ({checkpoint.max_tokens} "
                "tokens). Give a shorter shape."
            )
        if shape.batch > entry.max_batch_size:
            raise CatalogError(
                f"{entry.name}: the batch of the shape {shape} is larger than max_batch_size "
                f"({entry.max_batch_size}), and engines are not built for larger batches. Give a smaller shape."
            )
    return tuple(dict.fromkeys(shapes))


def _verdicts(entry: ModelEntry, reports: Sequence[BenchmarkReport], accuracy: bool) -> tuple[CandidateVerdict, ...]:
    """Return the verdicts that the pipeline would reach on these reports.

    If accuracy was not measured, no engine is judged, and each measured engine's verdict says so.
    """
    if accuracy:
        return judge(reports, lambda report: gates_missed(entry, report), entry.objective, reports[0].engine_size_bytes)
    return tuple(
        CandidateVerdict(engine=report.engine, score=None, eligible=False, verdict="accuracy was not measured")
        for report in reports
        if report.status == "measured"
    )


class _FellError(Exception):
    """The failure of one engine while it was measured with others."""

    def __init__(self, contestant: _Contestant, error: EngineError) -> None:
        super().__init__(str(error))
        self.contestant = contestant


class _Contestant:
    """A loaded engine whose errors carry it, so that `Rivals` can remove it."""

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
    """The engines of one comparison: the ones that are still measured, and the reasons why the others are not.

    Args:
        workspace: The workspace, with the artifact store and the limits on child processes.
        entry: The model's catalog entry.
        sources: The checkpoint and the graph that the engines were built from.
        evaluation: The evaluation set.
        engines: The engines, with PyTorch's first.
        shapes: The shapes to measure.
        seconds: The time for the whole measurement.
        say: Is called with each step's name and its result.
    """

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
                # Accuracy is measured in a process of its own. Allocators keep the memory that the largest batch took,
                # and memory is reported by shape.
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
            # The bound covers accuracy and speed. A quarter of it remains for speed even if a slow machine used all of
            # it for accuracy.
            seconds = max(self._seconds - (time.monotonic() - started), self._seconds / 4)
            for shape, share in shares(self._shapes, seconds):
                turns = self._at(shape, contestants, texts_of(known.items), share)
                rounds = f"{turns.rounds} rounds of {len(contestants)} engines"
                self._say(str(shape), rounds + ("" if turns.agreed else ", stopped by the time limit"))

    def _at(self, shape: Shape, contestants: list[_Contestant], texts: Sequence[str], seconds: float) -> Turns:
        """Measure all engines in turns at one shape.

        An engine that fails is removed, and the others begin again within the remaining time.
        """
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
            open_engine_worker,
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
        # PyTorch fails, for example, when the texts do not fit a shape. No comparison is possible without it.
        if engine == BASELINE:
            raise EngineError(
                f"{self._entry.name}: PyTorch cannot be measured, and all engines are compared with it: {reason}"
            )
        self._reasons[engine] = f"failed: {reason}"
        self._say(f"engines/{engine}", self._reasons[engine])

    def _require_rivals(self) -> None:
        """Raise EngineError if PyTorch, or every engine beside it, has been removed."""
        left = [engine.name for engine in self._left()]
        if BASELINE not in left or len(left) < 2:
            reasons = "".join(f"\n  {engine}: {reason}" for engine, reason in self._reasons.items())
            raise EngineError(
                f"{self._entry.name}: there is nothing to compare on {self._engines[0].target}: a comparison needs "
                f"{BASELINE} and at least one other engine, and it has {' and '.join(left) or 'neither'}.{reasons}"
            )

    def reports(self) -> list[BenchmarkReport]:
        """Return one report for each engine, in the order of the engines."""
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
        """Return Comparison.ratios, for the engines that were measured to the end."""
        left = [engine.name for engine in self._left()]
        return {
            str(turns.shape): {
                one: {other: turns.speedup(names.index(one), names.index(other)) for other in left if other != one}
                for one in left
            }
            for names, turns in self._turns
        }

    def samples(self) -> dict[str, dict[str, list[float]]]:
        """Return Comparison.samples, for every engine that was measured at a shape, even if it failed later."""
        return {str(turns.shape): dict(zip(names, turns.times_ms, strict=True)) for names, turns in self._turns}
