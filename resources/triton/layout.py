"""The layout of a Triton model repository, read from the repository itself. Everything here is pure or only reads.

minilm/config.pbtxt                  the pointer: the public ensemble, pinned to one release
minilm/<N>/release.json              the manifest of release N; Triton needs the folder, and git drops empty folders
minilm/<N>/config.pbtxt              the pointer as release N wrote it; a rollback copies it one folder up
minilm__r<N>__pipeline/1/...         immutable: one Python model with the tokenizer and the engine

On Triton's own backends (flavour native), a release has two such internal models in place of the pipeline:

minilm__r<N>__tokenizer/1/...        tasks with structured answers have a `pipeline` instead, which calls the engine
minilm__r<N>__engine/1/...

The models of this project are known by these names alone. All other models in the repository are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from resources.artifacts.gc import digests_in
from resources.errors import ReleaseError
from resources.storage.locations import Location
from resources.storage.objects import LISTING_SECONDS, RemotePath
from resources.triton.release import Release

CONFIG = "config.pbtxt"
MANIFEST = "release.json"
#: A `proof` exists only while a release is tested on the servers of its own repository.
Part = Literal["tokenizer", "pipeline", "engine", "proof"]
#: Numbers have at most nine digits. A bucket may hold any name, and Python refuses to parse very long numbers.
_INTERNAL = re.compile(r"(?P<model>.+)__r(?P<number>\d{1,9})__(?P<part>tokenizer|pipeline|engine|proof)")
_STEP = re.compile(r'model_name\s*:\s*"([^"]+)"')
_QUOTED = re.compile(r'"([^"]+)"')
#: This matches the form that protobuf's text format writes, and the form that people write:
#: `version_policy: { specific: { versions: [3] } }`.
_PINNED = re.compile(r"version_policy\s*:?\s*{\s*specific\s*:?\s*{\s*versions\s*:\s*\[?\s*(\d{1,9})\b")


def internal_name(model: str, number: int, part: Part) -> str:
    """Return the folder of one part of a release, which is also its name in Triton."""
    return f"{model}__r{number}__{part}"


def internal_names(release: Release) -> list[str]:
    """Return the folders of a release's internal models."""
    return sorted({name.split("/")[0] for name in release.files})


def named_internals(config: str) -> list[str]:
    """Return the internal models that a public model's configuration names.

    Models that are not steps come first. Triton loads an ensemble's steps by itself, but not the engine that a step
    calls, which a parameter names.
    """
    steps = _STEP.findall(config)
    named = dict.fromkeys(name for name in _QUOTED.findall(config) if parse_internal(name) is not None)
    return sorted(named, key=lambda name: name in steps)


def called_internals(config: str) -> list[str]:
    """Return the internal models that must be loaded before the public model of this configuration."""
    steps = _STEP.findall(config)
    return [name for name in named_internals(config) if name not in steps]


def parse_internal(name: str) -> tuple[str, int, str] | None:
    """Return the model, release number and part in an internal model's name, or None for any other name."""
    match = _INTERNAL.fullmatch(name)
    return (match["model"], int(match["number"]), match["part"]) if match else None


@contextmanager
def _reading() -> Iterator[None]:
    """Turn OSError into ReleaseError.

    A file that cannot be read must not count as missing, because releases are removed when files are missing.
    """
    try:
        yield
    except OSError as error:
        raise ReleaseError(
            f"{error.filename or 'The repository'} could not be read: {error.strerror or error}. Mend that and run "
            "again. What served before goes on serving."
        ) from error


@_reading()
def public_models(repository: Location) -> list[str]:
    """Return the names of the models that users send requests to."""
    if not repository.is_dir():
        return []
    return sorted(
        path.name for path in repository.iterdir() if (path / CONFIG).is_file() and parse_internal(path.name) is None
    )


def public_pointers(repository: Path) -> dict[str, str]:
    """Return the configurations of the public models by name. Those that cannot be read are left out."""
    found = {}
    for model in public_models(repository):
        with suppress(OSError, UnicodeDecodeError):
            found[model] = (repository / model / CONFIG).read_text(encoding="utf-8")
    return found


@_reading()
def read_release(repository: Location, model: str, number: int) -> Release | None:
    """Return the manifest of a release, or None if it is missing or damaged.

    Raises:
        ReleaseError: The manifest cannot be read.
    """
    try:
        return Release.model_validate_json((repository / model / str(number) / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValidationError, UnicodeDecodeError):
        return None


@_reading()
def is_whole(repository: Location, release: Release) -> bool:
    """Return whether every file of the release is there and has its size.

    The content is not read, because releases hold gigabytes.
    """
    pointer = repository / release.model / str(release.number) / CONFIG
    if not pointer.is_file() or damaged_files(repository, release):
        return False
    # An object is there complete or not at all.
    if release.pointer is None or isinstance(pointer, RemotePath):
        return True
    return pointer.stat().st_size == release.pointer.size_bytes


@_reading()
def damaged_files(repository: Location, release: Release) -> list[str]:
    """Return the files of the release's internal models that are missing or have another size."""
    if isinstance(repository, RemotePath):
        # One listing a folder replaces one request a file, and a release has fifty files.
        names = internal_names(release)
        there = {f"{name}/{path}": size for name in names for path, size in (repository / name).sizes().items()}
        return [name for name, file in release.files.items() if there.get(name) != file.size_bytes]
    paths = ((name, repository / name, file.size_bytes) for name, file in release.files.items())
    return [name for name, path, size in paths if not path.is_file() or path.stat().st_size != size]


@_reading()
def artifacts_of_releases(root: Location) -> set[str]:
    """Return all digests that the manifests of the repositories below the root name.

    The manifests of releases that wait for their proof are read too. The digests include those of the artifacts that
    the releases were made of.

    Raises:
        ReleaseError: A manifest cannot be read.
    """
    found: set[str] = set()
    for manifest in _manifests(root):
        with suppress(FileNotFoundError):  # the release has just been removed
            # The manifest may be damaged or of another version, so it is not parsed as a Release.
            found |= digests_in(manifest.read_bytes())
    return found


def _manifests(root: Location) -> Iterator[Location]:
    if isinstance(root, RemotePath):  # one listing, where walking the folders takes several requests for each
        yield from (root / name for name in root.listing(timeout_s=LISTING_SECONDS) if name.endswith(f"/{MANIFEST}"))
        return
    waiting = (place for target in _folders(root / "unverified") for place in _folders(target))
    for repository in (*_folders(root), *waiting):
        for model in _folders(repository):
            if parse_internal(model.name) is None:
                yield from (model / str(number) / MANIFEST for number in release_numbers(repository, model.name))


def _folders(place: Location) -> list[Location]:
    return [path for path in place.iterdir() if path.is_dir() and path.name[0] != "."] if place.is_dir() else []


@_reading()
def release_numbers(repository: Location, model: str) -> list[int]:
    """Return the numbers of a model's releases, complete or not, oldest first."""
    return [
        number for number in _versions(repository / model) if (repository / model / str(number) / MANIFEST).is_file()
    ]


def list_releases(repository: Location, model: str) -> list[Release]:
    """Return all complete releases of a model in the repository, oldest first."""
    found = (read_release(repository, model, number) for number in _versions(repository / model))
    return [release for release in found if release is not None and is_whole(repository, release)]


def pinned_number(config: str) -> int | None:
    """Return the number of the release that a public model's configuration names, or None."""
    match = _PINNED.search(config)
    return int(match[1]) if match else None


@_reading()
def current_number(repository: Location, model: str) -> int | None:
    """Return the number of the release that the public model names, or None if the model was never published.

    Raises:
        ReleaseError: The pointer cannot be read.
    """
    try:
        return pinned_number((repository / model / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None


def current_release(repository: Location, model: str) -> Release | None:
    """Return the release that serves, or None if the model was never published or the manifest cannot be used."""
    number = current_number(repository, model)
    return read_release(repository, model, number) if number is not None else None


@_reading()
def is_published_here(repository: Location, model: str) -> bool:
    """Return whether the public model's folder holds a release of this project."""
    return any((repository / model / str(number) / MANIFEST).is_file() for number in _versions(repository / model))


@_reading()
def highest_number(repository: Location, model: str) -> int:
    """Return the largest release number that is visible for a model, or 0.

    Incomplete releases count too, because numbers are not reused.
    """
    numbers = [0, *_versions(repository / model)]
    if repository.is_dir():
        parsed = (parse_internal(path.name) for path in repository.iterdir())
        numbers += [number for item in parsed if item is not None for name, number, _ in [item] if name == model]
    return max(numbers)


@_reading()
def _versions(folder: Location) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("[0-9]{1,9}", path.name))
