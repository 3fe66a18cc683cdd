"""The registered model: a version for each champion, under the alias of its target, with the releases made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from resources.artifacts.records import Champion, Checkpoint
from resources.tracking.names import ALIAS, RELEASES, TAG
from resources.tracking.store import RunLink, TrackingStore, already_there, exceptions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

#: MLflow's codes for something that does not exist.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def register(store: TrackingStore, champion: Champion, run: RunLink, chosen_by: str, tags: Mapping[str, str]) -> str:
    """Give the champion the alias of its target, as a new version unless it has one; the version's number.

    run: the one that measured it. chosen_by: the way to Dagster's run, in Markdown; tags: the same, for programs.
    """
    client, name = store.client, champion.model
    if not client.search_registered_models(f"name = '{name}'"):
        with already_there():
            client.create_registered_model(name, description="Engines chosen by transformer-refinery.")
    version = version_of(store, champion) or client.create_model_version(
        name,
        # The bytes live in the artifact store and in the Triton repository; this is their address. A tracking server
        # takes absolute paths alone.
        source=f"refinery:/engine/{champion.engine_digest}",
        run_id=run.run_id,
        tags={
            f"{TAG}champion": champion.digest,
            f"{TAG}engine": champion.engine_digest,
            f"{TAG}target": champion.target,
            f"{TAG}engine_name": champion.engine,
            **tags,
        },
        description=f"{champion.reason}\n\n{chosen_by}",
    )
    client.set_registered_model_alias(name, f"{ALIAS}-{champion.target}", version.version)
    return str(version.version)


def version_of(store: TrackingStore, champion: Champion) -> ModelVersion | None:
    """The version that champion is; None where it has none yet."""
    found = store.client.search_model_versions(f"name = '{champion.model}'")
    return next((item for item in found if item.tags.get(f"{TAG}champion") == champion.digest), None)


def version_address(store: TrackingStore, model: str, version: str) -> str:
    """The page of a registered version."""
    return store.address(f"models/{model}/versions/{version}")


def champion_version(store: TrackingStore, model: str, target: str) -> ModelVersion | None:
    """The version that has the champion's alias; None where there is none."""
    try:
        version: ModelVersion = store.client.get_model_version_by_alias(model, f"{ALIAS}-{target}")
    except exceptions() as error:
        if getattr(error, "error_code", "") not in _NOT_THERE:
            raise
        return None
    return version


def tag_release(store: TrackingStore, checkpoint: Checkpoint, champion: Champion, number: int) -> RunLink | None:
    """Write a release's number on the champion's version, on the run that measured it, and on that run's parent; the
    link to the version. None where the alias is another engine's by now.
    """
    client, name = store.client, champion.model
    version = champion_version(store, name, champion.target)
    if version is None or version.tags.get(f"{TAG}engine") != champion.engine_digest:
        return None
    # The newest by one name, and all of them: one champion may be released again, served in another way.
    tags = {
        f"{TAG}release": str(number),
        f"{RELEASES}{number}": champion.digest,
        f"{TAG}revision": checkpoint.revision,
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version.version, key, value)
    told, said = version.description or "", f"Triton release {number}."
    if said not in told:  # tags are far down on its page
        client.update_model_version(name, version.version, f"{told}\n\n{said}".strip())
    if not version.run_id or store.run(version.run_id) is None:
        return None
    client.set_tag(version.run_id, f"{TAG}release", str(number))
    return RunLink(version.run_id, version_address(store, name, str(version.version)))


def release_runs(store: TrackingStore, model: str, target: str) -> dict[int, RunLink]:
    """The run that measured the engine of each release, by the release's number, as far as MLflow knows them."""
    found: dict[int, RunLink] = {}
    for version in store.client.search_model_versions(f"name = '{model}'"):
        numbers = [key.removeprefix(RELEASES) for key in version.tags if key.startswith(RELEASES)]
        if version.tags.get(f"{TAG}target") != target or not numbers or not version.run_id:
            continue
        run = store.run(version.run_id)
        if run is not None:
            found |= {int(number): store.link(run) for number in numbers if number.isdigit()}
    return found
