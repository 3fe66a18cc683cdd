"""What builders measure harm on: texts of all lengths, and those that an engine answered worst."""

import numpy as np
import pytest

from resources.accuracy.gate_check import HARDEST_ROWS, SCREENING_ROWS
from resources.engines.onnxruntime.runner import OnnxRuntimeRunner
from resources.engines.precision.ladder import Operator
from resources.engines.precision.precision_search import Trials, open_gate_check
from tests.test_half import prepared


@pytest.fixture
def opened(made_checkpoint, sharing):
    """An gate_check of a small embedding model, and its exported graph, which answers as PyTorch does."""
    sources, goal = prepared(sharing, made_checkpoint())
    gate_check = open_gate_check(goal, sources)
    return gate_check, OnnxRuntimeRunner(sources.graph_folder / "model.onnx", sources.graph.output, threads=2).run


def screened(gate_check):
    """The rows harm is measured on, each as the tokens it has."""
    return [
        tuple(row[:count])
        for batch, tokens in gate_check.screening_batches()
        for row, count in zip(batch["input_ids"], tokens, strict=True)
    ]


def test_harm_is_measured_on_what_was_answered_worst(opened):
    gate_check, run = opened
    assert gate_check.misses(run) == []
    everywhere = screened(gate_check)
    assert len(everywhere) == SCREENING_ROWS + HARDEST_ROWS
    hard = sorted(
        {tuple(row[row > 0]) for batch in gate_check.calibration_batches() for row in batch["input_ids"]}
        - set(everywhere)
    )[:3]

    def spoiled(batch):
        answers = run(batch)
        for number, row in enumerate(batch["input_ids"]):
            if tuple(row[row > 0]) in hard:
                answers[number] *= -1
        return answers

    assert any("cosine_worst" in miss for miss in gate_check.misses(spoiled))
    chosen = screened(gate_check)
    assert set(hard) <= set(chosen)
    assert len(chosen) == SCREENING_ROWS + HARDEST_ROWS
    assert {len(row) for row in chosen} >= {len(everywhere[0]), len(everywhere[-1])}  # and of all lengths

    # The first engine is the one with everything in low precision; what the others miss is not what is searched for.
    assert gate_check.misses(lambda batch: -run(batch))
    assert screened(gate_check) == chosen


def test_the_ladder_measures_harm_on_what_missed_the_gates_before(opened):
    gate_check, run = opened
    hard = tuple(gate_check.calibration_batches()[3]["input_ids"][0])

    def running(reduced):
        def answers(batch):
            found = run(batch)
            for number, row in enumerate(batch["input_ids"]):
                # One does harm to that text alone, the other a little to all.
                found[number] *= -1 if "one" in reduced and tuple(row[row > 0]) == hard else 1
            return found + (0.01 * np.roll(found, 1, axis=1) if "other" in reduced else 0)

        return answers

    operators = [Operator(name, 32, 32, (name,)) for name in ("one", "other")]
    assert pytest.approx(harms(Trials(running, operators, gate_check)), abs=0.001) == (0.0, 0.01)
    trials = Trials(running, operators, gate_check)
    assert trials.misses([])
    one, other = harms(trials)
    assert one > 10 * other


def harms(trials):
    return trials.damage(["one"]), trials.damage(["other"])


def test_numbers_that_are_none_say_nothing_about_texts(opened):
    gate_check, run = opened
    before = screened(gate_check)
    assert "NaN" in gate_check.misses(lambda batch: np.full_like(run(batch), np.nan))[0]
    assert screened(gate_check) == before
