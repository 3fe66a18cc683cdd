"""The ladder finds the operators that do the harm, leaves no more than it must, and keeps to its budget."""

import pytest

from resources.engines.precision.ladder import Operator, search

#: Six layers of four parts, as in BERT.
PARTS = {"self": (32, 96), "output": (32, 32), "up": (32, 64), "down": (64, 32)}
OPERATORS = [
    Operator(f"layer.{layer}.{part}", rows, columns, (f"node_{layer}_{part}",))
    for layer in range(6)
    for part, (rows, columns) in PARTS.items()
]
NAMES = [operator.name for operator in OPERATORS]


class Model:
    """Errors of operators that add up in squares; the gate is on their sum."""

    def __init__(self, harms, limit):
        self.harms = {name: harms.get(name, 0.001) for name in NAMES}
        self.limit = limit
        self.trials = 0

    def damage(self, quantized):
        self.trials += 1
        return sum(self.harms[name] ** 2 for name in quantized) ** 0.5

    def misses(self, kept):
        value = self.damage([name for name in NAMES if name not in kept])
        return [f"error {value:.3f} is above {self.limit}"] if value > self.limit else []

    def search(self, trials=24, seconds=60.0):
        return search(OPERATORS, self.damage, self.misses, trials=trials, seconds=seconds)


def test_nothing_is_kept_where_nothing_is_missed():
    model = Model({}, limit=0.1)
    outcome = model.search()
    assert (outcome.kept, outcome.passed, model.trials) == ((), True, 1)


@pytest.mark.parametrize("trials", [24, 48])
@pytest.mark.parametrize("guilty", NAMES)
def test_the_one_that_does_the_harm_is_found(guilty, trials):
    outcome = Model({guilty: 0.5}, limit=0.1).search(trials)
    assert outcome.passed
    assert outcome.kept == (guilty,)


def test_a_part_of_every_layer_is_found():
    guilty = [name for name in NAMES if name.endswith("down")]
    outcome = Model(dict.fromkeys(guilty, 0.3), limit=0.1).search()
    assert outcome.passed
    assert sorted(outcome.kept) == sorted(guilty)


def test_no_more_are_kept_than_needed():
    # 0.3 from each: four of the six have to go, and two may stay.
    guilty = [name for name in NAMES if name.endswith("down")]
    model = Model(dict.fromkeys(guilty, 0.3), limit=0.43)
    outcome = model.search()
    assert outcome.passed
    assert 4 <= len(outcome.kept) <= 5
    assert set(outcome.kept) < set(guilty)
    assert model.misses(outcome.kept) == []


def test_cheap_operators_are_kept_rather_than_dear_ones():
    outcome = Model({"layer.1.self": 0.3, "layer.1.output": 0.3}, limit=0.31).search()
    assert outcome.kept == ("layer.1.output",)


def test_each_is_tried_alone_where_the_budget_allows():
    # By their sets the two would hide: each is small beside the rest of its half.
    guilty = {"layer.0.down": 0.2, "layer.5.self": 0.2}
    model = Model({**dict.fromkeys(NAMES, 0.1), **guilty}, limit=0.48)
    outcome = model.search(trials=48)
    assert outcome.passed
    alone = [step for step in outcome.steps if step.startswith("only ")]
    assert [step.split()[1] for step in alone] == NAMES
    assert set(outcome.kept) == set(guilty)


def test_what_cannot_be_rescued_says_so():
    model = Model(dict.fromkeys(NAMES, 0.5), limit=0.1)
    outcome = model.search()
    assert (outcome.kept, outcome.passed) == ((), False)
    assert outcome.steps[-1].startswith("not rescued")


@pytest.mark.parametrize("trials", [0, 1, 3, 7, 24])
def test_the_budget_of_trials_is_kept(trials):
    model = Model(dict.fromkeys(NAMES[::5], 0.3), limit=0.1)
    outcome = model.search(trials=trials)
    assert model.trials <= trials + 1
    assert outcome.passed or outcome.kept == ()
    assert not outcome.passed or model.misses(outcome.kept) == []


def test_the_budget_of_seconds_is_kept():
    model = Model({NAMES[3]: 0.5}, limit=0.1)
    outcome = model.search(seconds=0.0)
    assert model.trials <= 1
    assert not outcome.passed
    assert "is spent" in outcome.steps[-1]


def test_every_trial_is_in_the_record():
    model = Model({"layer.2.down": 0.5}, limit=0.1)
    outcome = model.search()
    assert len(outcome.steps) == model.trials
    assert outcome.steps[0].startswith("everything in low precision: error 0.50")
    assert outcome.steps[-1] == "layer.2.down in higher precision: every gate is kept"


def test_harm_without_bounds_is_bisected_like_any_other():
    harms = {"layer.0.down": float("inf"), "layer.5.down": float("inf")}
    outcome = Model(harms, limit=0.1).search()
    assert outcome.passed
    assert set(outcome.kept) == set(harms)
