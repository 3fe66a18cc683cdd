"""Cleaning up: old releases go, those that serve or may be wanted back stay."""

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

#: After the pointer was moved, a server that polls and that nobody named may answer with the release before it for so
#: long: Triton looks every 15 seconds, unless told otherwise, and has to load.
FOLLOW_SECONDS = 30.0


@dataclass(frozen=True)
class Retained:
    """Numbers of the releases that stay, each with the reason, and of those that went."""

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
    """Remove all releases of a model but the newest `keep`, what is pointed to, what is `wanted`, and what is served.

    wanted: reasons by number. The settings' servers have to answer, and unload what goes. asked: addresses of others
    that may hold a release; those that do not answer hold none. Where the settings name no server, nothing goes sooner
    than `FOLLOW_SECONDS` after the pointer was moved; that is waited for. Damaged releases go, and do not count. Killed
    at any moment, what is left of a release is no release any more and is swept up by whoever changes the repository
    next. Raises ReleaseError, ServerError.
    """
    if keep < 1:
        raise ReleaseError(f"{model}: keep at least 1 release, not {keep}.")
    if not is_published_here(repository, model):
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    with clear_disk_errors(model, repository, 0), repository_lock(repository), ExitStack() as stack:
        fleet = stack.enter_context(Fleet(settings))
        # Where the pointer is not what a release wrote, what it does not name may be what serves.
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
        # What a killed publisher has proven waits for the next one: a clean-up moves no pointer.
        gone = sweep(repository, finish=False, later=True)
        removed = tuple(number for number in release_numbers(repository, model) if number not in kept)
        if removed and not settings.servers:
            _let_follow(repository / model / CONFIG)
        for number in removed:
            _remove(repository, model, number, fleet)
        fleet.retire(gone)
        return Retained(dict(sorted(kept.items())), removed)


def _let_follow(pointer: Location) -> None:
    """Sleep until servers that poll have had the time to follow. A rename sets the time of a file's last change; what
    a store says of it is by a clock of its own, so there it is always slept in full.
    """
    left = FOLLOW_SECONDS
    if isinstance(pointer, Path):
        left = min(max(0.0, pointer.stat().st_ctime + FOLLOW_SECONDS - time.time()), FOLLOW_SECONDS)
    time.sleep(left)


def _remove(repository: Location, model: str, number: int, fleet: Fleet) -> None:
    root = staging_root(repository)
    parsed = {path.name: parse_internal(path.name) for path in contents(repository)}
    internals = [name for name, found in parsed.items() if found is not None and found[:2] == (model, number)]
    # The manifest first: without it the rest is no release, wherever this ends.
    discard(repository / model / str(number), root)
    _sync_if_room(repository / model)
    fleet.retire(internals)
    for name in internals:
        discard(repository / name, root)
    _sync_if_room(repository)


def _sync_if_room(folder: Location) -> None:
    """Make removals durable. A disk that is too full for that gets its room by the removals that follow."""
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
