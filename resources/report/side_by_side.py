"""The comparison of several engines as a table, a plot and JSON."""

from __future__ import annotations

from pathlib import Path

from resources.benchmark.side_by_side import Comparison
from resources.engines.specs import BASELINE
from resources.report.plots import latency_plot
from resources.report.tables import candidate_table, markdown
from resources.storage.atomic import write_whole

JSON_FILE, TABLE_FILE, PLOT_FILE = "bench.json", "bench.md", "bench.png"


def save_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `bench.json`, `bench.md` and `bench.png` into the folder, and return their paths.

    Each file is written whole or not at all, and replaces the one of an earlier comparison.
    """
    accurate = {verdict.engine for verdict in comparison.verdicts if verdict.eligible}
    judged = {report.engine for report in comparison.reports if report.accuracy is not None} - {BASELINE}
    plot = latency_plot(comparison.reports, title_of(comparison), judged - accurate)
    assert plot is not None, "a comparison without timings was never made"
    contents = {
        JSON_FILE: comparison.model_dump_json(indent=1).encode(),
        TABLE_FILE: report_text(comparison).encode(),
        PLOT_FILE: plot,
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def title_of(comparison: Comparison) -> str:
    """Return the model, the target, the device and the number of threads in one line."""
    threads = f"{comparison.threads} thread{'s' if comparison.threads > 1 else ''}"
    return f"{comparison.model} on {comparison.target} ({comparison.device}; {threads})"


def ratio_table(comparison: Comparison, shape: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table that tells how many times faster each row's engine is than each column's.

    Args:
        comparison: The comparison.
        shape: The shape of the figures. None: the figures are the geometric mean over all shapes.
    """
    names = comparison.measured

    def cell(engine: str, other: str) -> str:
        if engine == other:
            return "–"
        return f"{comparison.overall(engine, other) if shape is None else comparison.ratios[shape][engine][other]:.2f}×"

    return ["times faster than", *names], [[engine, *(cell(engine, other) for other in names)] for engine in names]


def report_text(comparison: Comparison) -> str:
    """Return the whole comparison as Markdown, without the raw samples."""
    rounds = ", ".join(
        f"{timing.shape}: {timing.pairs}{'' if timing.agreed else ' (stopped before the windows agreed)'}"
        for timing in comparison.reports[0].timings
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items() if version != "absent")
    parts = [
        f"# {title_of(comparison)}",
        f"Revision {comparison.revision}, task {comparison.task}, {comparison.created}. All engines took turns; times "
        "faster than PyTorch, and than each other, are medians over the rounds. Milliseconds: p50 / p99.",
        markdown(*candidate_table(comparison.reports, comparison.verdicts)),
        f"![median latency by shape]({PLOT_FILE})",
        "## Pairwise comparison, geometric mean over the shapes",
        markdown(*ratio_table(comparison)),
        *(f"## {shape}\n\n{markdown(*ratio_table(comparison, shape))}" for shape in comparison.ratios),
        f"Rounds by shape: {rounds}. Versions: {versions}.",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
