"""The part of a benchmark that runs in a child process: one loaded engine.

This module is imported in child processes only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resources.accuracy.inference import Answered, answer_every_way
from resources.artifacts.records import Engine
from resources.benchmark.texts import batch_of_shape
from resources.engines.interface import Sources, load
from resources.pipelines import open_pipeline
from resources.pipelines.base import Item
from resources.processes.isolation import peak_memory_bytes, reset_peak_memory
from resources.tasks import TASKS


class EngineWorker:
    """One engine, loaded, that runs on request.

    All methods are called through resources.processes.isolation.Worker. While another worker runs, this one is blocked
    on its pipe, so engines take turns without disturbing each other.
    """

    def __init__(self, engine: Engine, folder: Path, sources: Sources, threads: int, spinning: bool = True) -> None:
        reset_peak_memory()
        self._bare = peak_memory_bytes()
        self._runner = load(engine, folder, sources, threads, spinning=spinning)
        self._task = TASKS[sources.checkpoint.task]
        self._pipeline = open_pipeline(str(sources.checkpoint_folder))
        self._width = sources.graph.width
        self._batch: dict[str, np.ndarray] = {}
        self._runs = 0

    def answers(self, items: Sequence[Item], max_batch_size: int) -> list[Answered]:
        """Return the answers to all items, once for each way in which requests reach a server."""
        task, width = self._task, self._width
        return list(
            answer_every_way(self._pipeline, self._run, items, max_batch_size, per_token=task.per_token, width=width)
        )

    def prepare(self, texts: Sequence[str], rows: int, tokens: int) -> None:
        """Prepare the batch `[rows, tokens]` that `burst` runs, and reset the counts of memory and runs."""
        self._batch = batch_of_shape(texts, self._pipeline.encoder, rows, tokens, self._task.extra_inputs)
        self._runs = 0
        reset_peak_memory()

    def burst(self, warm: int, timed: int) -> list[float]:
        """Run the prepared batch, first untimed and then timed, and return the milliseconds of each timed run."""
        for _ in range(warm):
            self._run(self._batch)
        samples = []
        for _ in range(timed):
            started = time.perf_counter_ns()
            self._run(self._batch)
            samples.append((time.perf_counter_ns() - started) / 1e6)
        return samples

    def memory(self) -> int:
        """Return the peak resident bytes since `prepare`, above those of the process before it loaded the engine."""
        return max(0, peak_memory_bytes() - self._bare)

    def runs(self) -> int:
        """Return the number of runs since `prepare`, untimed runs included."""
        return self._runs

    def _run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        self._runs += 1
        return self._runner.run(batch)
