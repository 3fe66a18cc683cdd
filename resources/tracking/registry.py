"""The registered model, with a version for each champion and an alias for each target.

A version's tags name the releases that were made of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import TYPE_CHECKING
from urllib.parse import quote

from resources.artifacts.records import Champion, Checkpoint
from resources.checkpoints.sources.registry import is_own
from resources.errors import TrackingError
from resources.tracking.names import ALIAS, RELEASES, TAG
from resources.tracking.store import RunLink, TrackingStore, already_there, exceptions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

#: The error codes of MLflow for something that does not exist.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
#: This tag of a registered model that this project made names the catalog's model that it is for.
_OF_MODEL = f"{TAG}model"
_DESCRIPTION = "Engines chosen by transformer-refinery."
#: This suffix follows the model's name if the name alone is taken. No model of the catalog can have such a name.
_BESIDE = "+engines"


def register(
    store: TrackingStore,
    champion: Champion,
    run: RunLink,
    chosen_by: str,
    tags: Mapping[str, str],
    *,
    sources: Collection[str] = (),
) -> ModelVersion:
    """Give the alias of the champion's target to the champion's version, and return that version.

    The version is made if the champion has none yet.

    Args:
        store: The tracking store.
        champion: The champion to register.
        run: The run that measured the champion.
        chosen_by: The link to Dagster's run, in Markdown.
        tags: The tags of a new version, which name the Dagster run for programs.
        sources: The registered models that entries of the catalog take checkpoints from.
    """
    client, name = store.client, registered_model(store, champion.model, sources)
    version = version_of(store, champion, name) or client.create_model_version(
        name,
        # The engine's bytes are in the artifact store and in the Triton repository, and this is their address. A
        # tracking server takes absolute paths only.
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
    return version


def registered_model(store: TrackingStore, model: str, sources: Collection[str] = ()) -> str:
    """Return the name of the registered model for the model's champions, and make that registered model if needed.

    It has the model's name, unless a registered model of that name is a source of checkpoints or was made by somebody
    else. In that case, `models:/NAME/latest` would begin to name an engine for everybody who reads it. The champions
    then go to a registered model of their own beside it, and later champions stay there.

    Args:
        store: The tracking store.
        model: The name of the catalog's model.
        sources: The registered models that entries of the catalog take checkpoints from.

    Raises:
        TrackingError: Both names are taken.
    """
    # MySQL does not distinguish the names `Bert` and `bert`.
    taken = {name.casefold() for name in sources}
    names = _names(model)
    there = {name: _find(store, name) for name in names}
    for name in names:
        found = there[name]
        if name.casefold() not in taken and found is not None and _is_ours(store, found, model):
            return name
    for name in reversed(names):
        if name.casefold() not in taken and there[name] is None:
            with already_there():
                store.client.create_registered_model(name, tags={_OF_MODEL: model}, description=_DESCRIPTION)
            return name
    raise TrackingError(
        f"{model}: its champion cannot be registered in MLflow at {store.uri}: the registered models "
        f"{' and '.join(map(repr, reversed(names)))} are sources of checkpoints or were made by somebody else. Rename "
        "the model in the catalog, or rename these registered models."
    )


def _names(model: str) -> tuple[str, str]:
    """Return the names that the model's registered model may have.

    If this project made both registered models, the first name is the one in use.
    """
    return f"{model}{_BESIDE}", model


def _find(store: TrackingStore, name: str) -> RegisteredModel | None:
    return next(iter(store.client.search_registered_models(f"name = '{name}'")), None)


def _is_ours(store: TrackingStore, found: RegisteredModel, model: str) -> bool:
    """Return whether this project made the registered model for that model of the catalog."""
    if _OF_MODEL in found.tags:
        return bool(found.tags[_OF_MODEL] == model)
    if found.name != model:
        return False
    # Earlier versions of this project set no tag but only the description, which people may have changed.
    versions = store.client.search_model_versions(f"name = '{found.name}'")
    if not all(is_own(str(version.source), version.tags) for version in versions):
        return False
    return bool(versions) or found.description == _DESCRIPTION


def version_of(store: TrackingStore, champion: Champion, name: str | None = None) -> ModelVersion | None:
    """Return the champion's version, or None if it has none.

    Args:
        store: The tracking store.
        champion: The champion.
        name: The registered model to search. None: all names that the champion's model may have are searched.
    """
    for one in (name,) if name is not None else _names(champion.model):
        for version in store.client.search_model_versions(f"name = '{one}'"):
            if version.tags.get(f"{TAG}champion") == champion.digest:
                return version
    return None


def version_address(store: TrackingStore, version: ModelVersion) -> str:
    """Return the address of a registered version's page."""
    return store.address(f"models/{quote(version.name)}/versions/{version.version}")


def champion_version(store: TrackingStore, model: str, target: str) -> ModelVersion | None:
    """Return the version that has the alias of the target's champion, or None if there is none."""
    for name in _names(model):
        try:
            version: ModelVersion = store.client.get_model_version_by_alias(name, f"{ALIAS}-{target}")
        except exceptions() as error:
            if getattr(error, "error_code", "") not in _NOT_THERE:
                raise
        else:
            return version
    return None


def tag_release(store: TrackingStore, checkpoint: Checkpoint, champion: Champion, number: int) -> RunLink | None:
    """Write a release's number on the champion's version and on the run that measured the champion.

    Returns:
        The link to the version, or None if the alias belongs to another engine by now or the run is gone.
    """
    client = store.client
    version = champion_version(store, champion.model, champion.target)
    if version is None or version.tags.get(f"{TAG}engine") != champion.engine_digest:
        return None
    # One tag has the newest release, and each release has a tag of its own, because a champion may be released again
    # with another serving configuration.
    tags = {
        f"{TAG}release": str(number),
        f"{RELEASES}{number}": champion.digest,
        f"{TAG}revision": checkpoint.revision,
    }
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    told, said = version.description or "", f"Triton release {number}."
    if said not in told:  # The description repeats the number because tags are far down on the version's page.
        client.update_model_version(version.name, version.version, f"{told}\n\n{said}".strip())
    if not version.run_id or store.run(version.run_id) is None:
        return None
    client.set_tag(version.run_id, f"{TAG}release", str(number))
    return RunLink(version.run_id, version_address(store, version))


def release_runs(store: TrackingStore, model: str, target: str) -> dict[int, RunLink]:
    """Return the run that measured each release's engine, by the release's number, as far as MLflow knows it."""
    found: dict[int, RunLink] = {}
    # The registered model in use comes last, so that its runs win where both have the same number.
    versions = [store.client.search_model_versions(f"name = '{name}'") for name in reversed(_names(model))]
    for version in chain.from_iterable(versions):
        numbers = [key.removeprefix(RELEASES) for key in version.tags if key.startswith(RELEASES)]
        if version.tags.get(f"{TAG}target") != target or not numbers or not version.run_id:
            continue
        run = store.run(version.run_id)
        if run is not None:
            found |= {int(number): store.link(run) for number in numbers if number.isdigit()}
    return found
