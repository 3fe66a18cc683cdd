"""The report as an HTML page: one file that contains its pictures.

The page has no script, because MLflow shows it in a frame without rights.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from resources.artifacts.records import BenchmarkReport
from resources.benchmark.ranking import OBJECTIVES
from resources.report.optimization import OptimizationReport
from resources.report.pareto import pareto_plot
from resources.report.plots import latency_plot, length_plot, load_plot
from resources.report.tables import candidate_table, load_table, markdown, milliseconds, tail, trial_table

PAGE = "report.html"
#: The data of the page, see resources.report.optimization.
DATA = "report.json"
PARETO, LATENCY, LENGTHS, LOAD = "pareto.png", "latency.png", "lengths.png", "load.png"
#: A cell of at most this many characters is not broken into lines.
_SHORT = 24
#: A picture is shown at no less than this share of its own width, and scrolls below that. Its labels must stay
#: readable.
_SMALLEST = 0.65
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 1.5em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { font-size: 13px; border-collapse: collapse; margin: .8em 0; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25em .8em .25em 0; vertical-align: top; border-bottom: 1px solid #eee; }
td { font-variant-numeric: tabular-nums; } .figure { white-space: nowrap; }
.picture { overflow-x: auto; } img { max-width: 100%; } summary { color: #666; }
.champion td { font-weight: 600; background: #f2f7fb; } .missed { color: #b34700; } .aside { color: #666; }
"""


def render(report: OptimizationReport, known: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a report by name: the page, its pictures, the table of candidates as text, and the data.

    Args:
        report: The data of the report.
        known: Pictures that are drawn already, by name. Drawing one picture takes as long as the rest of a report.
    """
    draw: dict[str, Callable[[], bytes | None]] = {
        LATENCY: lambda: latency_plot(report.reports, report.title, report.inaccurate),
        PARETO: lambda: pareto_plot(report),
        LENGTHS: lambda: _length_picture(report),
        LOAD: lambda: _load_picture(report),
    }
    pictures = {name: known[name] if name in known else drawing() for name, drawing in draw.items()}
    drawn = {name: png for name, png in pictures.items() if png is not None}
    return {
        PAGE: page(report, drawn).encode(),
        DATA: report.model_dump_json(indent=1).encode(),
        "candidates.md": markdown(*candidate_table(report.reports, report.champion.verdicts)).encode(),
        **drawn,
    }


def page(report: OptimizationReport, pictures: dict[str, bytes]) -> str:
    """Return the page as HTML.

    Args:
        report: The data of the report.
        pictures: The PNG pictures by name, as `render` draws them.
    """
    body = "\n".join(_sections(report, pictures))
    title = escape(f"{report.model} on {report.target}, revision {report.revision[:12]}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _sections(report: OptimizationReport, pictures: dict[str, bytes]) -> Iterator[str]:
    yield f"<p><strong>{escape(report.champion.reason)}</strong></p>"
    yield _facts(report)
    yield "<h2>Latency by shape and engine</h2>"
    yield _picture(pictures, LATENCY, "median latency by shape and engine, to the 90th percentile")
    yield _table(*_latency_rows(report), champion=report.champion.engine)
    yield _aside(
        "p99: the maximum (≤) where there are too few samples for one. × PyTorch: times faster, the median over pairs, "
        "for each engine has taken turns with a PyTorch of its own. Memory: the peak above the bare process."
    )
    yield f"<h2>Accuracy on {report.evaluation_items} requests</h2>"
    yield _accuracy(report)
    yield "<h2>Speed against accuracy</h2>"
    yield _picture(pictures, PARETO, "speed against accuracy, with the engines that are beaten by none")
    yield _aside(
        f"Up is better by {OBJECTIVES[report.objective]}, to the right is more accurate. Dashed: the gates. Hollow: "
        "misses one, here or in another panel. In a ring: the champion."
    )
    if report.lengths is not None:
        yield "<h2>Lengths</h2>"
        yield _picture(pictures, LENGTHS, "rows by tokens")
    if report.serving is not None or report.load is not None or report.release is not None:
        yield "<h2>Serving</h2>"
        yield from _serving(report, pictures)
    yield "<h2>What changed since the last run</h2>"
    yield from _changes(report)
    yield "<h2>Given</h2>"
    given = {**report.configuration, **report.libraries}
    yield _table(["", ""], [[name, value] for name, value in given.items()])


def _facts(report: OptimizationReport) -> str:
    facts = {
        "checkpoint": f"{report.source} at {report.revision}",
        "task": report.task,
        "device": report.device,
        "objective": OBJECTIVES[report.objective],
        "Triton release": str(report.release) if report.release is not None else "",
        # The address is text and not a link, because MLflow's frame opens no other page.
        "Dagster run": report.dagster_url or report.dagster_run,
    }
    return _table(["", ""], [[name, value] for name, value in facts.items() if value])


def _latency_rows(report: OptimizationReport) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row for each shape and engine, with the shapes in the order of the reports."""
    rows = []
    shapes = dict.fromkeys(timing.shape for one in report.reports for timing in one.timings)
    for shape in shapes:
        for one in report.reports:
            for timing in one.timings:
                if timing.shape != shape:
                    continue
                latency = timing.candidate
                middle = [milliseconds(value) for value in (latency.p50_ms, latency.p90_ms)]
                spread = f"{milliseconds(latency.mean_ms)} ± {milliseconds(latency.std_ms)}"
                figures = [*middle, tail(latency), spread, f"{timing.speedup:.2f}", f"{latency.throughput_per_s:.1f}"]
                rows.append([shape, one.engine, *figures, f"{timing.candidate_memory_bytes / 1e6:.0f}"])
    header = ["shape", "engine", "p50 ms", "p90 ms", "p99 ms", "mean ± std ms", "× PyTorch", "rows/s", "memory MB"]
    return header, rows


def _accuracy(report: OptimizationReport) -> str:
    gates = {gate.name: gate for gate in report.gates}
    measured = [one for one in report.reports if one.accuracy is not None]
    others = dict.fromkeys(name for one in measured if one.accuracy for name in one.accuracy.metrics)
    names = [*gates, *(name for name in others if name not in gates)]
    head = "".join(
        f"<th>{escape(name.replace('_', ' '))}{f'<br>{escape(str(gates[name]))}' if name in gates else ''}</th>"
        for name in names
    )
    lines = []
    verdicts = {verdict.engine: verdict.verdict for verdict in report.champion.verdicts}
    for one in measured:
        assert one.accuracy is not None
        cells = []
        for name in names:
            value = one.accuracy.metrics.get(name)
            missed = name in gates and value is not None and not gates[name].kept_by(value)
            text = "–" if value is None else f"{value:.5f}{' ✗' if missed else ' ✓' if name in gates else ''}"
            cells.append(f'<td class="figure{" missed" if missed else ""}">{text}</td>')
        said = one.accuracy.broken or verdicts.get(one.engine, "")
        lines.append(_row(one, report, f"{''.join(cells)}<td>{escape(said)}</td>"))
    table = f"<table><tr><th>engine</th>{head}<th>verdict</th></tr>\n{''.join(lines)}</table>"
    unmeasured = [[one.engine, one.reason] for one in report.reports if one.accuracy is None]
    if not unmeasured:
        return table
    # The list is collapsed at first, because most of these engines are for another kind of device.
    return (
        f"{table}\n<details><summary>{len(unmeasured)} not measured</summary>{_table(['', ''], unmeasured)}</details>"
    )


def _row(one: BenchmarkReport, report: OptimizationReport, cells: str) -> str:
    kind = ' class="champion"' if one.engine == report.champion.engine else ""
    return f"<tr{kind}><td>{escape(one.engine)}</td>{cells}</tr>\n"


def _serving(report: OptimizationReport, pictures: dict[str, bytes]) -> Iterator[str]:
    if report.release is not None:
        yield f"<p>Triton serves {escape(report.model)} as release {report.release}.</p>"
    if report.serving is not None:
        setting, reason = str(report.serving.setting), report.serving.reason
        yield f"<p>{escape(reason if reason.startswith(setting) else f'{setting}: {reason}')}</p>"
        if report.serving.trials:
            yield _table(*trial_table(report.serving))
    if report.load is not None and report.load.levels:
        yield _picture(pictures, LOAD, "latency by throughput, for each number of clients")
        yield _table(*load_table(report.load.levels))


def _changes(report: OptimizationReport) -> Iterator[str]:
    before = report.before
    if before is None:
        yield "<p>Nothing: no run of this model for this target was finished before.</p>"
        return
    yield f"<p>Compared with run {escape(before.run_id)}, {escape(before.url)}</p>"
    if before.changes is None:
        yield "<p>It left no report that this version can read.</p>"
        return
    if before.changes.inputs:
        yield _table(["", "before", "now"], [list(row) for row in before.changes.inputs])
    else:
        yield "<p>The same checkpoint, libraries, device and configuration, and the same champion.</p>"
    header = ["engine", "score before", "now", "that is", "accuracy"]
    yield _table(header, [list(row) for row in before.changes.candidates], champion=report.champion.engine)
    yield _aside(
        "Score: times better than PyTorch. Noise: by how much the same engine, measured twice, is expected to differ, "
        "by the windows of both measurements, and never less than what was seen between runs on a shared machine."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], champion: str | None = None) -> str:
    lines = []
    if any(header):
        lines.append(f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>")
    for row in rows:
        kind = ' class="champion"' if champion in row[:2] else ""
        lines.append(f"<tr{kind}>{''.join(map(_cell, row))}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _cell(text: str) -> str:
    kind = ' class="figure"' if len(text) <= _SHORT else ""
    return f"<td{kind}>{escape(text)}</td>"


def _picture(pictures: dict[str, bytes], name: str, caption: str) -> str:
    if name not in pictures:
        return ""
    png = pictures[name]
    # The header of a PNG holds its width (ISO/IEC 15948, 11.2.2).
    least = round(_SMALLEST * int.from_bytes(png[16:20], "big"))
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<div class="picture"><img alt="{escape(caption)}" style="min-width: {least}px" src="{source}"></div>'


def _aside(text: str) -> str:
    return f'<p class="aside">{escape(text)}</p>'


def _length_picture(report: OptimizationReport) -> bytes | None:
    if report.lengths is None:
        return None
    return length_plot(report.lengths, f"{report.model}: rows of {report.lengths.requests} sampled requests")


def _load_picture(report: OptimizationReport) -> bytes | None:
    load = report.load
    if load is None or not load.levels:
        return None
    return load_plot(load, f"{report.model} on {report.target}, release {load.release}: {load.device}")
