"""The output of commands: text that is safe for a terminal, a line for each step, and tables of measurements."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from resources.artifacts.records import BenchmarkReport, CandidateVerdict
    from resources.catalog.loading import Catalog

#: The width of tables in a file or pipe, which has no width of its own.
WIDTH_OF_LOGS = 180
#: Control characters except tabs and line feeds, and the characters that change the direction of the text around them
#: (Bidi_Control, Unicode's UAX 9).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Replace control and bidirectional characters by JSON's escapes, so that a JSON document stays valid.

    Names, files and servers' answers are other people's text. A terminal that gets such text unchanged could move the
    cursor, hide lines, or write into the clipboard.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Printable(io.TextIOWrapper):
    """A text stream that passes everything through `printable`, and escapes what its encoding lacks."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


@contextmanager
def printable_output() -> Iterator[None]:
    """Have everything that is printed to standard output and standard error pass through `printable`."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stack.enter_context(_replaced(name))
        yield


@contextmanager
def _replaced(name: str) -> Iterator[None]:
    before: TextIO = getattr(sys, name)
    if not isinstance(before, io.TextIOWrapper):  # it is closed, or a caller has replaced it
        yield
        return
    before.flush()
    before.reconfigure(errors="backslashreplace", write_through=True)
    stream = _Printable(
        before.buffer,
        before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
        write_through=True,  # nothing may wait here while a console writes to the stream below
    )
    stream.below = before  # type: ignore[attr-defined]
    setattr(sys, name, stream)
    try:
        yield
    finally:
        setattr(sys, name, before)
        stream.detach()


def step_console() -> Console:
    """Return the console for lines, which it does not wrap."""
    return _console(soft_wrap=True)


def table_console() -> Console:
    """Return the console for tables. It is as wide as the terminal, or WIDTH_OF_LOGS wide in a file or pipe."""
    console = _console()
    return console if console.is_terminal else _console(width=WIDTH_OF_LOGS)


def _console(*, soft_wrap: bool = False, width: int | None = None) -> Console:
    """Return a console on standard output that takes texts literally, and passes them through `printable`."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                # Segments of the console's own control codes stay as they are.
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return PrintableConsole(
        file=getattr(sys.stdout, "below", sys.stdout),  # the stream below does not escape colours
        soft_wrap=soft_wrap,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
    )


def print_refused(catalog: Catalog) -> None:
    """Print to standard error why additions to the catalog could not be read."""
    for why in catalog.refused.values():
        print(f"refinery: {why}", file=sys.stderr)


def print_step(console: Console, elapsed_s: float, name: str, text: str, colour: str = "default") -> None:
    """Print one line with a step's result."""
    from rich.text import Text

    console.print(Text.assemble((f"{elapsed_s:7.1f} s", "dim"), "  ", (name, "bold"), "  "), end="")
    console.print(text, style=colour, markup=False, highlight=False, soft_wrap=True)


def print_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], bold: str | None = None
) -> None:
    """Print a table whose first column names engines or steps. The row that begins with `bold` is in bold."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in header:
        # The names in the first column must not be broken over two lines.
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
    """Print a table of the engines that were measured, and below it the reasons why the others were not."""
    from resources.report.tables import candidate_table

    header, rows = candidate_table(reports, verdicts)
    measured = {report.engine for report in reports if report.status == "measured"}
    print_table(console, title, header, [row for row in rows if row[0] in measured], best)
    without: dict[str, list[str]] = {}
    for row in rows:
        if row[0] not in measured:
            without.setdefault(row[-1].replace(f"{row[0]} ", "it "), []).append(row[0])
    for why, names in without.items():
        console.print(f"{', '.join(names)}: {why.replace('it needs', 'needs')}", highlight=False)
