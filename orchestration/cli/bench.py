"""`refinery bench`: a comparison of a model's engines with each other, without Dagster and MLflow."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from pathlib import Path

from orchestration.cli.model_argument import ENTRY_OPTIONS, find_or_add
from orchestration.settings import read_workspace
from orchestration.terminal.output import print_candidates, print_step, print_table, step_console, table_console
from resources.benchmark.side_by_side import Comparison
from resources.catalog.entries import ModelEntry, Shape
from resources.engines.availability import unsupported_reason
from resources.engines.specs import BASELINE, ENGINES, EngineSpec, engine_spec
from resources.errors import CatalogError, EngineError
from resources.report.side_by_side import ratio_table, save_comparison, title_of
from resources.settings.workspace import Workspace
from resources.steps.side_by_side import compare_engines


def bench(options: Namespace) -> int:
    """Compare the engines, and print and save the result."""
    workspace = read_workspace(os.environ)
    # The options are read before any work, so that a mistyped one costs nothing.
    target, shapes, wanted = options.target or workspace.targets[0], _shapes(options), _engines(options)
    said = dict.fromkeys(ENTRY_OPTIONS) | {name: getattr(options, name) for name in ("name", "task", "allow_pickle")}
    for spec in (engine_spec(BASELINE), *(wanted or ())):
        reason = unsupported_reason(spec, target)
        if reason is not None:
            raise CatalogError(f"--engines, --target: {reason}")
    entry = _measured_as(find_or_add(workspace, Namespace(model=options.model, **said), rewrite=False), options)
    folder = _folder(workspace, entry, target, options)
    if wanted is not None:  # the engines of the command line take the place of those in the catalog
        entry = entry.model_copy(update={"engines": None})
    console, started = step_console(), time.monotonic()

    def say(name: str, text: str) -> None:
        print_step(console, time.monotonic() - started, name, text)

    comparison = compare_engines(
        workspace,
        entry,
        target,
        wanted or ENGINES,
        say,
        shapes=shapes,
        seconds=options.seconds,
        accuracy=options.accuracy,
    )
    _print(comparison)
    try:
        saved = save_comparison(comparison, folder)
    except OSError as error:
        raise CatalogError(f"--output: {folder} cannot be written: {error}. Give another folder.") from None
    print(f"Saved: {', '.join(str(path) for path in saved)}")
    return 0


def _print(comparison: Comparison) -> None:
    console = table_console()
    best = next((verdict.engine for verdict in comparison.verdicts if verdict.eligible), None)
    title = f"{title_of(comparison)}: p50 / p99 (times faster than PyTorch)"
    print_candidates(console, title, comparison.reports, comparison.verdicts, best)
    if len(comparison.measured) > 2:  # for two engines, the first table has the same ratio
        print_table(console, "Pairwise comparison, geometric mean over the shapes", *ratio_table(comparison), best)


def _shapes(options: Namespace) -> list[Shape] | None:
    if options.shapes is None:
        return None
    try:
        return [Shape.parse(text.strip()) for text in options.shapes.split(",")]
    except ValueError as error:
        raise CatalogError(f"--shapes: {error}.") from None


def _engines(options: Namespace) -> list[EngineSpec] | None:
    if options.engines is None:
        return None
    try:
        specs = [engine_spec(name.strip()) for name in options.engines.split(",")]
    except EngineError as error:
        raise CatalogError(f"--engines: {error}") from None
    if all(spec.name == BASELINE for spec in specs):
        raise CatalogError(
            f"--engines: {BASELINE} is the baseline of every comparison. Name at least one other engine."
        )
    return list(dict.fromkeys(specs))


def _measured_as(entry: ModelEntry, options: Namespace) -> ModelEntry:
    if options.threads is None:
        return entry
    return entry.model_copy(update={"benchmark": entry.benchmark.model_copy(update={"threads": options.threads})})


def _folder(workspace: Workspace, entry: ModelEntry, target: str, options: Namespace) -> Path:
    """Return the folder for the results.

    It is checked before minutes are spent on measurements. It must be a folder, or a place where one can be made.
    """
    if options.output is None:
        return workspace.home / "bench" / f"{entry.name}-{target}"
    folder = Path(options.output).resolve()
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise CatalogError(f"--output: {folder} cannot be created: {error.strerror}. Give another folder.") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise CatalogError(
            f"--output: {folder} cannot be created: {there} is not a writable folder. Give another folder."
        )
    return folder
