"""What the store holds as champion becomes the release; a release that waits, or was left by a rollback, serves."""

from __future__ import annotations

from pathlib import Path

from resources.artifacts.records import Champion, Checkpoint, Engine, EvaluationSet, ServingConfiguration
from resources.catalog.entries import ModelEntry
from resources.errors import ReleaseError
from resources.settings.workspace import Workspace
from resources.tracking import Tracker
from resources.triton.layout import current_number, list_releases
from resources.triton.make import make_release
from resources.triton.pointer import current_problem, points_as_published
from resources.triton.publish import Published, unverified_root
from resources.triton.rollback import Moved, roll_back


def publish_champion(
    workspace: Workspace, tracker: Tracker, entry: ModelEntry, target: str, *, dagster_run: str
) -> Published:
    """Publish the champion as the steps of the pipeline left it. Raises ReleaseError, ServerError, ArtifactError."""
    store = workspace.store
    champion = store.current(Champion, f"champion/{target}/{entry.name}")
    checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
    engine = store.current(Engine, f"engines/{target}/{champion.engine}/{entry.name}")
    evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
    configuration = store.current(ServingConfiguration, f"serving_configuration/{target}/{entry.name}")
    if engine.digest != champion.engine_digest or evaluation.digest != champion.evaluation_digest:
        raise ReleaseError(
            f"{entry.name}: {champion.engine} was chosen on {target} for another revision or build than is there now. "
            f"Materialize champion/{target}, with the benchmarks before it, first."
        )
    if configuration.engine_digest != engine.digest:
        raise ReleaseError(
            f"{entry.name}: how to serve it on {target} was found for another engine than {champion.engine}. "
            f"Materialize serving_configuration/{target} first."
        )
    published = make_release(
        workspace, entry, checkpoint, engine, evaluation, champion, configuration, dagster_run=dagster_run
    )
    if published.current and published.release.status == "published":
        tracker.release(checkpoint, champion, published.release.number)
    return published


def promote(workspace: Workspace, tracker: Tracker, model: str, target: str, *, dagster_run: str, log: Path) -> Moved:
    """Have the newest release serve: one that waits for its proof is proven and published, else, after a rollback, the
    newest that there is. Raises ReleaseError, ServerError; then what served before serves on.
    """
    repository = workspace.repository(target)
    before = current_number(repository, model)
    waiting = list_releases(unverified_root(repository, model), model)
    if waiting:
        published = publish_champion(workspace, tracker, workspace.entry(model), target, dagster_run=dagster_run)
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
