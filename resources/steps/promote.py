"""Have the newest release serve: one that waits for its proof, or that a rollback left behind."""

from __future__ import annotations

from pathlib import Path

from resources.errors import ReleaseError
from resources.settings.workspace import Workspace
from resources.steps.graph import steps_of
from resources.steps.step import Work
from resources.tracking import Tracker
from resources.triton.layout import current_number, list_releases
from resources.triton.pointer import current_problem, points_as_published
from resources.triton.publish import unverified_root
from resources.triton.rollback import Moved, roll_back


def promote(workspace: Workspace, tracker: Tracker, model: str, target: str, *, dagster_run: str, log: Path) -> Moved:
    """Have the newest release serve. If that fails, what served before goes on serving.

    A release that waits for its proof is proven and published. Otherwise, after a rollback, the newest serves again.

    Raises:
        ReleaseError: There is nothing newer, or it could not be proven.
        ServerError: A server could not be started, or did not answer.
    """
    repository = workspace.repository(target)
    before = current_number(repository, model)
    waiting = list_releases(unverified_root(repository, model), model)
    if waiting:
        work = Work(workspace, workspace.entry(model))
        published = steps_of(target).release.publish(work, tracker, dagster_run=dagster_run)
        if published.release.status != "published":
            raise ReleaseError(f"{model}: {published.advice}")
        if not published.changed:
            raise ReleaseError(
                f"{model}: release {waiting[-1].number}, which waits, is not of the champion any more: that is what "
                f"release {published.release.number} serves. Optimize again, or remove "
                f"{unverified_root(repository, model)}."
            )
        return Moved(published.release, before)
    found = list_releases(repository, model)
    if not found:
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    if points_as_published(repository, found[-1]) and not workspace.triton.driven:
        raise ReleaseError(f"{model}: release {before} is the newest, and what is pointed to already.")
    return roll_back(repository, model, workspace.triton, to=found[-1].number, log=log)
