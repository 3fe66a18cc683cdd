"""The benchmark of one engine: its accuracy on the evaluation set and its speed against PyTorch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.accuracy.measuring import measure_accuracy
from resources.artifacts.records import (
    BenchmarkReport,
    Engine,
    EvaluationSet,
    ThreadSetting,
    ThreadTrial,
)
from resources.benchmark.texts import texts_of
from resources.benchmark.threads import SHARE, ThreadComparison, sweep, thread_counts
from resources.benchmark.timing import time_shapes
from resources.catalog.entries import ModelEntry, Shape
from resources.engines.interface import Sources
from resources.engines.specs import BASELINE, SPINNING
from resources.machine.device import physical_cores
from resources.machine.lock import benchmarking
from resources.machine.targets import device_of
from resources.processes.isolation import Worker
from resources.settings.workspace import Workspace
from resources.tasks import TASKS

if TYPE_CHECKING:
    from resources.benchmark.worker import EngineWorker

SAMPLES_FILE = "samples.json"


def measure(
    workspace: Workspace,
    entry: ModelEntry,
    engine: Engine,
    baseline: Engine,
    evaluation: EvaluationSet,
    sources: Sources,
    shapes: Sequence[Shape],
    record: BenchmarkReport,
    folder: Path,
) -> BenchmarkReport:
    """Measure an engine's accuracy, and its speed in turns with the baseline.

    Args:
        workspace: The workspace, with the artifact store and the limits on child processes.
        entry: The model's catalog entry.
        engine: The engine to measure.
        baseline: The engine that it takes turns with.
        evaluation: The evaluation set.
        sources: The checkpoint and the graph that the engine was built from.
        shapes: The shapes to measure.
        record: The report, with the fields that are known before the measurement.
        folder: The folder that the raw samples are written to.

    Raises:
        EngineError: The engine or the baseline fails.
    """
    store = workspace.store
    known = read_evaluation_set(store.folder(evaluation))
    what = f"{entry.name}: benchmarking {engine.name} on {engine.target}"
    log = workspace.log(entry.name, f"benchmark-{engine.target}-{engine.name}")
    texts = texts_of(known.items)

    def start(which: Engine, setting: ThreadSetting) -> Worker:
        arguments = (which, store.folder(which), sources, setting.threads, setting.spinning)
        whose = what if which is engine else f"{what}: running {which.name} beside it"
        return Worker(open_engine_worker, *arguments, limits=workspace.limits, what=whose, log=log)

    # The lock is taken before an engine is loaded, because loading would disturb a benchmark of another process.
    with benchmarking():
        usual = ThreadSetting(threads=workspace.baseline_threads(entry))
        setting, trials = (
            (usual, ())
            if engine.name == BASELINE
            else _choose_threads(
                engine, lambda one: start(engine, one), record.threads, texts, shapes, SHARE * entry.benchmark.seconds
            )
        )
        # The time starts after the sweep, so that loading the engine once for each setting does not shorten the
        # measurement with the setting that won.
        started, bound = time.monotonic(), entry.benchmark.seconds * (1 - SHARE if trials else 1)
        # Accuracy is measured in a process of its own. Allocators keep the memory that the largest batch took, and
        # memory is reported by shape.
        with start(engine, setting) as worker:
            answered = worker.call("answers", known.items, entry.max_batch_size)
            peak = worker.peak_memory_bytes
        with start(engine, setting) as candidate, start(baseline, usual) as rival:
            # The bound covers accuracy and speed. A quarter of it remains for speed even if a slow machine used all of
            # it for accuracy.
            seconds = max(bound - (time.monotonic() - started), entry.benchmark.seconds / 4)
            timings, samples = time_shapes(rival, candidate, texts, shapes, seconds)
        peak = max(peak, candidate.peak_memory_bytes, rival.peak_memory_bytes)
    raw = {shape: asdict(pairs) for shape, pairs in samples.items()}
    (folder / SAMPLES_FILE).write_text(json.dumps(raw))
    return record.model_copy(
        update={
            "status": "measured",
            "accuracy": measure_accuracy(TASKS[entry.task], sources.checkpoint.settings, known, answered),
            "timings": tuple(timings),
            "setting": setting,
            "baseline_threads": usual.threads,
            "thread_trials": trials,
            "peak_memory_bytes": peak,
        }
    )


def _choose_threads(
    engine: Engine,
    start: Callable[[ThreadSetting], Worker],
    budget: int,
    texts: Sequence[str],
    shapes: Sequence[Shape],
    seconds: float,
) -> tuple[ThreadSetting, tuple[ThreadTrial, ...]]:
    """Choose the engine's thread setting, and return it with the trials that it rests on.

    The engine gets all threads, without a trial, on other devices than a CPU and where the budget is one thread.
    PyTorch's number of threads is not chosen here: see Workspace.baseline_threads.
    """
    if device_of(engine.target) != "cpu" or budget == 1:
        return ThreadSetting(threads=budget), ()
    counts, can_sleep = thread_counts(budget, physical_cores()), engine.runtime in SPINNING
    with ThreadComparison(start, texts, shapes, seconds, comparisons=len(counts) - 1 + can_sleep) as contest:
        return sweep(counts, contest, can_sleep=can_sleep)


def open_engine_worker(
    engine: Engine, folder: Path, sources: Sources, threads: int, spinning: bool = True
) -> EngineWorker:
    """Load an engine in a child process, which alone imports numpy and the runtimes."""
    from resources.benchmark.worker import EngineWorker

    return EngineWorker(engine, folder, sources, threads, spinning)
