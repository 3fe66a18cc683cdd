"""The registered model: a version for each champion, under the alias of its target, with the releases made of it."""

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

#: MLflow's codes for something that does not exist.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
#: Of a registered model that this project made: the model of the catalog that it is for.
_OF_MODEL = f"{TAG}model"
_DESCRIPTION = "Engines chosen by transformer-refinery."
#: Follows the model's name where that is taken. No model of the catalog can be called so.
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
    """Give the champion the alias of its target, as a new version unless it has one, and return that version.

    Args:
        run: The run that measured the champion.
        chosen_by: The way to Dagster's run, in Markdown; `tags` have the same for programs.
        sources: See `registered_model`.
    """
    client, name = store.client, registered_model(store, champion.model, sources)
    version = version_of(store, champion, name) or client.create_model_version(
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
    return version


def registered_model(store: TrackingStore, model: str, sources: Collection[str] = ()) -> str:
    """Choose the registered model that takes the model's champions, and make it if it is not there.

    It is called as the model, unless a registered model of that name is a source of checkpoints or somebody else's.
    `models:/NAME/latest` would name an engine from then on, for everybody who reads it. The champions then go to a
    registered model of their own beside it, which the next champions keep to.

    Args:
        sources: The registered models that entries of the catalog take checkpoints from.

    Raises:
        TrackingError: Both names are taken.
    """
    # MySQL takes `Bert` and `bert` for one name.
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
    """The names that the model's registered model may have; where both are ours, the first is the one in use."""
    return f"{model}{_BESIDE}", model


def _find(store: TrackingStore, name: str) -> RegisteredModel | None:
    return next(iter(store.client.search_registered_models(f"name = '{name}'")), None)


def _is_ours(store: TrackingStore, found: RegisteredModel, model: str) -> bool:
    """Whether this project made the registered model, for that model of the catalog."""
    if _OF_MODEL in found.tags:
        return bool(found.tags[_OF_MODEL] == model)
    if found.name != model:
        return False
    # Earlier versions gave it the description alone, which people may have changed.
    versions = store.client.search_model_versions(f"name = '{found.name}'")
    if not all(is_own(str(version.source), version.tags) for version in versions):
        return False
    return bool(versions) or found.description == _DESCRIPTION


def version_of(store: TrackingStore, champion: Champion, name: str | None = None) -> ModelVersion | None:
    """Find the version that the champion is, in the registered model of that name or in any of the champion's model."""
    for one in (name,) if name is not None else _names(champion.model):
        for version in store.client.search_model_versions(f"name = '{one}'"):
            if version.tags.get(f"{TAG}champion") == champion.digest:
                return version
    return None


def version_address(store: TrackingStore, version: ModelVersion) -> str:
    """The page of a registered version."""
    return store.address(f"models/{quote(version.name)}/versions/{version.version}")


def champion_version(store: TrackingStore, model: str, target: str) -> ModelVersion | None:
    """The version that has the champion's alias; None where there is none."""
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
    """Write a release's number on the champion's version, on the run that measured it, and on that run's parent; the
    link to the version. None where the alias is another engine's by now.
    """
    client = store.client
    version = champion_version(store, champion.model, champion.target)
    if version is None or version.tags.get(f"{TAG}engine") != champion.engine_digest:
        return None
    # The newest by one name, and all of them: one champion may be released again, served in another way.
    tags = {
        f"{TAG}release": str(number),
        f"{RELEASES}{number}": champion.digest,
        f"{TAG}revision": checkpoint.revision,
    }
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    told, said = version.description or "", f"Triton release {number}."
    if said not in told:  # tags are far down on its page
        client.update_model_version(version.name, version.version, f"{told}\n\n{said}".strip())
    if not version.run_id or store.run(version.run_id) is None:
        return None
    client.set_tag(version.run_id, f"{TAG}release", str(number))
    return RunLink(version.run_id, version_address(store, version))


def release_runs(store: TrackingStore, model: str, target: str) -> dict[int, RunLink]:
    """The run that measured the engine of each release, by the release's number, as far as MLflow knows them."""
    found: dict[int, RunLink] = {}
    # What is in use comes last, so that its runs are the ones that a number stands for.
    versions = [store.client.search_model_versions(f"name = '{name}'") for name in reversed(_names(model))]
    for version in chain.from_iterable(versions):
        numbers = [key.removeprefix(RELEASES) for key in version.tags if key.startswith(RELEASES)]
        if version.tags.get(f"{TAG}target") != target or not numbers or not version.run_id:
            continue
        run = store.run(version.run_id)
        if run is not None:
            found |= {int(number): store.link(run) for number in numbers if number.isdigit()}
    return found
