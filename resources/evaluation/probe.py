"""What a benchmark's child process holds: one loaded engine, run on request. Lives in child processes only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resources.artifacts.records import Engine
from resources.engines import Sources, load
from resources.evaluation.batches import PlannedBatch
from resources.evaluation.texts import batch_of_shape
from resources.isolation import peak_memory_bytes, reset_peak_memory
from resources.tokenization import TextEncoder


class Probe:
    """One engine. All methods are called through resources.isolation.Worker.

    While another probe works this one is blocked on its pipe, so that two take turns without disturbing each other.
    """

    def __init__(self, engine: Engine, folder: Path, sources: Sources, threads: int) -> None:
        reset_peak_memory()
        self._bare = peak_memory_bytes()
        self._runner = load(engine, folder, sources, threads)
        self._encoder = TextEncoder.from_folder(str(sources.checkpoint_folder))
        self._batch: dict[str, np.ndarray] = {}
        self._runs = 0

    def answers(self, texts: Sequence[str], plan: Sequence[PlannedBatch]) -> np.ndarray:
        """The engine's answers fp32 `[texts, width]`, computed in the planned batches."""
        encodings = self._encoder.tokens(texts)
        rows: dict[int, np.ndarray] = {}
        for batch in plan:
            answer = self._run(self._encoder.pad([encodings[index] for index in batch.indices], batch.length))
            if answer.shape[0] != len(batch.indices):
                return answer  # of a shape that the comparison refuses and names
            rows.update(zip(batch.indices, answer, strict=True))
        return np.stack([rows[index] for index in range(len(texts))])

    def lengths(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens of each text, and the bucket it is padded to."""
        tokens = [len(encoding.ids) for encoding in self._encoder.tokens(texts)]
        return tokens, [self._encoder.bucket(count) for count in tokens]

    def prepare(self, texts: Sequence[str], rows: int, tokens: int) -> None:
        """Make a batch of that shape the one that `burst` runs. Memory and runs are counted anew."""
        self._batch = batch_of_shape(texts, self._encoder, rows, tokens)
        self._runs = 0
        reset_peak_memory()

    def burst(self, warm: int, timed: int) -> list[float]:
        """Run the prepared batch; milliseconds of each timed run."""
        for _ in range(warm):
            self._run(self._batch)
        samples = []
        for _ in range(timed):
            started = time.perf_counter_ns()
            self._run(self._batch)
            samples.append((time.perf_counter_ns() - started) / 1e6)
        return samples

    def memory(self) -> int:
        """Peak resident bytes above the bare process since `prepare`."""
        return max(0, peak_memory_bytes() - self._bare)

    def runs(self) -> int:
        """Runs of the engine since `prepare`, untimed ones included."""
        return self._runs

    def _run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        self._runs += 1
        return self._runner.run(batch)
