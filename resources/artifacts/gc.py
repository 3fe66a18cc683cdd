"""Removing from the artifact store what nobody needs any more; in object storage: resources.artifacts.remote_gc.

An artifact stays while it is what a step of the pipeline made last, or is named by somebody outside the store (releases
are), or was used not long ago: every step touches what it takes and what it makes, so this covers runs under way and
what newer materializations name. With each stays what its record, and the recipe beside an engine, names by digest:
what it was made from. Other processes may work in the store meanwhile. What is used just before it would be removed is
put back; who comes a moment later finds that it is not there and makes it again.
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
#: What saves work may be read long after it was written; file systems note reading once a day, or not at all.
CACHE_SECONDS = 90 * DAY_SECONDS
_DIGEST = re.compile(rb"\b[0-9a-f]{64}\b")
#: Files of an artifact that name others: see resources.engines.rebuild.
_NAMING = (RECORD_FILE, "rebuild.py")
_KEY_LENGTH = 32


@dataclass
class Amount:
    """So many artifacts or files, and what they take on the disk."""

    count: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        self.count += 1
        self.size_bytes += size_bytes


@dataclass
class Collected:
    """What was removed, or would be, and what stays, by kind."""

    removed: dict[str, Amount] = field(default_factory=dict)
    kept: dict[str, Amount] = field(default_factory=dict)

    @property
    def freed_bytes(self) -> int:
        return sum(amount.size_bytes for amount in self.removed.values())


class Entry(Protocol):
    """An artifact, wherever it is. Both raise FileNotFoundError where it has just gone."""

    @property
    def used(self) -> float:
        """When it was used last, in seconds since the epoch."""

    def named(self) -> set[str]:
        """Digests of what it was made from."""


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
    """Remove what is not needed. Raises ArtifactError where that is not allowed, say; what had gone by then is gone.

    wanted: digests that somebody outside the store names. used_since: in seconds since the epoch; what was used after
    that stays. It must be a day ago at least, since a step may take as long. dry_run: only say what would go.
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
    # First what needs no new file of ours: on a full disk none can be made.
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
        except FileNotFoundError:  # another process removed it, or makes it again
            continue
        (done.removed if gone else done.kept).setdefault(entry.kind, Amount()).add(size)
    return done


def assert_old_enough(used_since: float) -> None:
    """What was used since then stays: a step that is under way may have used something a day ago."""
    assert used_since <= time.time() - DAY_SECONDS, "what a step uses that is under way must stay"


def kinds() -> list[str]:
    """The folders that artifacts lie in."""
    return sorted(record.kind for record in Record.__subclasses__())


def digests_in(data: bytes) -> set[str]:
    """What looks like one."""
    return {digest.decode() for digest in _DIGEST.findall(data)}


def _entries(store: ArtifactStore) -> Iterator[_Entry]:
    for kind in kinds():
        root = store.root / kind
        if root.is_dir():
            yield from (_Entry(kind, path) for path in sorted(root.iterdir()) if path.is_dir())


def _current(store: ArtifactStore) -> set[str]:
    """Digests of what every step made last, whatever the model: other catalogs may share the store."""
    found: set[str] = set()
    for pointer in (store.root / "current").rglob("*.json"):
        with suppress(FileNotFoundError, ForeignError):
            found |= digests_in(read_below(pointer.parent, pointer.name, MOST_DOCUMENT_BYTES))
    return found


def reachable(entries: Mapping[str, Entry], wanted: Collection[str], used_since: float) -> set[str]:
    """Names of the entries that are wanted or were used, and of all that they were made from. entries: by the
    beginning of their digests, as they are called in a store; wanted: whole digests.
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
    """Take the entry out, unless it is used just now."""
    lock, staging = store.lock_of(entry.kind, entry.folder.name), store.root / "staging"
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(lock))
            staging.mkdir(exist_ok=True)
            aside = held.enter_context(claimed(staging))
        except OSError as error:
            if error.errno not in FULL:
                raise
            # No file can be made, so nobody can be making the artifact either, which is what the locks are for.
            aside = staging / uuid.uuid4().hex if staging.exists() else staging
        try:
            entry.folder.rename(aside)
        except OSError as error:
            if error.errno not in FULL:
                raise
            # Not even a name has room. What is about to be removed need not be moved first.
            if entry.used >= used_since:
                return False
            (entry.folder / RECORD_FILE).unlink(missing_ok=True)  # without it the rest is no artifact
            aside = entry.folder
        # Whoever takes an artifact touches it before looking at it. From here on it is not there to be touched.
        if aside != entry.folder and _Entry(entry.kind, aside).used >= used_since:
            aside.rename(entry.folder)
            return False
        lock.unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _leftovers(store: ArtifactStore) -> Iterator[tuple[str, Path]]:
    """What killed processes left, and what saved nobody any work for long, each with what it is called."""
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
