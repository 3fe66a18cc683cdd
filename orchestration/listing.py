"""`refinery models` and `refinery releases`."""

from __future__ import annotations

import os
from argparse import Namespace

from rich.console import Console
from rich.table import Table

from orchestration.settings import read_workspace
from resources.catalog import ModelEntry
from resources.errors import ReleaseError
from resources.triton.layout import current_release, list_releases


def _console() -> Console:
    console = Console()
    # In a file or pipe nothing is as narrow as eighty columns.
    return console if console.is_terminal else Console(width=200)


def _shapes(entry: ModelEntry) -> str:
    if entry.shapes is None:
        return "as its sample is" if entry.sample else "the usual ones"
    return ", ".join(str(shape) for shape in entry.shapes)


def models(options: Namespace) -> int:
    """The catalog, and what serves."""
    del options
    workspace = read_workspace(os.environ)
    table = Table("model", "task", "source", "shapes", *(f"serves on {target}" for target in workspace.targets))
    for entry in workspace.catalog().models:
        served = []
        for target in workspace.targets:
            release = current_release(workspace.repository(target), entry.name)
            served.append(f"release {release.number}, {release.engine}" if release else "nothing yet")
        table.add_row(entry.name, entry.task, entry.source, _shapes(entry), *served)
    _console().print(table)
    return 0


def releases(options: Namespace) -> int:
    """Every release of one model that is in the repository, the served one marked."""
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)
    found = list_releases(repository, options.model)
    if not found:
        workspace.entry(options.model)  # an unknown model is said to be unknown
        raise ReleaseError(
            f"{options.model}: no release in {repository}. Publish one: refinery optimize {options.model}."
        )
    current = current_release(repository, options.model)
    table = Table("release", "serves", "engine", "revision", "made", "status", "digest")
    for release in found:
        serves = "yes" if current is not None and current.number == release.number else ""
        table.add_row(
            str(release.number),
            serves,
            release.engine,
            release.revision,
            release.created,
            release.status,
            release.content_digest[:12],
        )
    _console().print(table)
    return 0
