"""The champion is the best of the accurate engines by the catalog's objective, and every loser hears why."""

import math
from types import SimpleNamespace

import pytest

from resources.artifacts.records import Accuracy, BenchmarkReport, EvaluationSet, ShapeTiming
from resources.benchmark.champion import Served
from resources.benchmark.ranking import EQUAL, contest, judge, margin, require_champion, score, tell
from resources.benchmark.statistics import summarize
from resources.engines.specs import SERVED
from resources.errors import NoChampionError
from resources.triton import served
from tests.conftest import entry_for
from tests.making import make_champion


def timing(speedup, *, shape="1x16", memory=100):
    return ShapeTiming(
        shape=shape,
        baseline=summarize([10.0 * speedup] * 3, 1),
        candidate=summarize([10.0] * 3, 1),
        speedup=speedup,
        window_speedups=(speedup,),
        agreed=True,
        pairs=3,
        candidate_memory_bytes=memory,
        baseline_memory_bytes=400,
    )


def report(engine, *speedups, status="measured", size=50, memory=100, reason=""):
    return BenchmarkReport(
        digest=f"digest of {engine}",
        model="m",
        engine=engine,
        engine_digest=engine,
        baseline_digest="torch",
        evaluation_digest="e",
        target="cpu",
        status=status,
        reason=reason,
        accuracy=Accuracy(metrics={}, texts=1) if status == "measured" else None,
        timings=tuple(timing(value, memory=memory) for value in speedups),
        engine_size_bytes=size,
    )


def no_gates(_):
    return []


def unsteady(engine, *windows):
    """A report whose one shape had these ratios, window by window."""
    middle = sorted(windows)[len(windows) // 2]
    shape = timing(middle).model_copy(update={"window_speedups": windows})
    return report(engine, middle).model_copy(update={"timings": (shape,)})


@pytest.mark.parametrize(
    ("challenger", "served", "outcome"),
    [
        ((3.2, 3.2, 3.2), (3.0, 3.0, 3.0), "replaced"),
        ((3.1, 3.1, 3.1), (3.0, 3.0, 3.0), "equal"),  # measured well, but within what one engine differs from itself
        ((2.4, 3.2, 4.3), (3.0, 3.0, 3.0), "equal"),  # nobody knows
        ((2.9, 2.9, 2.9), (3.0, 3.0, 3.0), "equal"),
        ((2.5, 2.5, 2.5), (3.0, 3.0, 3.0), "slower"),
    ],
)
def test_what_serves_stays_unless_another_is_better_by_more_than_the_noise(challenger, served, outcome):
    reports = [unsteady("new", *challenger), unsteady(SERVED, *served)]
    verdicts = judge(reports, no_gates, "p50", 100, SERVED)
    assert verdicts[0].engine == ("new" if outcome == "replaced" else SERVED)
    met = contest(reports, verdicts, "p50", SERVED, release=7)
    assert (met.outcome, met.challenger, met.release) == (outcome, "new", 7)
    assert "release 7 serves" in tell(met)
    # Without a release it is the best that counts, by however little.
    assert judge(reports, no_gates, "p50", 100)[0].engine == max(reports, key=lambda one: one.timings[0].speedup).engine


def test_a_noisy_best_does_not_shield_what_serves_from_a_better_one():
    reports = [unsteady("noisy", 2.4, 4.0, 6.0), unsteady("sure", 3.5, 3.5, 3.5), unsteady(SERVED, 3.0, 3.0, 3.0)]
    verdicts = judge(reports, no_gates, "p50", 100, SERVED)
    assert [one.engine for one in verdicts] == ["sure", "noisy", SERVED]
    assert (
        "noisy with a score of 4.00 is not better than the engine that serves now by more than the noise"
        in verdicts[0].verdict
    )
    met = contest(reports, verdicts, "p50", SERVED, release=7)
    assert (met.outcome, met.challenger) == ("replaced", "sure")


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        # Student's quantiles for one chance in forty, of tables: 4.303 with 2 degrees of freedom, 2.262 with 9.
        ((1.0, math.e, math.e**2), math.exp(4.303 / 3**0.5)),
        ((1.0, math.e) * 5, math.exp(2.262 * (10 / 4 / 9 / 10) ** 0.5)),
        ((1.0, 1.0, 1.0), EQUAL),
    ],
)
def test_few_windows_know_their_own_noise_badly(windows, expected):
    assert margin(unsteady("a", *windows), unsteady("b", 1.0, 1.0, 1.0), "p50") == pytest.approx(expected, rel=0.02)


def test_of_a_single_sample_no_noise_is_known():
    once = timing(9.0).model_copy(
        update={"window_speedups": (), "baseline": summarize([90.0], 1), "candidate": summarize([10.0], 1)}
    )
    lucky = report("new", 9.0).model_copy(update={"timings": (once,)})
    reports = [lucky, unsteady(SERVED, 3.0, 3.0, 3.0)]
    assert judge(reports, no_gates, "p50", 100, SERVED)[0].engine == SERVED


def test_accuracy_comes_before_what_serves():
    reports = [report("new", 2.0), report(SERVED, 3.0)]
    verdicts = judge(reports, lambda item: ["too far off"] if item.engine == SERVED else [], "p50", 100, SERVED)
    met = contest(reports, verdicts, "p50", SERVED, release=1)
    assert (verdicts[0].engine, met.outcome) == ("new", "replaced")
    assert tell(met) == "The engine that release 1 serves is not accurate any more."
    verdicts = judge(reports, lambda item: ["too far off"] if item.engine == "new" else [], "p50", 100, SERVED)
    met = contest(reports, verdicts, "p50", SERVED, release=1)
    assert (verdicts[0].engine, met.outcome, met.challenger) == (SERVED, "inaccurate", None)
    assert "stays: no new engine is accurate" in tell(met)


def test_bytes_have_no_noise():
    small, large = unsteady("small", 1.0, 2.0, 4.0), unsteady("large", 1.0, 2.0, 4.0)
    assert margin(small, large, "size") == EQUAL
    assert margin(small, large, "p50") > 2


def test_best_geometric_mean_wins_over_best_single_shape():
    verdicts = judge([report("spiky", 9.0, 0.5), report("steady", 3.0, 3.0)], no_gates, "p50", 100)
    assert [(v.engine, v.eligible) for v in verdicts] == [("steady", True), ("spiky", True)]
    assert verdicts[0].score == pytest.approx(3.0)
    assert "2.12 times better than PyTorch where steady is 3.00 times better" in verdicts[1].verdict


def test_baseline_is_never_chosen_even_if_best():
    verdicts = judge([report("torch", 5.0), report("onnxruntime_fp32", 0.5)], no_gates, "p50", 100)
    assert require_champion("m", "cpu", verdicts).engine == "onnxruntime_fp32"


def test_inaccurate_and_unsupported_lose_with_their_reasons():
    def missed(item):
        return ["cosine_mean 0.9 is below 0.995"] if item.engine == "fast" else []

    reports = [
        report("fast", 9.0),
        report("slow", 2.0),
        report("gpu", status="skipped", reason="unsupported: needs an NVIDIA GPU"),
    ]
    verdicts = {v.engine: v for v in judge(reports, missed, "p50", 100)}
    assert verdicts["slow"].verdict.startswith("champion")
    assert "cosine_mean 0.9 is below" in verdicts["fast"].verdict
    assert "NVIDIA" in verdicts["gpu"].verdict
    assert not verdicts["fast"].eligible
    assert verdicts["gpu"].score is None


def test_no_accurate_engine_is_an_error_that_names_all_reasons():
    verdicts = judge([report("torch", 1.0), report("a", 2.0)], lambda _: ["NaN in the answers"], "p50", 100)
    with pytest.raises(NoChampionError, match=r"(?s)m: no engine for cpu.*a: not accurate enough: NaN"):
        require_champion("m", "cpu", verdicts)
    with pytest.raises(NoChampionError, match="nothing was measured"):
        require_champion("m", "cpu", [])


@pytest.mark.parametrize(("objective", "expected"), [("p50", 2.0), ("p90", 2.0), ("memory", 8.0), ("size", 4.0)])
def test_objectives(objective, expected):
    assert score(report("a", 2.0, 2.0, size=25, memory=50), objective, 100) == pytest.approx(expected)


def test_objective_changes_the_winner():
    reports = [report("fast", 4.0, size=100), report("small", 2.0, size=10)]
    assert judge(reports, no_gates, "p50", 100)[0].engine == "fast"
    assert judge(reports, no_gates, "size", 100)[0].engine == "small"


EVALUATION = EvaluationSet(digest="e", model="tiny", items=1, rows=1, width=1, longest_tokens=1)


def without_gates(workspace):
    return entry_for(
        workspace.home, gates={"cosine_mean": 0.0, "cosine_worst": 0.0, "neighbours": 0.0, "norm_error": 9.0}
    )


def accurate(name, speed):
    metrics = {"cosine_mean": 1.0, "cosine_worst": 1.0, "neighbours": 1.0, "norm_error": 0.0}
    accuracy = Accuracy(metrics=metrics, gated=tuple(metrics), texts=1)
    return report(name, speed).model_copy(update={"accuracy": accuracy})


def test_what_serves_and_was_not_measured_is_not_replaced_in_silence(workspace):
    entry, seven = without_gates(workspace), Served(release=7, engine_digest=SERVED)
    new, broken = accurate("new", 2.0), report(SERVED, status="failed", reason="killed")
    for reports in ([new, broken], [new]):  # its benchmark failed, or was not part of the run
        record = make_champion(workspace, entry, "cpu", reports, EVALUATION, seven).record
        assert record.contest.outcome == "unmeasured"
        assert "release 7 serves could not be measured again" in record.reason


def test_what_serves_and_is_not_in_the_store_any_more_is_a_rival_all_the_same(workspace, monkeypatch):
    release = SimpleNamespace(number=7, checkpoint_digest="c", engine_digest="gone", engine="int8")
    monkeypatch.setattr(served, "current_release", lambda repository, model: release)
    incumbent = served.find_incumbent(workspace, workspace.store, "tiny", "cpu", SimpleNamespace(digest="c"), [])
    assert (incumbent.served, incumbent.engine) == (Served(7, "gone"), None)


def test_the_run_after_a_replacement_has_the_same_champion(workspace):
    entry = without_gates(workspace)
    new, old = accurate("new", 5.0), accurate(SERVED, 2.0)
    first = make_champion(workspace, entry, "cpu", [new, old], EVALUATION, Served(1, SERVED))
    assert first.record.contest.outcome == "replaced"
    again = make_champion(workspace, entry, "cpu", [new], EVALUATION, Served(2, "new"))
    assert (again.reused, again.record.digest) == (True, first.record.digest)
    # What stays is another choice each time that it is challenged.
    stays = make_champion(workspace, entry, "cpu", [accurate("new", 1.0), old], EVALUATION, Served(1, SERVED))
    assert stays.record.contest.outcome == "slower"


def test_an_engine_that_was_measured_after_all_is_judged_anew(workspace):
    entry, evaluation = without_gates(workspace), EVALUATION
    slow, fast = accurate("slow", 2.0), accurate("fast", 3.0)
    killed = report("fast", status="failed", reason="killed")
    assert killed.digest == fast.digest

    def champion(reports):
        return make_champion(workspace, entry, "cpu", reports, evaluation).record.engine

    assert champion([slow, killed]) == "slow"
    assert champion([slow, fast]) == "fast"
    # Three pairs of one shape: whoever reads the score is told.
    reason = make_champion(workspace, entry, "cpu", [slow, fast], evaluation).record.reason
    assert "only 3 pairs of samples" in reason
    many = tuple(one.model_copy(update={"pairs": 5}) for one in fast.timings)
    sure = [slow, fast.model_copy(update={"timings": many})]
    assert "pairs" not in make_champion(workspace, entry, "cpu", sure, evaluation).record.reason


@pytest.mark.parametrize(("ratio", "said"), [(1.2, False), (1.8, True), (0.4, True)])
def test_a_machine_on_which_pytorch_differs_from_itself_is_said_to_be_too_busy(workspace, ratio, said):
    reports = [report("torch", 1.0, ratio), accurate("new", 3.0)]
    reason = make_champion(workspace, without_gates(workspace), "cpu", reports, EVALUATION).record.reason
    assert ("two measurements of PyTorch differed by a factor" in reason) is said


def test_the_worse_of_two_ways_counts():
    import numpy as np

    from resources.accuracy.evaluation_set import Evaluation
    from resources.accuracy.inference import Answered
    from resources.accuracy.measuring import measure_accuracy
    from resources.tasks import TASKS

    random = np.random.default_rng(0)
    baseline = random.normal(size=(40, 8)).astype(np.float32)
    known = Evaluation([{"TEXT": str(number)} for number in range(40)], list(baseline), [None] * 40)
    wrong = baseline.copy()
    wrong[7] *= -2
    exact, harmed = Answered(list(baseline)), Answered(list(wrong))
    for ways in ((exact, harmed), (harmed, exact)):
        accuracy = measure_accuracy(TASKS["embedding"], {}, known, ways)
        assert accuracy.metrics["cosine_worst"] == pytest.approx(-1.0)
        assert accuracy.metrics["cosine_mean"] == pytest.approx(38 / 40)
        assert accuracy.metrics["norm_error"] == pytest.approx(1.0)
        assert accuracy.worst[0].text == "7"
    assert measure_accuracy(TASKS["embedding"], {}, known, (exact, exact)).metrics["cosine_worst"] == pytest.approx(1.0)
