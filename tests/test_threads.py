"""Thread settings: the rule that chooses, the order in which settings are tried, and a sweep over a real engine."""

import json
import time
from dataclasses import replace

import pytest

from resources.artifacts.records import Champion, ServingSetting, ThreadSetting, ThreadTrial
from resources.benchmark.threads import ThreadComparison, choose, sweep, thread_counts
from resources.catalog.entries import Shape
from resources.engines.specs import engine_spec
from resources.machine.device import physical_cores
from resources.processes.isolation import Limits, Worker
from resources.tracking.candidates import thread_parameters
from resources.triton.config import engine_config, front_config
from resources.triton.release import content_digest
from tests.conftest import entry_for
from tests.making import (
    collect_checkpoint,
    make_benchmark,
    make_champion,
    make_engine,
    make_evaluation_set,
    make_graph,
    sources_of,
)
from tests.releases import make_plan


@pytest.mark.parametrize(
    ("budget", "physical", "counts"),
    [
        (1, 1, (1,)),
        (2, 2, (2, 1)),
        (2, 1, (2, 1)),
        (12, 6, (12, 8, 6, 4, 2, 1)),
        (64, 32, (64, 32, 16, 8, 4, 2, 1)),
        (3, 32, (3, 2, 1)),  # the models file allows fewer than there are
    ],
)
def test_the_numbers_that_are_tried(budget, physical, counts):
    assert thread_counts(budget, physical) == counts


def setting(threads, *, asleep=False):
    return ThreadSetting(threads=threads, spinning=not asleep)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({setting(8): 1.0}, setting(8)),
        ({setting(8): 1.0, setting(4): 0.97}, setting(8)),
        ({setting(8): 1.0, setting(4): 0.99}, setting(4)),  # within the noise: leave half of the machine alone
        ({setting(8): 1.0, setting(4): 1.3, setting(2): 1.29, setting(1): 1.2}, setting(2)),
        ({setting(4): 1.0, setting(4, asleep=True): 0.99}, setting(4, asleep=True)),
        ({setting(4): 1.0, setting(4, asleep=True): 0.9}, setting(4)),
    ],
)
def test_the_fastest_wins_and_of_equal_ones_the_smallest(scores, chosen):
    assert choose([ThreadTrial(setting=one, score=score) for one, score in scores.items()]) == chosen


class Machine:
    """Stands in for measuring: a made-up time for each setting, the same at both shapes up to a factor."""

    def __init__(self, milliseconds, budget=99):
        self.milliseconds, self.budget, self.asked = milliseconds, budget, []

    def __call__(self, rival, challenger):
        if len(self.asked) == self.budget:
            return None
        self.asked.append((rival, challenger))
        ratio = self.milliseconds[rival] / self.milliseconds[challenger]
        return {"1x16": ratio * 1.25, "8x128": ratio / 1.25}


def test_a_sweep_goes_down_from_the_fastest_until_it_is_hopeless():
    machine = Machine({setting(16): 10, setting(8): 7, setting(4): 8, setting(2): 14, setting(8, asleep=True): 9})
    chosen, trials = sweep(thread_counts(16, 8), machine, can_sleep=True)
    assert chosen == setting(8)
    assert machine.asked == [
        (setting(16), setting(8)),
        (setting(8), setting(4)),
        (setting(8), setting(2)),  # 8 ms is within 15 percent of 7: it might still have got better
        (setting(8), setting(8, asleep=True)),
    ]
    assert [round(trial.score, 3) for trial in trials] == [1.0, 1.429, 1.25, 0.714, 1.111]
    assert trials[2].against == setting(8)
    assert trials[2].speedups == pytest.approx({"1x16": 7 / 8 * 1.25, "8x128": 7 / 8 / 1.25})


def test_equal_steps_do_not_add_up_to_a_slow_setting():
    """Each number is within the noise of the one before, and the last is not within it of the first."""
    machine = Machine({setting(8): 100, setting(4): 101.5, setting(2): 103, setting(1): 104.5})
    assert sweep((8, 4, 2, 1), machine, can_sleep=False)[0] == setting(4)


def test_threads_that_sleep_are_tried_with_the_number_that_won_alone():
    machine = Machine({setting(2): 10, setting(1): 19, setting(2, asleep=True): 8})
    assert sweep((2, 1), machine, can_sleep=True)[0] == setting(2, asleep=True)
    machine = Machine({setting(2): 10, setting(1): 6})
    assert sweep((2, 1), machine, can_sleep=True)[0] == setting(1)  # nobody waits for a single thread
    assert len(machine.asked) == 1


@pytest.mark.parametrize("comparisons", [0, 1])
def test_without_time_the_fastest_that_is_known_is_taken(comparisons):
    machine = Machine({setting(4): 10, setting(2): 5, setting(1): 2}, budget=comparisons)
    chosen, trials = sweep((4, 2, 1), machine, can_sleep=True)
    assert chosen == setting(4 if comparisons == 0 else 2)
    assert len(trials) == comparisons + 1


class SleepingProbe:
    """Stands in for an engine: sleeps as long as its number of threads and the batch say."""

    def __init__(self, seconds, threads):
        self._seconds, self._threads, self._rows = seconds, threads, 1

    def prepare(self, texts, rows, tokens):
        self._rows = rows

    def burst(self, warm, timed):
        samples = []
        for _ in range(warm + timed):
            started = time.perf_counter_ns()
            time.sleep(self._seconds * self._rows / self._threads)
            samples.append((time.perf_counter_ns() - started) / 1e6)
        return samples[warm:]

    def memory(self):
        return 0

    def runs(self):
        return 1


@pytest.fixture
def turns():
    started = []

    def make(seconds_a_row, seconds):
        def start(one):
            started.append(one)
            return Worker(SleepingProbe, seconds_a_row, one.threads, limits=Limits(timeout_s=60), what="probe")

        shapes = [Shape(batch=8, sequence=4), Shape(batch=1, sequence=4)]
        return ThreadComparison(start, [], shapes, seconds, comparisons=2), started

    return make


def test_settings_meet_in_turns_on_every_shape(turns):
    compared, started = turns(0.004, 3.0)
    with compared:
        found = compared(setting(4), setting(2))
        assert compared(setting(4), setting(1)) is not None
    assert sorted(found) == ["1x4", "8x4"]
    assert found["8x4"] == pytest.approx(0.5, rel=0.4)
    assert started == [setting(4), setting(2), setting(1)]  # the rival stays loaded


def test_what_does_not_fit_into_the_time_is_not_begun(turns):
    compared, started = turns(2.0, 1.5)
    with compared:
        assert compared(setting(4), setting(1)) is None
        assert compared(setting(4), setting(2)) is None
    assert started == [setting(4)]


def test_the_physical_cores_are_among_those_we_may_use():
    import os

    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))


def test_the_setting_goes_from_the_benchmark_to_the_release(made_checkpoint, sharing, tmp_path):
    """A real sweep over a real engine, bounded; its result is measured, chosen, tracked and written down."""
    entry = entry_for(made_checkpoint(), benchmark={"seconds": 4.0, "threads": 2})
    checkpoint = collect_checkpoint(entry, sharing.store, sharing.limits).record
    evaluation = make_evaluation_set(sharing, entry, checkpoint).record
    sources = sources_of(sharing, entry, checkpoint, make_graph(sharing, entry, checkpoint).record)
    baseline, engine = (
        make_engine(sharing, entry, engine_spec(name), "cpu", sources, evaluation).record
        for name in ("torch", "onnxruntime_fp32")
    )
    reports = [make_benchmark(sharing, entry, one, baseline, evaluation, sources).record for one in (baseline, engine)]
    assert reports[0].setting == setting(2)  # what a user of PyTorch gets
    assert reports[0].thread_trials == ()
    report = reports[1]
    assert report.status == "measured", report.reason
    assert report.threads == 2
    tried = [trial.setting for trial in report.thread_trials]
    assert tried[0] == setting(2)
    assert tried[1:2] in ([], [setting(1)])  # on a busy machine there may be no time for it
    assert all(set(trial.speedups) == {"1x16", "2x32"} for trial in report.thread_trials[1:])
    assert report.setting == choose(report.thread_trials)
    assert thread_parameters(report)["threads"] == report.setting.threads
    assert report.baseline_threads == 2
    # Written and read back.
    champion = make_champion(sharing, entry, "cpu", reports, evaluation).record
    assert champion.engine == "onnxruntime_fp32"
    assert champion.setting == report.setting
    assert Champion.model_validate(json.loads(champion.model_dump_json())) == champion
    # On one thread there is nothing to choose.
    alone = entry_for(made_checkpoint(), benchmark={"seconds": 1.0, "threads": 1})
    report = make_benchmark(sharing, alone, engine, baseline, evaluation, sources).record
    assert (report.setting, report.thread_trials) == (setting(1), ())


def test_a_release_is_configured_with_the_setting(tmp_path):
    plan = make_plan(tmp_path, serving=ServingSetting(threads=3, spinning=False))
    parameters = {name: value.string_value for name, value in front_config(plan, 1).parameters.items()}
    assert (parameters["threads"], parameters["spinning"]) == ("3", "false")
    native = engine_config(replace(plan, flavour="native"), 1).parameters
    assert native["intra_op_thread_count"].string_value == "3"
    assert content_digest(plan) != content_digest(replace(plan, serving=ServingSetting(threads=3)))
