"""What builders measure harm on: texts of all lengths, and those that an engine answered worst."""

import numpy as np
import pytest

from resources.engines.ladder import Operator
from resources.engines.onnxruntime import OnnxRuntimeRunner
from resources.engines.reduced import Trials
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


def test_the_ladder_measures_harm_on_what_missed_the_gates_before(opened):
    examiner, run = opened
    hard = tuple(examiner.calibration_batches()[3]["input_ids"][0])

    def running(reduced):
        def answers(batch):
            found = run(batch)
            for number, row in enumerate(batch["input_ids"]):
                # One does harm to that text alone, the other a little to all.
                found[number] *= -1 if "one" in reduced and tuple(row[row > 0]) == hard else 1
            return found + (0.01 * np.roll(found, 1, axis=1) if "other" in reduced else 0)

        return answers

    operators = [Operator(name, 32, 32, (name,)) for name in ("one", "other")]
    assert pytest.approx(harms(Trials(running, operators, examiner)), abs=0.001) == (0.0, 0.01)
    trials = Trials(running, operators, examiner)
    assert trials.misses([])
    one, other = harms(trials)
    assert one > 10 * other


def harms(trials):
    return trials.damage(["one"]), trials.damage(["other"])


def test_numbers_that_are_none_say_nothing_about_texts(opened):
    examiner, run = opened
    before = screened(examiner)
    assert "NaN" in examiner.misses(lambda batch: np.full_like(run(batch), np.nan))[0]
    assert screened(examiner) == before
