"""What commands print alike: a line for each step, and a table of what was measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resources.reporting import candidate_table

if TYPE_CHECKING:
    from rich.console import Console

    from resources.artifacts.records import BenchmarkReport, CandidateVerdict
    from resources.catalog import Catalog

#: A log has no width of its own.
WIDTH_OF_LOGS = 180


def table_console() -> Console:
    """Where tables go: as wide as the terminal, and in a file or pipe wide enough for most."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_LOGS)


def print_refused(catalog: Catalog) -> None:
    """Say on stderr which additions to the catalog could not be read, and why."""
    for why in catalog.refused.values():
        print(f"refinery: {why}", file=sys.stderr)


def print_step(console: Console, elapsed_s: float, name: str, text: str, colour: str = "default") -> None:
    """What a step came to."""
    console.print(f"[dim]{elapsed_s:7.1f} s[/]  [bold]{name}[/]  ", end="", highlight=False)
    console.print(text, style=colour, markup=False, highlight=False, soft_wrap=True)


def print_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], bold: str | None = None
) -> None:
    """A table whose first column names engines or steps, the row of `bold` standing out."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in header:
        # A name that is broken in two is none.
        table.add_column(
            name, overflow="fold", no_wrap=name == header[0], justify="right" if name.endswith("ms") else "left"
        )
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == bold else None)
    console.print(table)


def print_candidates(
    console: Console,
    title: str,
    reports: Sequence[BenchmarkReport],
    verdicts: Sequence[CandidateVerdict],
    best: str | None,
) -> None:
    """What was measured as a table, and below it a line for each that was not."""
    header, rows = candidate_table(reports, verdicts)
    measured = {report.engine for report in reports if report.status == "measured"}
    print_table(console, title, header, [row for row in rows if row[0] in measured], best)
    without: dict[str, list[str]] = {}
    for row in rows:
        if row[0] not in measured:
            without.setdefault(row[-1].replace(f"{row[0]} ", "it "), []).append(row[0])
    for why, names in without.items():
        console.print(f"{', '.join(names)}: {why.replace('it needs', 'needs')}", highlight=False)
