"""The removal of unneeded artifacts from the store; for object storage see resources.artifacts.remote_gc.

An artifact stays in three cases: a step of the pipeline made it last, somebody outside the store names it (releases
do), or it was used not long ago. Every step touches the artifacts that it takes and makes, so the third case covers
runs under way and the artifacts that newer materializations name. Each artifact that stays keeps the artifacts that it
was made from, which its record and the recipe beside an engine name by digest.

Other processes may work in the store meanwhile. An artifact that is used just before it would be removed is put back. A
process that asks for it a moment later finds that it is missing and makes it again.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from resources.artifacts.records import Record
from resources.artifacts.store import RECORD_FILE, ArtifactStore
from resources.boundary.foreign import MOST_DOCUMENT_BYTES, ForeignError, read_below
from resources.errors import FULL, ArtifactError, disk_remedy
from resources.storage.locks import file_lock
from resources.storage.staging import claimed, discard, leftovers

DAY_SECONDS = 24 * 3600.0
#: A cache may be read long after it was written. File systems note a read once a day, or not at all.
CACHE_SECONDS = 90 * DAY_SECONDS
_DIGEST = re.compile(rb"\b[0-9a-f]{64}\b")
#: The files of an artifact that name other artifacts: see resources.engines.rebuild.
_NAMING = (RECORD_FILE, "rebuild.py")
_KEY_LENGTH = 32


@dataclass
class Amount:
    """A number of artifacts or files, and the bytes that they take on the disk."""

    count: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """Count one more artifact or file of that size."""
        self.count += 1
        self.size_bytes += size_bytes


@dataclass
class Collected:
    """The amounts that were removed, or would be, and those that stay, by kind."""

    removed: dict[str, Amount] = field(default_factory=dict)
    kept: dict[str, Amount] = field(default_factory=dict)

    @property
    def freed_bytes(self) -> int:
        """The bytes of everything that was removed, or would be."""
        return sum(amount.size_bytes for amount in self.removed.values())


class Entry(Protocol):
    """An artifact, wherever it lies. Both members raise FileNotFoundError if it has just been removed."""

    @property
    def used(self) -> float:
        """The time of its last use, in seconds since the epoch."""

    def named(self) -> set[str]:
        """Return the digests of the artifacts that it was made from."""


@dataclass(frozen=True)
class _Entry:
    kind: str
    folder: Path

    @property
    def used(self) -> float:
        record = self.folder / RECORD_FILE
        return (record if record.exists() else self.folder).stat().st_mtime

    def named(self) -> set[str]:
        found: set[str] = set()
        for file in _NAMING:
            with suppress(FileNotFoundError, NotADirectoryError, ForeignError):
                found |= digests_in(read_below(self.folder, file, MOST_DOCUMENT_BYTES))
        return found


def collect(store: ArtifactStore, wanted: Collection[str], *, used_since: float, dry_run: bool = False) -> Collected:
    """Remove the artifacts, leftovers and caches that are not needed, and return the amounts.

    Args:
        store: The artifact store.
        wanted: The digests that somebody outside the store names.
        used_since: A time in seconds since the epoch. Artifacts that were used after it stay. It must be at least a day
            ago, because a step may take that long.
        dry_run: Whether to report what would be removed, and remove nothing.

    Raises:
        ArtifactError: The system reports an error, for instance because the removal is not permitted. Everything that
            was removed before stays removed.
    """
    assert_old_enough(used_since)
    try:
        return _collect(store, wanted, used_since, dry_run)
    except OSError as error:
        remedy = disk_remedy(error.errno) or "Mend that and run again."
        raise ArtifactError(
            f"The artifact store {store.root} could not be cleaned up: {error.strerror or error} "
            f"({error.filename or 'no file is named'}). {remedy}"
        ) from error


def _collect(store: ArtifactStore, wanted: Collection[str], used_since: float, dry_run: bool) -> Collected:
    entries = {entry.folder.name: entry for entry in _entries(store)}
    kept = reachable(entries, {*_current(store), *wanted}, used_since)
    done = Collected()
    # Leftovers go first: their removal needs no new file, and on a full disk none can be made.
    for kind, path in _leftovers(store):
        with suppress(FileNotFoundError):
            size = _size(path)
            if not dry_run:
                discard(path)
            done.removed.setdefault(kind, Amount()).add(size)
    for name, entry in entries.items():
        try:
            size = _size(entry.folder)
            gone = name not in kept and (dry_run or _remove(store, entry, used_since))
        except FileNotFoundError:  # another process removed it, or is making it again
            continue
        (done.removed if gone else done.kept).setdefault(entry.kind, Amount()).add(size)
    return done


def assert_old_enough(used_since: float) -> None:
    """Assert that the time is at least a day ago.

    Artifacts that were used after that time stay, and a step under way may have used one a day ago.
    """
    assert used_since <= time.time() - DAY_SECONDS, "what a step uses that is under way must stay"


def kinds() -> list[str]:
    """Return the names of the folders that artifacts lie in, one for each kind of record."""
    return sorted(record.kind for record in Record.__subclasses__())


def digests_in(data: bytes) -> set[str]:
    """Return every text in the data that looks like a digest."""
    return {digest.decode() for digest in _DIGEST.findall(data)}


def _entries(store: ArtifactStore) -> Iterator[_Entry]:
    for kind in kinds():
        root = store.root / kind
        if root.is_dir():
            yield from (_Entry(kind, path) for path in sorted(root.iterdir()) if path.is_dir())


def _current(store: ArtifactStore) -> set[str]:
    """Return the digests of the artifacts that every step made last.

    They include those of all models, because other catalogs may share the store.
    """
    found: set[str] = set()
    for pointer in (store.root / "current").rglob("*.json"):
        with suppress(FileNotFoundError, ForeignError):
            found |= digests_in(read_below(pointer.parent, pointer.name, MOST_DOCUMENT_BYTES))
    return found


def reachable(entries: Mapping[str, Entry], wanted: Collection[str], used_since: float) -> set[str]:
    """Return the names of the entries that are wanted or were used, and of all that they were made from.

    Args:
        entries: The entries by their names in a store, which are the beginnings of their digests.
        wanted: Whole digests.
        used_since: A time in seconds since the epoch. Entries that were used since then are kept.
    """
    open_names = {digest[:_KEY_LENGTH] for digest in wanted} & entries.keys()
    for name, entry in entries.items():
        with suppress(FileNotFoundError):
            if entry.used >= used_since:
                open_names.add(name)
    reached: set[str] = set()
    while open_names:
        name = open_names.pop()
        reached.add(name)
        open_names |= ({digest[:_KEY_LENGTH] for digest in entries[name].named()} & entries.keys()) - reached
    return reached


def _remove(store: ArtifactStore, entry: _Entry, used_since: float) -> bool:
    """Remove the entry and return True, or return False because it is being used."""
    lock, staging = store.lock_of(entry.kind, entry.folder.name), store.root / "staging"
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(lock))
            staging.mkdir(exist_ok=True)
            aside = held.enter_context(claimed(staging))
        except OSError as error:
            if error.errno not in FULL:
                raise
            # No file can be made, so no process can be making the artifact. The lock is only there to prevent that.
            aside = staging / uuid.uuid4().hex if staging.exists() else staging
        try:
            entry.folder.rename(aside)
        except OSError as error:
            if error.errno not in FULL:
                raise
            # Not even a new name has room, so the entry is removed without moving it first.
            if entry.used >= used_since:
                return False
            (entry.folder / RECORD_FILE).unlink(missing_ok=True)  # without its record the rest is no artifact
            aside = entry.folder
        # A process that takes an artifact touches it before it reads it. From here on nothing can touch the entry.
        if aside != entry.folder and _Entry(entry.kind, aside).used >= used_since:
            aside.rename(entry.folder)
            return False
        lock.unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _leftovers(store: ArtifactStore) -> Iterator[tuple[str, Path]]:
    """Yield the leftovers of killed processes and the caches unused for long, each with the name of its group."""
    for path in leftovers(store.root / "staging"):
        yield "unfinished work", path
    now = time.time()
    for path in sorted(store.caches.rglob("*")) if store.caches.is_dir() else []:
        with suppress(FileNotFoundError):
            status = path.stat()
            if path.is_file() and now - max(status.st_mtime, status.st_atime) > CACHE_SECONDS:
                yield "caches", path


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)
