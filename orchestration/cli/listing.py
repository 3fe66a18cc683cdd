"""`refinery models` and `refinery releases`: the lists of the catalog and of a model's releases."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

from rich.table import Table

from orchestration.settings import read_workspace, tracker_of
from orchestration.terminal.output import print_refused, table_console
from resources.catalog.entries import ModelEntry
from resources.errors import ReleaseError, TrackingError
from resources.report.tables import size_text
from resources.settings.workspace import Workspace
from resources.storage.locations import Location
from resources.triton.layout import (
    current_number,
    current_release,
    is_published_here,
    list_releases,
    release_numbers,
)
from resources.triton.pointer import current_problem
from resources.triton.publish import unverified_root
from resources.triton.release import Release


def _shapes(entry: ModelEntry) -> str:
    if entry.shapes is None:
        return "from its sample" if entry.sample else "the defaults"
    return ", ".join(str(shape) for shape in entry.shapes)


def models(options: Namespace) -> int:
    """Print the catalog, and what serves on each target."""
    del options
    workspace = read_workspace(os.environ)
    table = Table("model", "task", "source", "shapes", *(f"serves on {target}" for target in workspace.targets))
    catalog = workspace.catalog()
    for entry in catalog.models:
        served = []
        for target in workspace.targets:
            served.append(served_text(workspace.repository(target), entry.name))
        table.add_row(entry.name, entry.task, entry.source, _shapes(entry), *served)
    table_console().print(table)
    print_refused(catalog)
    return 0


def served_text(repository: Location, model: str) -> str:
    """Return the release that the model's pointer names, or what is wrong with it."""
    release = current_release(repository, model)
    if release is None and current_number(repository, model) is None and not is_published_here(repository, model):
        return "nothing yet"
    problem = current_problem(repository, model)
    return problem if problem or release is None else f"release {release.number}, {release.engine}"


def releases(options: Namespace) -> int:
    """Print every release of a model that is in the repository, or waits beside it."""
    workspace = read_workspace(os.environ)
    repository, model = workspace.repository(options.target), options.model
    whole = {release.number: release for release in list_releases(repository, model)}
    waiting = list_releases(unverified_root(repository, model), model)
    damaged = [number for number in release_numbers(repository, model) if number not in whole]
    if not whole and not waiting and not damaged:
        workspace.entry(model)  # raises an error if the model is unknown
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    current, runs = current_number(repository, model), _runs(workspace, model, options.target)
    table = Table("release", "state", "engine", "revision", "made", "size", "MLflow run", "digest")
    for number, release in whole.items():
        state = "current" if number == current else "kept"
        table.add_row(*_row(release, state, runs.get(number, "–")))
    for number in damaged:
        state = "damaged and current" if number == current else "damaged"
        table.add_row(str(number), f"{state}: refinery verify {model} --release {number}", *["–"] * 6)
    for release in waiting:
        table.add_row(*_row(release, f"waits for its proof: refinery promote {model}", "–"))
    table_console().print(table)
    problem = current_problem(repository, model)
    if problem and not waiting:
        print(f"refinery: {model}: {problem}", file=sys.stderr)
    return 0


def _row(release: Release, state: str, run: str) -> list[str]:
    size = size_text(sum(file.size_bytes for file in release.files.values()))
    made, digest = release.created, release.content_digest[:12]
    return [str(release.number), state, release.engine, release.revision, made, size, run, digest]


def _runs(workspace: Workspace, model: str, target: str) -> dict[int, str]:
    """Return the id of the MLflow run of each release.

    There are none if MLflow has no store yet. There are also none if it does not answer, which is printed.
    """
    store = workspace.mlflow_uri().removeprefix("sqlite:///")
    if store.startswith("/") and not Path(store).exists():
        return {}
    try:
        return {number: link.run_id for number, link in tracker_of(workspace).release_runs(model, target).items()}
    except TrackingError as error:
        print(f"refinery: the MLflow runs of the releases cannot be shown: {error}", file=sys.stderr)
        return {}
