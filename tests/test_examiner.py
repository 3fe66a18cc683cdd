"""What builders measure harm on: texts of all lengths, and those that an engine answered worst."""

import numpy as np
import pytest

from resources.engines.onnxruntime import OnnxRuntimeRunner
from resources.evaluation.examiner import HARDEST_ROWS, SCREENING_ROWS, Examiner
from tests.test_half import prepared


@pytest.fixture
def opened(made_checkpoint, sharing):
    """An examiner of a small embedding model, and its exported graph, which answers as PyTorch does."""
    sources, goal = prepared(sharing, made_checkpoint())
    examiner = Examiner(goal, sources.checkpoint, sources.checkpoint_folder, sources.graph.width)
    return examiner, OnnxRuntimeRunner(sources.graph_folder / "model.onnx", sources.graph.output, threads=2).run


def screened(examiner):
    """The rows harm is measured on, each as the tokens it has."""
    return [
        tuple(row[:count])
        for batch, tokens in examiner.screening_batches()
        for row, count in zip(batch["input_ids"], tokens, strict=True)
    ]


def test_harm_is_measured_on_what_was_answered_worst(opened):
    examiner, run = opened
    assert examiner.misses(run) == []
    everywhere = screened(examiner)
    assert len(everywhere) == SCREENING_ROWS + HARDEST_ROWS
    hard = sorted(
        {tuple(row[row > 0]) for batch in examiner.calibration_batches() for row in batch["input_ids"]}
        - set(everywhere)
    )[:3]

    def spoiled(batch):
        answers = run(batch)
        for number, row in enumerate(batch["input_ids"]):
            if tuple(row[row > 0]) in hard:
                answers[number] *= -1
        return answers

    assert any("cosine_worst" in miss for miss in examiner.misses(spoiled))
    chosen = screened(examiner)
    assert set(hard) <= set(chosen)
    assert len(chosen) == SCREENING_ROWS + HARDEST_ROWS
    assert {len(row) for row in chosen} >= {len(everywhere[0]), len(everywhere[-1])}  # and of all lengths

    # The first engine is the one with everything in low precision; what the others miss is not what is searched for.
    assert examiner.misses(lambda batch: -run(batch))
    assert screened(examiner) == chosen


def test_numbers_that_are_none_say_nothing_about_texts(opened):
    examiner, run = opened
    before = screened(examiner)
    assert "NaN" in examiner.misses(lambda batch: np.full_like(run(batch), np.nan))[0]
    assert screened(examiner) == before
