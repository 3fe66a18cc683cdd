"""Tables of the measurements, the same in Dagster, in MLflow, in the report and on the terminal."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.artifacts.records import (
    BenchmarkReport,
    CandidateVerdict,
    Latency,
    LengthProfile,
    LoadLevel,
    ServingConfiguration,
)
from resources.engines.specs import BASELINE

if TYPE_CHECKING:
    pass


def milliseconds(value_ms: float) -> str:
    """As many digits as tell engines apart: on a GPU all of them are below one."""
    return f"{value_ms:.1f}" if value_ms >= 1 else f"{value_ms:.3f}"


def tail(latency: Latency) -> str:
    """The 99th percentile where there are samples enough for one, else the maximum, and of how many samples."""
    if latency.p99_ms is not None:
        return milliseconds(latency.p99_ms)
    return f"≤{milliseconds(latency.max_ms)} (n={latency.count})"


def candidate_table(
    reports: Sequence[BenchmarkReport], verdicts: Sequence[CandidateVerdict]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: p50 / p99 in ms and times faster than PyTorch at each shape, accuracy, size, verdict.

    What was not measured comes last, with its reason for a verdict.
    """
    said = {verdict.engine: verdict.verdict for verdict in verdicts}
    shapes = list(dict.fromkeys(timing.shape for report in reports for timing in report.timings))
    header = ["engine", *(f"{shape} ms" for shape in shapes), "accuracy", "size", "verdict"]
    rows = []
    for report in reports:
        if report.status == "measured":
            rows.append(_measured_row(report, shapes, said.get(report.engine, "")))
    for report in reports:
        if report.status != "measured":
            why = said.get(report.engine, report.reason)
            rows.append([report.engine, *("–" for _ in shapes), "–", "–", why])
    return header, rows


def _measured_row(report: BenchmarkReport, shapes: Sequence[str], verdict: str) -> list[str]:
    timings = {timing.shape: timing for timing in report.timings}
    cells = []
    for shape in shapes:
        timing = timings[shape]
        ratio = f" ({timing.speedup:.2f}×)" if report.engine != BASELINE else ""
        cells.append(f"{milliseconds(timing.candidate.p50_ms)} / {tail(timing.candidate)}{ratio}")
    return [report.engine, *cells, accuracy_text(report), size_text(report.engine_size_bytes), verdict]


def accuracy_text(report: BenchmarkReport) -> str:
    """The task's metrics in one line."""
    if report.accuracy is None:
        return "–"
    if report.accuracy.broken:
        return report.accuracy.broken
    # The two that every task's gates begin with; all of them are in the report.
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in list(report.accuracy.metrics.items())[:2]
    )


def size_text(size_bytes: int) -> str:
    """Megabytes, as disks count them."""
    return f"{size_bytes / 1e6:.1f} MB"


def trial_table(configuration: ServingConfiguration) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each setting did under load, stage by stage; the last stage's figures decide."""
    header = ["setting", "stage", "requests/s", "p50 ms", "p99 ms", "rows a batch", ""]
    rows = []
    for trial in configuration.trials:
        figures = [f"{trial.throughput_per_s:.0f}", f"{trial.p50_ms:.1f}", f"{trial.p99_ms:.1f}"]
        figures = ["–"] * 4 if trial.reason else [*figures, f"{trial.mean_batch:.1f}"]
        taken = trial.setting == configuration.setting and trial.stage == configuration.trials[-1].stage
        rows.append([str(trial.setting), str(trial.stage), *figures, trial.reason or ("taken" if taken else "")])
    return header, rows


def load_table(levels: Sequence[LoadLevel]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: throughput and latency by the number of clients."""
    header = [
        "clients",
        "by",
        "requests",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "rows an execution",
        "executions a request",
    ]
    rows = [
        [
            str(level.clients),
            level.tool,
            str(level.requests or "–"),
            f"{level.throughput_per_s:.1f}",
            milliseconds(level.p50_ms),
            milliseconds(level.p99_ms),
            f"{level.mean_batch:.2f}" if level.mean_batch else "–",
            f"{level.batches_per_request:.2f}" if level.batches_per_request else "–",
        ]
        for level in levels
    ]
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells keep their bars and line breaks out of its way."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def padding_table(lengths: LengthProfile) -> str:
    """Markdown: what share of an engine's tokens would be padding, by what rows are padded to."""
    rows = [
        ["its own buckets: " + ", ".join(map(str, lengths.buckets)), f"{lengths.padding:.1%}"],
        ["the usual buckets", f"{lengths.padding_of_standard_buckets:.1%}"],
        [f"one length, {lengths.buckets[-1]}", f"{lengths.padding_of_one_length:.1%}"],
    ]
    return markdown(["rows padded to", "share of padding"], rows)


def markdown_image(png: bytes, caption: str) -> str:
    """The picture inside Markdown, which is how Dagster shows one."""
    return f"![{caption}](data:image/png;base64,{base64.b64encode(png).decode()})"
