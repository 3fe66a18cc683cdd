"""Plots of the measurements as PNG files. Dagster, MLflow and the report show the same plots."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resources.artifacts.fingerprint import code_version, fingerprint
from resources.artifacts.records import BenchmarkReport, LengthProfile, ServingReport
from resources.engines.specs import BASELINE
from resources.report.tables import milliseconds
from resources.storage.atomic import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind people can tell apart. No
#: two engines of one target have the same colour.
_COLOURS = {
    "torch": "#8c8c8c",
    "onnxruntime_fp32": "#0072b2",
    "onnxruntime_int8": "#009e73",
    "onnxruntime_int8_static": "#e69f00",
    "openvino_fp32": "#cc79a7",
    "onnxruntime_fp16": "#56b4e9",
    "onnxruntime_bf16": "#009e73",
    "onnxruntime_tensorrt_fp16": "#e69f00",
    "tensorrt_fp16": "#cc79a7",
    "tensorrt_bf16": "#b8a800",
    "tensorrt_int8": "#7a4b00",
    "tensorrt_fp8": "#3d3d3d",
    "served": "#d55e00",
}


#: A bar's figures must fit above it, and a row of bars must fit the width of a page. More shapes make more rows.
_BAR_INCHES, _WIDEST_INCHES = 0.4, 12.0
_LEGEND_COLUMNS = 4
_LETTERS_AN_INCH = 11


def colour_of(engine: str) -> str:
    """Return the engine's colour, which is the same in every plot."""
    return _COLOURS.get(engine, "#000000")


def load_plot(report: ServingReport, title: str) -> bytes:
    """Draw latency by throughput as a PNG, with a median and a 99th percentile for each number of clients."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for tool, marker in (("tritonclient", "o"), ("perf_analyzer", "s")):
        levels = [level for level in report.levels if level.tool == tool]
        if not levels:
            continue
        rates = [level.throughput_per_s for level in levels]
        for name, values, colour in (
            ("p99", [level.p99_ms for level in levels], "#d55e00"),
            ("p50", [level.p50_ms for level in levels], "#0072b2"),
        ):
            axes.plot(rates, values, marker=marker, color=colour, label=f"{name}, {tool}")
        for level in levels:
            many = f"{level.clients} client{'' if level.clients == 1 else 's'}"
            place, offset = (level.throughput_per_s, level.p99_ms), (0, 6)
            how = "offset points"
            axes.annotate(many, place, offset, textcoords=how, ha="center", va="bottom", fontsize=7)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_xlabel("requests a second")
    axes.set_ylabel("latency, ms")
    axes.set_title(wrapped(title, figure.get_figwidth()), fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def remembered(caches: Path, digest: str, draw: Callable[[], bytes | None], what: str = "plot") -> bytes | None:
    """Return the plot of the record with that digest, and draw it only once.

    The import of matplotlib takes longer than the rest of a run that changes nothing, so the plot is kept in a file.

    Args:
        caches: The workspace's folder for caches.
        digest: The digest of the record.
        draw: Draws the plot, or returns None if there is nothing to draw.
        what: The name of the plot, where a record has several.
    """
    code = code_version("resources.report")
    path = caches / "plots" / f"{fingerprint(what, record=digest, code=code)[:32]}.png"
    if path.is_file():
        return path.read_bytes()
    plot = draw()
    if plot is not None:
        write_whole(path, plot)
    return plot


def latency_plot(reports: Sequence[BenchmarkReport], title: str, inaccurate: Collection[str] = ()) -> bytes | None:
    """Draw the median latency by shape as a PNG, or return None without timings.

    The scale is logarithmic, and the whiskers reach to the 90th percentile.

    Args:
        reports: The reports on the engines.
        title: The title of the plot.
        inaccurate: The engines that are marked as not accurate, because their speed is then worth nothing.
    """
    measured = [report for report in reports if report.timings]
    if not measured:
        return None
    # The object interface is used because pyplot never releases its figures and its backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Different reports may have the same shapes in a different order.
    shapes = list(dict.fromkeys(timing.shape for report in measured for timing in report.timings))
    in_a_row = max(1, int((_WIDEST_INCHES - 1.0) / (_BAR_INCHES * len(measured))))
    parts = [shapes[start : start + in_a_row] for start in range(0, len(shapes), in_a_row)]
    inches = max(8.0, 1.0 + _BAR_INCHES * len(measured) * len(parts[0]))
    # The legend is below all panels. Above the bars of one panel it would hide another panel's figures.
    legend_lines = -(-len(measured) // _LEGEND_COLUMNS)
    height = 3.4 * len(parts) + 0.25 * legend_lines
    figure = Figure(figsize=(inches, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(parts), squeeze=False, sharey=True).flatten()
    for axes, part in zip(panels, parts, strict=True):
        _draw_bars(axes, part, measured, inaccurate)
    panels[-1].set_xlabel("batch x tokens")
    figure.suptitle(wrapped(title, inches), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_bars(
    axes: Axes, shapes: Sequence[str], measured: Sequence[BenchmarkReport], inaccurate: Collection[str]
) -> None:
    """Draw one row of shapes, with a bar for each engine that was measured at a shape."""
    from matplotlib.ticker import LogFormatter

    width = 0.8 / len(measured)
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(LogFormatter())  # It writes 6 where the default formatter writes 6 x 10^0.
    for number, report in enumerate(measured):
        timings = [timing for timing in report.timings if timing.shape in shapes]
        offset = (number - (len(measured) - 1) / 2) * width
        places = [shapes.index(timing.shape) + offset for timing in timings]
        whiskers = [timing.candidate.p90_ms - timing.candidate.p50_ms for timing in timings]
        axes.bar(
            places,
            [timing.candidate.p50_ms for timing in timings],
            width * 0.92,
            yerr=[[0.0] * len(whiskers), whiskers],
            label=f"{report.engine} (not accurate)" if report.engine in inaccurate else report.engine,
            hatch="///" if report.engine in inaccurate else None,
            edgecolor="white",
            linewidth=0,
            color=colour_of(report.engine),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for place, timing in zip(places, timings, strict=True):
            text = milliseconds(timing.candidate.p50_ms)
            if report.engine != BASELINE:
                text += f"\n{timing.speedup:.1f}×"
            axes.annotate(text, (place, timing.candidate.p90_ms), ha="center", va="bottom", fontsize=7)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("p50 latency, ms (to p90)")
    axes.spines[["top", "right"]].set_visible(False)


def wrapped(title: str, inches: float) -> str:
    """Break a title of ten points into lines that fit a figure of that width.

    Titles need this because the names of models and devices are long.
    """
    return textwrap.fill(title, int(inches * _LETTERS_AN_INCH))


def length_plot(lengths: LengthProfile, title: str) -> bytes:
    """Draw the distribution of the rows' lengths in tokens as a PNG, with the buckets that rows are padded to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens, rows = zip(*lengths.counts, strict=True)
    longest = lengths.bucket(tokens[-1])
    step = max(1, -(-longest // 64))
    axes.hist(tokens, bins=range(0, longest + step, step), weights=rows, color="#0072b2")
    for bucket in lengths.buckets:
        if bucket <= longest:
            axes.axvline(bucket, color="#d55e00", linewidth=1, linestyle="--")
            axes.annotate(f" {bucket}", (bucket, axes.get_ylim()[1]), ha="left", va="top", fontsize=7, color="#d55e00")
    axes.set_xlabel("tokens a row; dashed: what rows are padded to")
    axes.set_ylabel("rows")
    axes.set_title(wrapped(title, figure.get_figwidth()), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
