"""Tables of the measurements. Dagster, MLflow, the report and the terminal show the same tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from resources.artifacts.records import (
    BenchmarkReport,
    CandidateVerdict,
    Latency,
    LengthProfile,
    LoadLevel,
    ServingConfiguration,
)
from resources.engines.specs import BASELINE


def milliseconds(value_ms: float) -> str:
    """Format a time with enough digits to tell engines apart. On a GPU, times are often below one millisecond."""
    return f"{value_ms:.1f}" if value_ms >= 1 else f"{value_ms:.3f}"


def tail(latency: Latency) -> str:
    """Return the 99th percentile, or the maximum and the number of samples if those are too few for a percentile."""
    if latency.p99_ms is not None:
        return milliseconds(latency.p99_ms)
    return f"≤{milliseconds(latency.max_ms)} (n={latency.count})"


def candidate_table(
    reports: Sequence[BenchmarkReport], verdicts: Sequence[CandidateVerdict]
) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of candidates.

    A row has p50 / p99 in ms and the speedup over PyTorch at each shape, the accuracy, the size and the verdict.
    Engines that were not measured come last, with their reason as the verdict.
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
    """Return the first two of the task's metrics in one line, or the reason why the answers are broken."""
    if report.accuracy is None:
        return "–"
    if report.accuracy.broken:
        return report.accuracy.broken
    # Every task's gates begin with these two metrics. The report has all of them.
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in list(report.accuracy.metrics.items())[:2]
    )


def size_text(size_bytes: int) -> str:
    """Format a size in megabytes of a million bytes, as disk vendors count them."""
    return f"{size_bytes / 1e6:.1f} MB"


def trial_table(configuration: ServingConfiguration) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of each setting's figures under load, one row for each stage.

    The figures of the last stage decide which setting is taken.
    """
    header = ["setting", "stage", "requests/s", "p50 ms", "p99 ms", "rows a batch", ""]
    rows = []
    for trial in configuration.trials:
        figures = [f"{trial.throughput_per_s:.0f}", f"{trial.p50_ms:.1f}", f"{trial.p99_ms:.1f}"]
        figures = ["–"] * 4 if trial.reason else [*figures, f"{trial.mean_batch:.1f}"]
        taken = trial.setting == configuration.setting and trial.stage == configuration.trials[-1].stage
        rows.append([str(trial.setting), str(trial.stage), *figures, trial.reason or ("taken" if taken else "")])
    return header, rows


def load_table(levels: Sequence[LoadLevel]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of throughput and latency by the number of clients."""
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
    """Format a Markdown table. Bars in cells are escaped, and line breaks become spaces."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def padding_table(lengths: LengthProfile) -> str:
    """Return, as Markdown, the share of padding among an engine's tokens for each choice of padded lengths."""
    rows = [
        ["its own buckets: " + ", ".join(map(str, lengths.buckets)), f"{lengths.padding:.1%}"],
        ["the usual buckets", f"{lengths.padding_of_standard_buckets:.1%}"],
        [f"one length, {lengths.buckets[-1]}", f"{lengths.padding_of_one_length:.1%}"],
    ]
    return markdown(["rows padded to", "share of padding"], rows)


def markdown_image(png: bytes, caption: str) -> str:
    """Embed the picture in Markdown, which is how Dagster shows pictures."""
    return f"![{caption}](data:image/png;base64,{base64.b64encode(png).decode()})"
