"""Verify that a release is still what was published.

Its files are compared with the manifest, and a real server has to answer with it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from resources.artifacts.records import sha256_file
from resources.errors import ReleaseError
from resources.settings.triton import TritonSettings
from resources.storage.locations import Location
from resources.triton.asking import ask, write_alias
from resources.triton.client import TextClient
from resources.triton.files import READ_ONLY, clear_disk_errors, lock_to_read, on_this_machine, staging_folder
from resources.triton.fleet import Fleet
from resources.triton.layout import (
    CONFIG,
    current_number,
    internal_names,
    list_releases,
    named_internals,
    pinned_number,
    read_release,
)
from resources.triton.pointer import command, current_problem, require_own_pointer
from resources.triton.release import Release, require_embeddable, stored
from resources.triton.server import EmbeddedServer


def find_release(repository: Location, model: str, number: int) -> Release:
    """Return the manifest of a release.

    Raises:
        ReleaseError: There is no such release. The message lists those that there are.
    """
    release = read_release(repository, model, number)
    if release is None:
        there = ", ".join(str(other.number) for other in list_releases(repository, model)) or "none"
        raise ReleaseError(f"{model}: there is no release {number} in {repository} (there: {there}).")
    return release


def differences_from_manifest(repository: Path, release: Release) -> list[str]:
    """Return a sentence for each file that differs from what was published. Every byte is read."""
    found = []
    for name, file in release.files.items():
        path = repository / name
        if not path.is_file():
            found.append(f"{name} is missing.")
        elif path.stat().st_size != file.size_bytes or sha256_file(path) != file.sha256:
            found.append(f"{name} was changed.")
    for internal in internal_names(release):
        there = (path for path in sorted((repository / internal).rglob("*")) if path.is_file())
        names = (path.relative_to(repository).as_posix() for path in there)
        found += [f"{name} was added." for name in names if name not in release.files]
    pointer = repository / release.model / str(release.number) / CONFIG
    place = pointer.relative_to(repository)
    try:
        config = pointer.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return [*found, f"{place} is missing or not readable."]
    if pinned_number(config) != release.number or sorted(named_internals(config)) != internal_names(release):
        found.append(f"{place} was changed: it names another release.")
    elif release.pointer is not None and stored(pointer) != release.pointer:
        found.append(f"{place} was changed.")
    return found


def verify_release(
    repository: Location, model: str, settings: TritonSettings, number: int | None = None, *, log: Path
) -> tuple[Release, str]:
    """Verify a release: its files are those that were published, and a server answers with it.

    Args:
        repository: The repository that holds the release.
        model: The public model.
        settings: The settings that name the servers.
        number: The release's number. None selects the release that the pointer names.
        log: The log file of the embedded server.

    Returns:
        The release, and a phrase that names the server.

    Raises:
        ReleaseError: There is no such release, it is not what was published, or no server here can load it.
        ServerError: A server does not answer, or not with the release.
    """
    with clear_disk_errors(model, repository, 0), lock_to_read(repository) as alone:
        current = current_number(repository, model)
        if number is None and (current is None or read_release(repository, model, current) is None):
            raise ReleaseError(f"{model}: {current_problem(repository, model)}")
        release = find_release(repository, model, number or current or 0)
        with on_this_machine(repository, release, alone=alone) as copy:
            require_unchanged(copy, release, repository)
            if current == release.number:
                require_own_pointer(repository, release)
            if release.flavour == "native" and settings.servers:
                if current == release.number:
                    for address in settings.servers:
                        with TextClient(address, connection=settings.connection_to(address)) as client:
                            ask(client, repository, release)
                else:
                    _ask_aside(repository, release, settings, writable=alone)
                return release, f"Triton at {' and '.join(settings.servers)}"
            ask_embedded(copy, release, settings, log)
            return release, "an embedded server"


def _ask_aside(repository: Location, release: Release, settings: TritonSettings, *, writable: bool) -> None:
    """Have the configured servers load a release that does not serve, under a name of its own, and answer with it."""
    name = f"{release.model}: release {release.number} does not serve"
    if not settings.driven:
        raise ReleaseError(
            f"{name}, and servers without model control cannot load it beside what does. Start one in explicit or poll "
            "model control, and say so in REFINERY_TRITON_CONTROL."
        )
    if not writable:
        raise ReleaseError(
            f"{name}, and to have a server load it beside what does, a second name has to be written to {repository}. "
            "Run this as a user who may write there."
        )
    with Fleet(settings) as fleet:
        fleet.require_ready()
        try:
            fleet.ask_aside(repository, release)
        finally:
            if release.number not in fleet.served(release.model):
                fleet.retire(internal_names(release))


def require_unchanged(copy: Path, release: Release, repository: Location) -> None:
    """Raise ReleaseError if the release is not what was published. The message names the files.

    `copy` is the repository itself, or the folder to which the release was downloaded.
    """
    found = differences_from_manifest(copy, release)
    if found:
        # Publishing again does not replace a release that does not serve, because somebody may have rolled back to
        # another. Such a release has to be removed first.
        serves = current_number(repository, release.model) == release.number
        first = "" if serves else f"remove {repository / release.model / str(release.number)} and "
        raise ReleaseError(
            f"{release.model}: release {release.number} is not what was published: {' '.join(found[:5])} "
            f"Choose another release, or {first}publish again: {command('optimize', repository, release.model)}."
        )


def ask_embedded(repository: Path, release: Release, settings: TritonSettings, log: Path) -> None:
    """Have an embedded server, started for this alone, answer with the release. The repository is not changed.

    The caller holds the repository's lock.

    Raises:
        ReleaseError: The release needs a backend that the embedded server does not have.
        ServerError: The server does not load the release, or does not answer with it.
    """
    require_embeddable(
        release,
        "Set REFINERY_TRITON_GRPC to a server that has them and serves the repository, and REFINERY_TRITON_CONTROL to "
        "its model control, explicit or poll",
    )
    with _room(repository) as root:
        for name in release.files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            _link(repository / name, root / name)
        alias = write_alias(repository, release, root)
        server = EmbeddedServer(root, settings, models=[alias], log=log)
        with server, server.client() as client:
            ask(client, repository, release, alias)


@contextmanager
def _room(repository: Path) -> Iterator[Path]:
    """Yield a folder beside the repository, to which files can be linked.

    The folder is elsewhere if this user may not write beside the repository.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(staging_folder(repository))
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refinery-verify-")))
        yield folder


def _link(source: Path, target: Path) -> None:
    """Link a file to another place, and copy it only if that fails, because an engine may have gigabytes."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
