"""The layout of a Triton model repository, read from the repository itself. Everything here is pure or only reads.

minilm/config.pbtxt                  the pointer: the public ensemble, pinned to one release
minilm/<N>/release.json              what release N is; Triton needs the folder, and git would drop it if empty
minilm/<N>/config.pbtxt              the pointer as release N wrote it: rolling back is copying it one folder up
minilm__r<N>__pipeline/1/...         immutable: tokenizer, engine and all, in one Python model

On Triton's own backends (flavour native) it is two, in place of the pipeline:

minilm__r<N>__tokenizer/1/...        tasks with structured answers have a `pipeline`, which calls the engine
minilm__r<N>__engine/1/...

Models that somebody else put into the repository are never touched: ours are known by these names alone.
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
#: A `proof` is there only while a release is proven on a server of its own repository.
Part = Literal["tokenizer", "pipeline", "engine", "proof"]
#: Numbers have nine digits at most. Whoever writes to a bucket may write any, and Python reads no very long ones.
_INTERNAL = re.compile(r"(?P<model>.+)__r(?P<number>\d{1,9})__(?P<part>tokenizer|pipeline|engine|proof)")
_STEP = re.compile(r'model_name\s*:\s*"([^"]+)"')
_QUOTED = re.compile(r'"([^"]+)"')
#: As protobuf's text format writes it, and as people do: `version_policy: { specific: { versions: [3] } }`.
_PINNED = re.compile(r"version_policy\s*:?\s*{\s*specific\s*:?\s*{\s*versions\s*:\s*\[?\s*(\d{1,9})\b")


def internal_name(model: str, number: int, part: Part) -> str:
    """The folder, and so the Triton name, of one part of a release."""
    return f"{model}__r{number}__{part}"


def internal_names(release: Release) -> list[str]:
    """The folders of a release beside the public one."""
    return sorted({name.split("/")[0] for name in release.files})


def named_internals(config: str) -> list[str]:
    """The internals that a public model's configuration names, those first that Triton does not load with it.

    It loads an ensemble's steps by itself, and not the engine that one of them calls, which is named as a parameter.
    """
    steps = _STEP.findall(config)
    named = dict.fromkeys(name for name in _QUOTED.findall(config) if parse_internal(name) is not None)
    return sorted(named, key=lambda name: name in steps)


def called_internals(config: str) -> list[str]:
    """The internals that have to be loaded before the public model of that configuration."""
    steps = _STEP.findall(config)
    return [name for name in named_internals(config) if name not in steps]


def parse_internal(name: str) -> tuple[str, int, str] | None:
    """Model, release number and part of an internal's name; None for any other name."""
    match = _INTERNAL.fullmatch(name)
    return (match["model"], int(match["number"]), match["part"]) if match else None


@contextmanager
def _reading() -> Iterator[None]:
    """What cannot be read is not taken for what is not there: releases are removed on the strength of that."""
    try:
        yield
    except OSError as error:
        raise ReleaseError(
            f"{error.filename or 'The repository'} could not be read: {error.strerror or error}. Mend that and run "
            "again. What served before goes on serving."
        ) from error


@_reading()
def public_models(repository: Location) -> list[str]:
    """Names that a server of this repository answers to."""
    if not repository.is_dir():
        return []
    return sorted(
        path.name for path in repository.iterdir() if (path / CONFIG).is_file() and parse_internal(path.name) is None
    )


def public_pointers(repository: Path) -> dict[str, str]:
    """The configuration of every public model, by name; of those that can be read."""
    found = {}
    for model in public_models(repository):
        with suppress(OSError, UnicodeDecodeError):
            found[model] = (repository / model / CONFIG).read_text(encoding="utf-8")
    return found


@_reading()
def read_release(repository: Location, model: str, number: int) -> Release | None:
    """The manifest of a release; None where it is not there or damaged. Raises ReleaseError where nobody can tell."""
    try:
        return Release.model_validate_json((repository / model / str(number) / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValidationError, UnicodeDecodeError):
        return None


@_reading()
def is_whole(repository: Location, release: Release) -> bool:
    """Whether every file of the release is there in its size. Bytes are not read: releases hold gigabytes."""
    pointer = repository / release.model / str(release.number) / CONFIG
    if not pointer.is_file() or damaged_files(repository, release):
        return False
    # Objects are there whole or not at all.
    if release.pointer is None or isinstance(pointer, RemotePath):
        return True
    return pointer.stat().st_size == release.pointer.size_bytes


@_reading()
def damaged_files(repository: Location, release: Release) -> list[str]:
    """Files of the release's internals that are not there in their size."""
    if isinstance(repository, RemotePath):
        # One question a folder: a release has fifty files.
        names = internal_names(release)
        there = {f"{name}/{path}": size for name in names for path, size in (repository / name).sizes().items()}
        return [name for name, file in release.files.items() if there.get(name) != file.size_bytes]
    paths = ((name, repository / name, file.size_bytes) for name, file in release.files.items())
    return [name for name, path, size in paths if not path.is_file() or path.stat().st_size != size]


@_reading()
def artifacts_of_releases(root: Location) -> set[str]:
    """Digests that the manifests of all repositories below the root name, those of releases that wait for their proof
    too; those of the artifacts that they were made of are among them. Raises ReleaseError where nobody can tell.
    """
    found: set[str] = set()
    for manifest in _manifests(root):
        with suppress(FileNotFoundError):  # somebody has just removed the release
            # Not as a Release: it may be damaged, or of another version.
            found |= digests_in(manifest.read_bytes())
    return found


def _manifests(root: Location) -> Iterator[Location]:
    if isinstance(root, RemotePath):  # one question, where folders would be several for each
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
    """The numbers of a model's releases, whole or not, oldest first."""
    return [
        number for number in _versions(repository / model) if (repository / model / str(number) / MANIFEST).is_file()
    ]


def list_releases(repository: Location, model: str) -> list[Release]:
    """All releases of a model that the repository holds whole, oldest first."""
    found = (read_release(repository, model, number) for number in _versions(repository / model))
    return [release for release in found if release is not None and is_whole(repository, release)]


def pinned_number(config: str) -> int | None:
    """The release that a public model's configuration names."""
    match = _PINNED.search(config)
    return int(match[1]) if match else None


@_reading()
def current_number(repository: Location, model: str) -> int | None:
    """The number of the release that the public model names; None where the model was never published. Raises
    ReleaseError where nobody can tell.
    """
    try:
        return pinned_number((repository / model / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None


def current_release(repository: Location, model: str) -> Release | None:
    """The release that serves; None where the model was never published."""
    number = current_number(repository, model)
    return read_release(repository, model, number) if number is not None else None


@_reading()
def is_published_here(repository: Location, model: str) -> bool:
    """Whether the folder of the public name is one of ours."""
    return any((repository / model / str(number) / MANIFEST).is_file() for number in _versions(repository / model))


@_reading()
def highest_number(repository: Location, model: str) -> int:
    """The largest release number that is to be seen for a model, whole or not; 0 for none. Numbers are not reused."""
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
