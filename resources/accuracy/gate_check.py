"""The accuracy gates of an engine that is being built, and the rows for its calibration.

This module is imported in child processes only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.accuracy.inference import Run, answer_every_way
from resources.accuracy.measuring import measure_accuracy, missed_gates
from resources.artifacts.records import Checkpoint
from resources.pipelines import open_pipeline
from resources.pipelines.base import Row
from resources.tasks import TASKS, Gates

#: Calibration sees every second request only. Half of the requests that judge an engine are therefore new to it.
CALIBRATION_PERIOD = 2
MOST_CALIBRATION_ROWS = 128
#: The number of rows from the items that were answered worst, and the number of rows of all lengths. An operator's
#: error on most texts says little about the one text that misses a gate. For all-MiniLM-L6-v2 in static int8, keeping 8
#: of 24 operators in fp32 was not enough when rows of all lengths chose them; with the worst rows, 2 are enough.
HARDEST_ROWS, SCREENING_ROWS = 16, 8
_SCREENING_BATCH = 8
#: A built engine must clear each gate by this share of the distance from the gate to a perfect value. On the server the
#: same texts come in other batches, and with dynamically quantized matrices an answer depends on its batch.
RESERVE = 0.2


class GateCheck:
    """The evaluation set of one checkpoint, loaded, with the gates that an engine must keep on it.

    Args:
        width: The width of the engine's output.
    """

    def __init__(
        self,
        evaluation_folder: Path,
        gates: Gates,
        max_batch_size: int,
        checkpoint: Checkpoint,
        checkpoint_folder: Path,
        width: int,
    ) -> None:
        self._known = read_evaluation_set(evaluation_folder)
        self._pipeline = open_pipeline(str(checkpoint_folder))
        self._task, self._settings = TASKS[checkpoint.task], checkpoint.settings
        self._gates, self._max_batch_size, self._width = gates.tightened(RESERVE), max_batch_size, width
        self._hardest: list[int] | None = None

    def misses(self, run: Run) -> list[str]:
        """Return the gates that the engine misses, each as a sentence.

        The gates are tightened by `RESERVE`. The engine answers the items once in each of `inference.WAYS`, and the
        check ends after the first way that misses a gate.
        """
        items, per_token = self._known.items, self._task.per_token
        for answered in answer_every_way(
            self._pipeline, run, items, self._max_batch_size, per_token=per_token, width=self._width
        ):
            accuracy = measure_accuracy(self._task, self._settings, self._known, [answered])
            missed = missed_gates(self._task, accuracy, self._gates)
            if missed:
                if self._hardest is None and not accuracy.broken:
                    scores = self._task.scores(self._settings, self._known.baseline, answered.answers)
                    # An item with a score of 1 is answered exactly as PyTorch answers it, and misses no gate.
                    self._hardest = [index for index in np.argsort(scores, kind="stable").tolist() if scores[index] < 1]
                return missed
        return []

    def calibration_batches(self) -> list[dict[str, np.ndarray]]:
        """Return batches of one unpadded row each, so that padding does not affect the activation ranges."""
        rows = self._rows(self._known.items[::CALIBRATION_PERIOD], MOST_CALIBRATION_ROWS)
        return [self._pipeline.arrays([row], max(1, row.tokens)) for row in rows]

    def screening_batches(self) -> list[tuple[dict[str, np.ndarray], list[int]]]:
        """Return a few batches of rows, with the number of tokens of each row.

        Some rows belong to the items that the first engine that missed a gate answered worst. The others are of all
        lengths.
        """
        items, hardest = self._known.items, (self._hardest or [])[:HARDEST_ROWS]
        rows = [row for index in hardest for row in self._pipeline.rows([items[index]])[0]][:HARDEST_ROWS]
        others = [item for index, item in enumerate(items) if index not in hardest]
        rows += self._rows(others or items, SCREENING_ROWS + HARDEST_ROWS - len(rows))
        rows.sort(key=lambda row: row.tokens)
        batches = []
        for start in range(0, len(rows), _SCREENING_BATCH):
            members = rows[start : start + _SCREENING_BATCH]
            tokens = [row.tokens for row in members]
            batches.append((self._pipeline.arrays(members, max(1, *tokens)), tokens))
        return batches

    def _rows(self, items: list[dict[str, str]], most: int) -> list[Row]:
        """Return at most `most` rows of the items, spread evenly over their lengths, the shortest first."""
        rows = sorted((row for group in self._pipeline.rows(items) for row in group), key=lambda row: row.tokens)
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))
        return [rows[index] for index in chosen]
