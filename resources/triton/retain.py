"""Cleaning up: old releases go, those that serve or may be wanted back stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from resources.errors import ReleaseError, ServerError
from resources.triton.client import TextClient
from resources.triton.files import clear_disk_errors, discard, repository_lock, staging_root, sync
from resources.triton.layout import current_number, is_published_here, parse_internal, release_numbers
from resources.triton.publish import sweep


@dataclass(frozen=True)
class Retained:
    """Numbers of the releases that stay, each with the reason, and of those that went."""

    kept: dict[int, str]
    removed: tuple[int, ...]


def retain(
    repository: Path,
    model: str,
    *,
    keep: int,
    wanted: Mapping[int, str] = MappingProxyType({}),
    servers: Collection[str] = (),
) -> Retained:
    """Remove all releases of a model but the newest `keep`, what is pointed to, what is `wanted`, and what is served.

    wanted: reasons by number. servers: gRPC addresses of servers in explicit model control, asked which release they
    hold; those of what goes are unloaded first. One that is not there, or does not know the model, holds none. Killed
    at any moment, what is left of a release is no release any more and is swept up by whoever changes the repository
    next. Raises ReleaseError.
    """
    if keep < 1:
        raise ReleaseError(f"{model}: keep at least 1 release, not {keep}.")
    if not is_published_here(repository, model):
        raise ReleaseError(f"{model}: no release of it is in {repository}.")
    with clear_disk_errors(model, repository, 0), repository_lock(repository):
        sweep(repository)
        numbers = release_numbers(repository, model)
        kept = dict.fromkeys(numbers[-keep:], f"one of the newest {keep}")
        kept |= {number: why for number, why in wanted.items() if number in numbers}
        kept |= {
            number: f"served at {address}" for address in servers if (number := _served(address, model)) in numbers
        }
        current = current_number(repository, model)
        if current is None:
            raise ReleaseError(f"{model}: its config.pbtxt names no release, so nothing is removed. Mend it first.")
        kept[current] = "what is pointed to"
        removed = tuple(number for number in numbers if number not in kept)
        for number in removed:
            _remove(repository, model, number, servers)
        return Retained(dict(sorted(kept.items())), removed)


def _remove(repository: Path, model: str, number: int, servers: Collection[str]) -> None:
    root = staging_root(repository)
    internals = [
        path for path in sorted(repository.iterdir()) if (parse_internal(path.name) or ())[:2] == (model, number)
    ]
    # The manifest first: without it the rest is no release, wherever this ends.
    discard(repository / model / str(number), root)
    sync(repository / model)
    for address in servers:
        with TextClient(address) as client:
            for path in internals:
                with suppress(ServerError):  # most were not loaded
                    client.unload(path.name)
    for path in internals:
        discard(path, root)
    sync(repository)


def _served(address: str, model: str) -> int | None:
    with TextClient(address) as client, suppress(ServerError):
        return client.release_of(model)
    return None
