"""The report of an optimization: what it says of the last one, what it draws, and that its page needs nothing else."""

import re

import pytest

from resources.artifacts.records import Accuracy
from resources.benchmark.ranking import judge
from resources.report.changes import changes
from resources.report.optimization import Before, Changes, Gate
from resources.report.page import page, render
from resources.report.pareto import Point, front, pareto_figure
from resources.report.plots import latency_plot
from tests.test_choosing import report, timing, unsteady
from tests.test_tracking import champion_of, optimization

GATES = (Gate(name="cosine_mean", bound="least", limit=0.995), Gate(name="norm_error", bound="most", limit=0.1))


def accurate(item, cosine=1.0, error=0.0, digest=""):
    metrics = {"cosine_mean": cosine, "norm_error": error}
    accuracy = Accuracy(metrics=metrics, gated=tuple(metrics), texts=3)
    return item.model_copy(update={"accuracy": accuracy, "digest": digest or item.digest})


def optimized(*reports, **fields):
    """An optimization whose gates decide."""

    def missed(one):
        return [gate.name for gate in GATES if not gate.kept_by(one.accuracy.metrics[gate.name])]

    verdicts = judge(reports, missed, "p50", 100)
    champion = champion_of(reports).model_copy(update={"engine": verdicts[0].engine, "verdicts": verdicts})
    return optimization("run", reports, champion, gates=GATES, **fields)


BEFORE = optimized(
    accurate(report("torch", 1.0)), accurate(unsteady("int8", 3.0, 3.0, 3.0), 0.998), accurate(report("gone", 2.0))
)


@pytest.mark.parametrize(
    ("now", "meaning"),
    [
        (unsteady("int8", 3.1, 3.1, 3.1), "within the noise, a factor of 1.05"),  # measured well, but seldom
        (unsteady("int8", 3.0, 4.0, 5.3), "within the noise, a factor of 2.02"),  # it differs from itself as much
        (unsteady("int8", 4.5, 4.5, 4.5), "1.50 times, more than the noise, a factor of 1.05"),
        (unsteady("int8", 2.0, 2.0, 2.0), "0.67 times, more than the noise, a factor of 1.05"),
    ],
)
def test_a_score_that_changed_is_told_with_the_noise(now, meaning):
    after = optimized(accurate(report("torch", 1.0)), accurate(now, 0.998, digest="new"))
    rows = {row[0]: row for row in changes(BEFORE, after).candidates}
    assert rows["int8"] == ("int8", "3.00", f"{after.scores['int8']:.2f}", meaning, "the same")
    assert rows["torch"][3] == "not measured again"
    assert rows["gone"][1:4] == ("2.00", "–", "not measured this time")


def test_what_was_given_is_compared_and_only_differences_are_told():
    reports = (accurate(report("torch", 1.0)), accurate(unsteady("int8", 3.0, 3.0, 3.0), 0.998))
    after = optimized(
        *(item.model_copy(update={"digest": "new"}) for item in reports[:1]),
        accurate(unsteady("int8", 3.0, 3.0, 3.0), 0.9965, digest="new"),
        accurate(report("fresh", 9.0)),
        revision="another",
        libraries={"torch": "2.14.0", "onnx": "1.23.2"},
        configuration={},
    )
    told = changes(BEFORE, after)
    assert told.inputs == (
        ("revision", "abcdef", "another"),
        ("torch", "2.13.0", "2.14.0"),
        ("onnx", "–", "1.23.2"),
        ("threads", "2", "–"),
        ("champion", "int8", "fresh"),
    )
    rows = {row[0]: row for row in told.candidates}
    assert rows["int8"][4] == "cosine_mean 0.9980 → 0.9965"
    assert rows["fresh"][1:4] == ("–", "9.00", "new")
    assert changes(BEFORE, BEFORE).inputs == ()
    # Of one revision, other requests are another evaluation set, be they as many.
    asked = BEFORE.champion.model_copy(update={"evaluation_digest": "other requests"})
    assert changes(BEFORE, BEFORE.model_copy(update={"champion": asked, "task": "classification"})).inputs == (
        ("task", "embedding", "classification"),
        ("evaluation set", "evaluation", "other reques"),
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([("a", 1.0, 1.0), ("b", 0.9, 3.0), ("c", 0.95, 2.0)], ["a", "c", "b"]),
        ([("a", 1.0, 1.0), ("b", 1.0, 2.0)], ["b"]),  # as accurate, and faster
        ([("a", 0.9, 2.0), ("b", 0.99, 2.0)], ["b"]),  # as fast, and more accurate
        ([("a", 0.9, 1.0), ("b", 0.9, 1.0)], ["a"]),
    ],
)
def test_the_front_holds_what_none_beats(points, expected):
    assert [point.engine for point in front([Point(*one) for one in points])] == expected


def test_an_engine_far_from_its_gate_does_not_hide_the_others():
    """It is drawn at the edge, hollow, and its figure is written beside it."""
    whole = optimized(
        accurate(report("torch", 1.0)), accurate(report("good", 2.0), 0.999), accurate(report("broken", 5.0), 0.2)
    )
    cosine, error = pareto_figure(whole).axes
    drawn = {line.get_label(): line for line in cosine.lines}
    broken, good = drawn["broken (not accurate)"], drawn["good (champion)"]
    assert (broken.get_xdata()[0], broken.get_ydata()[0]) == pytest.approx((0.985, 5.0))
    assert (good.get_xdata()[0], good.get_ydata()[0]) == pytest.approx((0.999, 2.0))
    assert (broken.get_markerfacecolor(), good.get_markerfacecolor() == "white") == ("white", False)
    assert [text.get_text() for text in cosine.texts] == ["  ← 0.2"]
    assert list(drawn["beaten by none"].get_ydata()) == pytest.approx([1.0, 2.0, 5.0, 5.0])
    # Errors run backwards, so that better is to the right there too.
    assert error.get_xlim()[0] > error.get_xlim()[1]


def test_a_metric_that_no_engine_has_costs_its_panel_alone():
    nan = float("nan")
    figure = pareto_figure(optimized(accurate(report("torch", 1.0), error=nan), accurate(report("a", 2.0), error=nan)))
    cosine, error = figure.axes
    assert (len(cosine.lines), len(error.lines)) == (4, 1)  # the gate's line alone
    figure.canvas.draw()


def test_an_engine_has_one_marker_in_every_panel():
    whole = optimized(
        accurate(report("torch", 1.0)),
        accurate(report("broken", 5.0), float("nan")),
        accurate(report("good", 2.0)),
    )
    markers = [
        next(line.get_marker() for line in axes.lines if line.get_label().startswith("good"))
        for axes in pareto_figure(whole).axes
    ]
    assert len(set(markers)) == 1


def test_bars_stand_at_their_shape_in_whatever_order_it_was_measured(monkeypatch):
    from matplotlib.axes import Axes

    places = {}
    bar = Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda axes, at, *rest, label, **how: places.update({label: at}) or bar(axes, at, *rest, **how)
    )
    one, other = report("torch", 1.0, 1.0), report("int8", 2.0, 2.0)
    there = [timing(1.0, shape="1x16"), timing(1.0, shape="8x128")]
    one, other = (
        item.model_copy(update={"timings": tuple(timings)}) for item, timings in ((one, there), (other, there[::-1]))
    )
    assert latency_plot([one, other], "title")
    assert [round(place) for place in places["torch"]] == [0, 1]
    assert [round(place) for place in places["int8"]] == [1, 0]


def test_many_engines_and_long_names_stay_in_the_picture():
    """No wider than a page, and with all of the title and of the legend in it."""
    engines = [f"engine_{number}_of_a_long_name" for number in range(12)]
    shapes = [f"{batch}x{tokens}" for batch in (1, 2, 4, 8, 16) for tokens in (16, 64, 128, 512)]
    reports = [
        report(name).model_copy(update={"timings": tuple(timing(2.0, shape=shape) for shape in shapes)})
        for name in engines
    ]
    png = latency_plot(reports, "a title")
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert width < 1400 < height
    whole = optimized(accurate(report("torch", 1.0)), accurate(report("good", 2.0), 0.999), device="a device " * 20)
    figure = pareto_figure(whole)
    figure.canvas.draw()
    title, (legend,) = figure.get_suptitle(), figure.legends
    assert max(map(len, title.split("\n"))) < 100
    assert figure._suptitle.get_window_extent().x1 < legend.get_window_extent().x0


def test_nothing_to_draw_is_no_picture():
    assert pareto_figure(optimization("run", [report("torch", 1.0), report("int8", 2.0)])) is None


def test_the_page_needs_no_script_and_no_other_file():
    """MLflow shows it in a frame that may do nothing."""
    before = Before(run_id="r", url="http://mlflow/#/r", changes=Changes())
    whole = optimized(
        accurate(report("torch", 1.0)),
        accurate(report("good", 2.0), 0.999),
        accurate(report("bad", 5.0), 0.99, 0.2),
        report("gpu", status="skipped", reason="needs <a GPU> & a driver"),
        before=before,
    )
    files = render(whole, {"latency.png": b"drawn before"})
    html = files["report.html"].decode()
    assert set(re.findall(r'src="([^"]{0,22})', html)) == {"data:image/png;base64,"}
    assert "<script" not in html
    assert "href=" not in html
    assert "needs &lt;a GPU&gt; &amp; a driver" in html
    assert "0.99000 ✗" in html
    assert "0.99900 ✓" in html
    assert "0.20000 ✗" in html
    assert "The same checkpoint, libraries, device and configuration, and the same champion." in html
    assert files["pareto.png"].startswith(b"\x89PNG")
    assert files["latency.png"] == b"drawn before"
    assert "ZHJhd24gYmVmb3Jl" in html  # that, in base64
    assert "no run of this model for this target was finished before" in page(
        whole.model_copy(update={"before": None}), {}
    )
