"""The plot of speed against accuracy, with the engines that no other engine beats in both."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resources.benchmark.ranking import OBJECTIVES
from resources.engines.specs import BASELINE
from resources.report.optimization import Gate, OptimizationReport
from resources.report.plots import colour_of, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Each engine has its own marker, so that colour is never the only difference between two engines.
_MARKERS = "osD^vPXhp<>d"
#: How far below its gate a metric is shown, in distances from the gate to perfect answers. Values further out are drawn
#: at the edge, because one broken engine would otherwise press all others into a line.
_SHOWN = 2.0
_PANELS = 4
#: Accuracies are compared to this many digits. Smaller differences come from the rounding of sums, and do not justify a
#: slower engine.
_DIGITS = 5
_LINES = "#444444"
_COLUMNS = 2


@dataclass(frozen=True)
class Point:
    """One engine in the plot.

    Args:
        engine: The engine's name.
        accuracy: A metric's value, negated for errors so that more is better.
        score: How many times better than PyTorch the engine is.
    """

    engine: str
    accuracy: float
    score: float


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats, the most accurate first.

    A point beats another if it is at least as good in accuracy and score, and better in one of them.
    """
    best = sorted(points, key=lambda point: (-point.accuracy, -point.score))
    found: list[Point] = []
    for point in best:
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def pareto_plot(report: OptimizationReport) -> bytes | None:
    """Draw `pareto_figure` as a PNG. The result is None if there is no figure."""
    figure = pareto_figure(report)
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def pareto_figure(report: OptimizationReport) -> Figure | None:
    """Draw the score against the accuracy, with one panel for each of the first four gated metrics.

    Better engines are always further up and to the right. The gate is a line, engines that miss any gate are hollow,
    and the champion has a ring. The result is None if no engine or no gate can be drawn.
    """
    measured = [
        one
        for one in report.reports
        if one.accuracy is not None and one.accuracy.metrics and one.engine in report.scores
    ]
    gates = report.gates[:_PANELS]
    if not measured or not gates:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(gates))
    lines = -(-len(gates) // columns)
    width = 4.4 * columns + 2.4
    figure = Figure(figsize=(width, 3.1 * lines + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]  # A constrained layout takes it.
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    engines = [one.engine for one in measured if one.engine != BASELINE]
    markers = {engine: _MARKERS[place % len(_MARKERS)] for place, engine in enumerate(engines)}
    for axes, gate in zip(panels, gates, strict=False):
        points: list[Point] = []
        for one in measured:
            assert one.accuracy is not None
            value = one.accuracy.metrics.get(gate.name, math.nan)
            if math.isfinite(value):
                turned = round(value if gate.bound == "least" else -value, _DIGITS)
                points.append(Point(one.engine, turned, report.scores[one.engine]))
        _draw(axes, gate, points, report, markers)
    for axes in panels[len(gates) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("times better than PyTorch")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(
        f"{wrapped(report.title, width - 3.0)}\n{OBJECTIVES[report.objective]} against accuracy", fontsize=10
    )
    return figure


def _draw(
    axes: Axes, gate: Gate, points: Sequence[Point], report: OptimizationReport, markers: Mapping[str, str]
) -> None:
    """Draw one panel.

    An error has a gate that bounds it from above. Its axis runs backwards, so that better values are to the right.
    `markers` holds each engine's marker by the engine's name.
    """
    from matplotlib.ticker import MaxNLocator

    turned = 1 if gate.bound == "least" else -1
    best, limit = turned * gate.best, turned * gate.limit
    values = [point.accuracy for point in points]
    lowest = min([*values, limit])
    if limit < best:
        lowest = max(lowest, limit - _SHOWN * (best - limit))
    room = 0.08 * ((max([*values, best]) - lowest) or 1.0)
    left, right = lowest - room, max([*values, best]) + room
    axes.set_xlim(turned * left, turned * right)
    axes.axvline(gate.limit, color=_LINES, linewidth=1, linestyle="--")
    steps = [(turned * max(point.accuracy, lowest), point.score) for point in front(points)]
    if steps:  # There are no steps if the metric is NaN for all engines.
        steps.append((turned * left, steps[-1][1]))
        axes.step(*zip(*steps, strict=True), where="post", color="#bbbbbb", zorder=1, label="beaten by none")
        axes.set_ylim(0, 1.15 * max(point.score for point in points))
    for point in points:
        place = turned * max(point.accuracy, lowest), point.score
        inaccurate, champion = point.engine in report.inaccurate, point.engine == report.champion.engine
        marker = markers.get(point.engine, "x")
        colour = colour_of(point.engine)
        label = point.engine + (" (not accurate)" if inaccurate else " (champion)" if champion else "")
        face = "white" if inaccurate else colour
        axes.plot(*place, marker, color=colour, markerfacecolor=face, markersize=7, zorder=3, label=label)
        if champion:
            axes.scatter(*place, s=190, facecolor="none", edgecolor=_LINES, linewidth=1.2, zorder=2)
        if point.accuracy < lowest:
            axes.annotate(f"  ← {turned * point.accuracy:.3g}", place, ha="left", va="center", fontsize=7, color=colour)
    axes.set_title(f"{gate.name.replace('_', ' ')}, gate {gate}", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
