"""Checkpoints in an MLflow model registry: `models:/name@alias`, `models:/name/latest`, `models:/name/3`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resources.artifacts.fingerprint import fingerprint
from resources.boundary.addresses import Address
from resources.boundary.deadlines import within
from resources.boundary.foreign import (
    MOST_TOKENIZER_BYTES,
    ForeignError,
    check_name,
    is_file_below,
    local_path,
    read_below,
)
from resources.checkpoints.reading import ADAPTER, IS_ADAPTER, MERGE_REMEDY
from resources.checkpoints.sources.copies import kept, kept_copy
from resources.errors import CheckpointError, UnfetchedError, first_line
from resources.processes.downloads import download_apart
from resources.processes.variables import CLOUD, DATABASE, MLFLOW, NETWORK, PROGRAM, PYTHON, inherited
from resources.settings.sources import SourceSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_FORM = re.compile(r"models:/(?P<name>[^/:@'\"]+)(@(?P<alias>[^/:@]+)|/(?P<version>[1-9]\d*|latest))")
#: The beginnings of the address and of the tags that resources.tracking writes when it registers an engine.
_OWN_ADDRESS, _OWN_TAG = "refinery:", "refinery."
#: The status of a usable version. Versions of another status are still being registered, or could not be.
_READY = "READY"
#: The time limit of one request to MLflow, the import of its client included. The client's own limits start anew with
#: each byte of a response.
_ASK_SECONDS = 60.0
#: A logged model has some ten files. MLflow's description of it has some kilobytes, its signature included.
_MOST_FILES = 10_000
_MOST_DESCRIPTION_BYTES = 2**18
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Reference:
    """The version that a source names: a number, an alias, or, without either, the latest version."""

    source: str
    name: str
    version: str | None = None
    alias: str | None = None

    @property
    def pinned(self) -> bool:
        """Return whether the source names a version by its number, which never changes."""
        return self.version is not None


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Args:
        name: The model's name.
        number: The version's number.
        address: The address of the version's files, as MLflow has it.
        status: MLflow's status of the version.
        made: MLflow's time of creation, in milliseconds.
        tags: The version's tags.
    """

    name: str
    number: str
    address: str
    status: str
    made: int
    tags: Mapping[str, str]

    @property
    def revision(self) -> str:
        """The revision: `v3-` and a digest of the address and the time, for version 3.

        The digest tells apart two models of one name. If a model is deleted and registered anew, its numbers start at 1
        again.
        """
        return f"v{self.number}-{fingerprint('version', address=self.address, made=self.made)[:8]}"


def parse_reference(source: str) -> Reference:
    """Parse a source of the form `models:/...`.

    Raises:
        CheckpointError: The source has another form.
    """
    match = _FORM.fullmatch(source)
    if match is None:
        raise CheckpointError(
            f"source: {source!r} names no version of a registered model. Write models:/name@alias, models:/name/latest "
            "or models:/name/3."
        )
    version = match["version"]
    return Reference(source, match["name"], None if version == "latest" else version, match["alias"])


def is_own(address: str, tags: Iterable[str]) -> bool:
    """Return whether a version is an engine that this project registered itself."""
    return address.startswith(_OWN_ADDRESS) or any(tag.startswith(_OWN_TAG) for tag in tags)


def source_names(sources: Iterable[str]) -> frozenset[str]:
    """Return the names of the registered models from which the sources take checkpoints."""
    found = set()
    for source in sources:
        if source.startswith("models:"):
            with suppress(CheckpointError):  # a look at a source of another form reports it
                found.add(parse_reference(source).name)
    return frozenset(found)


def checked(reference: Reference, version: Version) -> Version:
    """Return the version if it can be a checkpoint.

    Raises:
        CheckpointError: This project registered the version as an engine, or it is not ready.
    """
    if is_own(version.address, version.tags):
        raise CheckpointError(
            f"source: {reference.source}: version {version.number} of {version.name!r} is an engine that this project "
            "registered itself, not a checkpoint. Write the number or an alias of the checkpoint's version, or "
            "register the checkpoint once more, so that it is the latest."
        )
    if version.status != _READY:
        raise CheckpointError(
            f"source: {reference.source}: version {version.number} of {version.name!r} is {version.status}, not "
            f"{_READY}. Wait until it is registered, or register it again."
        )
    return version


def missing(reference: Reference, tracking_uri: Address) -> CheckpointError:
    """Return the error for a version that the registry does not have."""
    return CheckpointError(
        f"source: {reference.source}: the registry at {tracking_uri} has no such version. Check the name, and the "
        "alias or version, on MLflow's page. To use another registry, set REFINERY_MLFLOW_URI."
    )


def unanswered(reference: Reference, tracking_uri: Address, error: BaseException) -> CheckpointError:
    """Return the error for a registry that could not be asked."""
    return CheckpointError(
        f"source: {reference.source}: the registry at {tracking_uri} gave no usable answer: {first_line(error)}. "
        "Start that server, or correct REFINERY_MLFLOW_URI or MLFLOW_TRACKING_TOKEN."
    )


def find_version(source: str, settings: SourceSettings) -> Version:
    """Return the version that the source names now, by MLflow's own client, which takes seconds to import.

    Raises:
        CheckpointError: The registry cannot be asked or has no such version, or the version cannot be a checkpoint.
    """
    from mlflow.exceptions import MlflowException

    reference, uri = parse_reference(source), settings.tracking_uri
    try:
        found = within(_ASK_SECONDS, partial(_find, reference, uri))
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code in _MISSING:
            raise missing(reference, uri) from uri.without_secrets(error)
        shown = uri.without_secrets(error)
        raise unanswered(reference, uri, shown) from shown
    version = Version(
        name=found.name,
        number=str(found.version),
        address=str(found.source),
        status=str(found.status),
        made=int(found.creation_timestamp),
        tags=dict(found.tags),
    )
    return checked(reference, version)


def _find(reference: Reference, uri: Address) -> ModelVersion:
    client = _client(uri)
    if reference.alias is not None:
        return client.get_model_version_by_alias(reference.name, reference.alias)
    if reference.version is not None:
        return client.get_model_version(reference.name, reference.version)
    newest = client.search_model_versions(f"name = '{reference.name}'", max_results=1, order_by=["version_number DESC"])
    if not newest:
        raise missing(reference, uri)
    return newest[0]


def fetch_version(source: str, settings: SourceSettings, *, fetch: bool = True) -> tuple[Path, str]:
    """Return the folder with the local copy of the version's checkpoint, and its revision.

    The copy is downloaded if it does not exist.

    Raises:
        CheckpointError: The version cannot be found or downloaded, or holds no checkpoint.
        UnfetchedError: `fetch` is false, and there is no copy.
    """
    version, what = find_version(source, settings), f"{settings.tracking_uri} {source}"
    if not fetch and kept(settings.folder / "registry", what, version.revision) is None:
        raise UnfetchedError(source, version.revision)

    def download(folder: Path) -> None:
        uri = settings.tracking_uri
        # Artifacts may lie in object storage, and MLflow takes the keys for it from environment variables.
        variables = inherited(PROGRAM, PYTHON, NETWORK, MLFLOW, secrets=(*MLFLOW, *DATABASE, *CLOUD))
        if uri.is_web and settings.mlflow_login is not None:
            name, password = settings.mlflow_login
            variables |= {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
        try:
            arguments = (uri, source, version.name, version.number, folder)
            download_apart(_download, *arguments, folder=folder, variables=variables)
        except (TimeoutError, ConnectionError) as error:
            shown = uri.without_secrets(error)
            raise CheckpointError(
                f"source: {source}: the files of version {version.number} cannot be fetched: {first_line(shown)}. "
                "Check that MLflow's artifact store can be reached from this machine, and that its credentials are set."
            ) from shown
        _join_tokenizers(folder)

    copy = kept_copy(settings.folder / "registry", what, version.revision, download)
    return _checkpoint_in(source, copy), version.revision


def _download(uri: Address, source: str, name: str, number: str, folder: Path) -> None:
    """Download the files of a version.

    This runs in a child process, because MLflow sets no time limit for a response that arrives slowly.

    Raises:
        CheckpointError: The version holds a file that is not safe to copy.
    """
    from mlflow.artifacts import download_artifacts

    address = _client(uri).get_model_version_download_uri(name, number)
    try:
        _check_listing(address, uri)
    except ForeignError as error:
        raise CheckpointError(
            f"source: {source}: the files of version {number} are not safe to download: {error}. Log the model again "
            "with mlflow."
        ) from error
    download_artifacts(artifact_uri=address, dst_path=str(folder), tracking_uri=uri.for_library)


def _check_listing(address: str, uri: Address) -> None:
    """Check the names of a version's files before they are downloaded.

    Raises:
        ForeignError: A name would lead out of the folder of the copy, or the artifact store is a folder on this machine
            and a file in it is a link that leads out of it. The error is also raised for too many files.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository, left, seen = get_artifact_repository(address, tracking_uri=uri.for_library), [""], 0
    # For addresses such as models:/..., the repository wraps another one in its attribute `repo`.
    here = getattr(getattr(repository, "repo", repository), "artifact_dir", None)
    while left:
        for one in repository.list_artifacts(left.pop()):
            check_name(one.path)
            if here is not None and not one.is_dir:
                is_file_below(Path(here), one.path)
            seen += 1
            if seen > _MOST_FILES:
                raise ForeignError(f"{address} lists more than {_MOST_FILES} files")
            if one.is_dir:
                left.append(one.path)


def _client(uri: Address) -> MlflowClient:
    import mlflow

    mlflow.set_tracking_uri(uri.for_library)  # MLflow looks up addresses such as models:/m-1234 at this global address
    return mlflow.MlflowClient(uri.for_library)


def _checkpoint_in(source: str, folder: Path) -> Path:
    """Find the folder that transformers can read among the downloaded files of a version.

    Raises:
        CheckpointError: There is none.
    """
    for root, name, fields in _flavors(folder):
        if name == "transformers" and fields.get("model_binary"):
            return _within(root, fields["model_binary"])
        if name == "transformers" and isinstance(fields.get("source_model_name"), str):
            raise CheckpointError(
                f"source: {source} holds no weights, only the name of a Hub model. Give that name as the source "
                f"({fields['source_model_name']:.100}), or log the model with save_pretrained=True."
            )
        if name == "sentence_transformers" and fields.get("data"):
            return _within(root, fields["data"])
    found = sorted({path.parent for path in folder.rglob("config.json")}, key=lambda path: len(path.parts))
    if not found and any(folder.rglob(ADAPTER)):
        raise CheckpointError(f"source: {source}: {IS_ADAPTER}. {MERGE_REMEDY}.")
    if not found:
        raise CheckpointError(
            f"source: {source} holds no Hugging Face checkpoint: there is no config.json among its files. Log it with "
            "mlflow.transformers, or log the folder that save_pretrained wrote."
        )
    return found[0]


def _within(folder: Path, name: object) -> Path:
    """Return the path that an MLmodel file names.

    Raises:
        CheckpointError: The path leads out of the folder.
    """
    try:
        return local_path(folder, name)
    except ForeignError as error:
        raise CheckpointError(
            f"source: its MLmodel file names a path outside the logged model: {error}. Log the model again with mlflow."
        ) from None


def _flavors(folder: Path) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """Yield the flavors of the logged models: the model's folder, the flavor's name, and its fields.

    They are in MLflow's own description, the file MLmodel.
    """
    for path in sorted(folder.rglob("MLmodel")):
        with suppress(
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
            ForeignError,
            yaml.YAMLError,
        ):
            text = read_below(folder, path.relative_to(folder).as_posix(), _MOST_DESCRIPTION_BYTES)
            # libyaml's loader bounds the depth of a document. PyYAML's loader in Python takes minutes for a document of
            # nothing but brackets.
            data = yaml.load(text, yaml.CSafeLoader)
            yield from [(path.parent, str(name), dict(fields)) for name, fields in data["flavors"].items()]


def _join_tokenizers(folder: Path) -> None:
    """Copy the tokenizer into the model's folder.

    MLflow keeps the two apart, and transformers expects both in one folder.
    """
    for root, name, fields in _flavors(folder):
        if name != "transformers" or not fields.get("model_binary"):
            continue
        model = _within(root, fields["model_binary"])
        parts = fields.get("components")
        for part in parts if isinstance(parts, list) else ():
            place = _within(root / "components", part)
            for path in place.glob("*"):
                try:
                    if is_file_below(place, path.name) and not (model / path.name).exists():
                        (model / path.name).write_bytes(read_below(place, path.name, MOST_TOKENIZER_BYTES))
                except (OSError, ForeignError) as error:
                    raise CheckpointError(f"source: {error}. Log the model again with mlflow.") from error
