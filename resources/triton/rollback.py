"""Going back: pointing to a release that the repository still holds, once a real server has answered with it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resources.errors import ReleaseError, ServerError
from resources.triton.client import TextClient
from resources.triton.files import clear_disk_errors, repository_lock, staging_folder, sync
from resources.triton.layout import (
    CONFIG,
    called_internals,
    current_number,
    is_published_here,
    list_releases,
    named_internals,
)
from resources.triton.publish import sweep
from resources.triton.release import Release
from resources.triton.settings import TritonSettings
from resources.triton.verify import ask, ask_embedded, find_release, require_unchanged


@dataclass(frozen=True)
class RolledBack:
    """The release that is pointed to now, and the number of the one that was."""

    release: Release
    before: int


def roll_back(
    repository: Path, model: str, settings: TritonSettings, *, to: int | None = None, log: Path
) -> RolledBack:
    """Point the public model to an older release, or to any by its number.

    to: its number; None: the newest before the one that is pointed to. A server is asked first, and, where one is
    configured, told to load it, and asked again; an answer that fails puts the pointer back. Publishing the same again
    does not undo it. Raises ReleaseError or ServerError; then what served before serves on.
    """
    if not is_published_here(repository, model):
        raise ReleaseError(f"{model}: no release of it is in {repository}.")
    with clear_disk_errors(model, repository, 0), repository_lock(repository):
        sweep(repository)
        before = current_number(repository, model)
        if before is None:
            raise ReleaseError(
                f"{model}: {repository / model / CONFIG} names no release. Publish one: refinery optimize {model}."
            )
        release = _target(repository, model, before, to)
        if release.number == before:
            raise ReleaseError(f"{model}: release {before} is what is pointed to already.")
        require_unchanged(repository, release)
        if settings.server is None:
            ask_embedded(repository, release, settings, log)
            _point(repository, release)
        else:
            with TextClient(settings.server) as client:
                _switch(repository, release, client)
        return RolledBack(release, before)


def _target(repository: Path, model: str, current: int, to: int | None) -> Release:
    if to is not None:
        return find_release(repository, model, to)
    older = [release for release in list_releases(repository, model) if release.number < current]
    if not older:
        there = ", ".join(str(release.number) for release in list_releases(repository, model)) or "none"
        raise ReleaseError(f"{model}: there is no release before {current} in {repository} (there: {there}).")
    return older[-1]


def _point(repository: Path, release: Release) -> None:
    """Replace the pointer by the release's own, whole."""
    _replace(repository, release.model, (repository / release.model / str(release.number) / CONFIG).read_bytes())


def _replace(repository: Path, model: str, config: bytes) -> None:
    with staging_folder(repository) as scratch:
        (scratch / CONFIG).write_bytes(config)
        sync(scratch / CONFIG)
        (scratch / CONFIG).replace(repository / model / CONFIG)
        sync(repository / model)


def _switch(repository: Path, release: Release, client: TextClient) -> None:
    """On a running server in explicit model control: internals first, then the pointer; back where it fails."""
    if not client.is_live():
        raise ServerError(
            f"No Triton answers gRPC at {client.address} (REFINERY_TRITON_GRPC). Start it, or unset the variable."
        )
    pointer = repository / release.model / CONFIG
    old = pointer.read_bytes()
    config = (repository / release.model / str(release.number) / CONFIG).read_text(encoding="utf-8")
    names = named_internals(config)
    try:
        for name in names:  # beside what serves, which they do not touch
            client.load(name)
        _point(repository, release)
        client.load(release.model, called_internals(config))
        ask(client, repository, release)
    except BaseException:
        if pointer.read_bytes() != old:
            _replace(repository, release.model, old)
            with suppress(ServerError):
                client.load(release.model, called_internals(old.decode()))
        for name in names:
            with suppress(ServerError):  # not all were loaded
                client.unload(name)
        raise
