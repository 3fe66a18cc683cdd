"""Whether a release is still what was published: its files against the manifest, and its answers on a real server."""

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
    """The manifest of a release. Raises ReleaseError with the releases that there are."""
    release = read_release(repository, model, number)
    if release is None:
        there = ", ".join(str(other.number) for other in list_releases(repository, model)) or "none"
        raise ReleaseError(f"{model}: there is no release {number} in {repository} (there: {there}).")
    return release


def differences_from_manifest(repository: Path, release: Release) -> list[str]:
    """What is not as it was published, a sentence for each file; every byte is read."""
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
    """The release of that number, or the one that is pointed to, once it is what was published and a server answered
    with it; and the server. Raises ReleaseError, ServerError."""
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
    """Have the configured servers load and answer with a release that does not serve, under a name of its own."""
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
    """Raise ReleaseError where the release is not what was published, naming the files. copy: the repository, or what
    was downloaded of it.
    """
    found = differences_from_manifest(copy, release)
    if found:
        # One that does not serve is not published again by itself: somebody may have rolled back to another.
        serves = current_number(repository, release.model) == release.number
        first = "" if serves else f"remove {repository / release.model / str(release.number)} and "
        raise ReleaseError(
            f"{release.model}: release {release.number} is not what was published: {' '.join(found[:5])} "
            f"Choose another release, or {first}publish again: {command('optimize', repository, release.model)}."
        )


def ask_embedded(repository: Path, release: Release, settings: TritonSettings, log: Path) -> None:
    """Have an embedded server of its own answer with the release. The repository and what it serves stay as they are.

    For who holds the repository's lock. Raises ReleaseError where its backend is not embedded, ServerError where it
    does not load or answer.
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
    """A folder beside the repository, where files need not be copied; elsewhere where nothing may be written there."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(staging_folder(repository))
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refinery-verify-")))
        yield folder


def _link(source: Path, target: Path) -> None:
    """Gigabytes need not be copied to be looked at."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
