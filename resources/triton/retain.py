"""Remove old releases, and keep those that serve or that a rollback may need."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from resources.errors import FULL, ReleaseError, ServerError
from resources.settings.triton import TritonSettings
from resources.storage.locations import Location, contents
from resources.triton.client import TextClient
from resources.triton.files import clear_disk_errors, discard, repository_lock, staging_root, sync
from resources.triton.fleet import Fleet
from resources.triton.layout import (
    CONFIG,
    is_published_here,
    list_releases,
    parse_internal,
    release_numbers,
)
from resources.triton.pointer import current_problem, require_current, require_own_pointer
from resources.triton.publish import sweep

#: For this long after the pointer was moved, a polling server that the settings do not name may still answer with the
#: former release. Triton polls every 15 seconds by default, and then has to load the release.
FOLLOW_SECONDS = 30.0


@dataclass(frozen=True)
class Retained:
    """The result of a clean-up.

    Args:
        kept: The numbers of the releases that stay, each with the reason.
        removed: The numbers of the releases that were removed.
    """

    kept: dict[int, str]
    removed: tuple[int, ...]


def retain(
    repository: Location,
    model: str,
    *,
    keep: int,
    wanted: Mapping[int, str] = MappingProxyType({}),
    settings: TritonSettings = TritonSettings(),  # noqa: B008 - frozen
    asked: Collection[str] = (),
) -> Retained:
    """Remove the releases of a model, except the newest `keep`, the current one, and those wanted or served.

    Damaged releases are removed, and do not count towards `keep`. If the settings name no server, the function waits
    until `FOLLOW_SECONDS` after the last move of the pointer before it removes anything. If the process is killed, a
    release that is partly removed is no release any more, and the next process that changes the repository removes the
    rest.

    Args:
        repository: The repository that holds the model.
        model: The public model.
        keep: How many of the newest releases stay, at least 1.
        wanted: Releases that stay for another reason: the reason, by the release's number.
        settings: The settings that name the servers. All of them have to answer, and they unload what is removed.
        asked: Addresses of other servers that may hold a release. A server that does not answer holds none.

    Raises:
        ReleaseError: `keep` is less than 1, no whole release serves, the pointer was edited, or the repository cannot
            be written.
        ServerError: A server of the settings does not answer.
    """
    if keep < 1:
        raise ReleaseError(f"{model}: keep at least 1 release, not {keep}.")
    if not is_published_here(repository, model):
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    with clear_disk_errors(model, repository, 0), repository_lock(repository), ExitStack() as stack:
        fleet = stack.enter_context(Fleet(settings))
        # If the pointer is not as a release wrote it, a release that it does not name may be the one that serves.
        serves = require_current(repository, model)
        require_own_pointer(repository, serves)
        whole, current = [release.number for release in list_releases(repository, model)], serves.number
        kept = dict.fromkeys(whole[-keep:], f"one of the newest {keep}")
        kept |= {number: why for number, why in wanted.items() if number in whole}
        kept |= {
            number: f"served at {address}"
            for address in asked
            if (number := _served(address, model, settings)) in whole
        }
        for address in settings.servers:
            if (number := _require_served(address, model, settings)) in whole:
                kept[number] = f"served at {address}"
        kept[current] = "what is pointed to"
        # A release that a killed publisher has proven waits for the next publisher. A clean-up never moves a pointer.
        gone = sweep(repository, finish=False, later=True)
        removed = tuple(number for number in release_numbers(repository, model) if number not in kept)
        if removed and not settings.servers:
            _let_follow(repository / model / CONFIG)
        for number in removed:
            _remove(repository, model, number, fleet)
        fleet.retire(gone)
        return Retained(dict(sorted(kept.items())), removed)


def _let_follow(pointer: Location) -> None:
    """Sleep until polling servers have had the time to follow the pointer.

    In a folder, the time of the last move is known, because a rename sets the file's change time. An object store
    states times by its own clock, so there the function always sleeps for the full `FOLLOW_SECONDS`.
    """
    left = FOLLOW_SECONDS
    if isinstance(pointer, Path):
        left = min(max(0.0, pointer.stat().st_ctime + FOLLOW_SECONDS - time.time()), FOLLOW_SECONDS)
    time.sleep(left)


def _remove(repository: Location, model: str, number: int, fleet: Fleet) -> None:
    root = staging_root(repository)
    parsed = {path.name: parse_internal(path.name) for path in contents(repository)}
    internals = [name for name, found in parsed.items() if found is not None and found[:2] == (model, number)]
    # The manifest goes first. Without it the rest is no release, even if this process is killed now.
    discard(repository / model / str(number), root)
    _sync_if_room(repository / model)
    fleet.retire(internals)
    for name in internals:
        discard(repository / name, root)
    _sync_if_room(repository)


def _sync_if_room(folder: Location) -> None:
    """Make removals durable, unless the disk is too full for that. The removals that follow then make room."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in FULL:
            raise


def _require_served(address: str, model: str, settings: TritonSettings) -> int | None:
    with TextClient(address, connection=settings.connection_to(address)) as client:
        if not client.is_live():
            raise ServerError(
                f"No Triton answers gRPC at {address} (REFINERY_TRITON_GRPC), so nobody knows which release it holds, "
                "and nothing is removed. Start it, or leave it out of the variable."
            )
        return client.release_of(model) if client.is_ready(model) else None


def _served(address: str, model: str, settings: TritonSettings) -> int | None:
    with TextClient(address, connection=settings.connection_to(address)) as client, suppress(ServerError):
        return client.release_of(model)
    return None
