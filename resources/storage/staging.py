"""Folders for work under way, each locked by the process that fills it.

The kernel lets go of a lock when its holder ends, however that ends, so a folder whose lock is free is what a killed
process left. Clocks are not asked: one that is set ahead would make a folder look old in which a step is at work. On a
file system that machines share, its locks have to work between them (NFS since version 4; not the mount options
`nolock` and `local_lock`).
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resources.storage.locks import file_lock

#: Folders without a lock are an earlier version's, whose steps may take a day.
WITHOUT_LOCK_SECONDS = 24 * 3600
_LOCK = ".lock"


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder below `parent`, removed at the end whatever happens. What killed processes left goes too."""
    parent.mkdir(parents=True, exist_ok=True)
    for path in leftovers(parent):
        discard(path)
    with claimed(parent) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def claimed(parent: Path) -> Iterator[Path]:
    """Give a name below `parent` that nobody else uses or removes. What is there at the end is removed."""
    path = parent / uuid.uuid4().hex
    with file_lock(_lock_of(path)):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            _lock_of(path).unlink(missing_ok=True)


def leftovers(parent: Path) -> Iterator[Path]:
    """Find what killed processes left below `parent`: folders, and locks of folders that were never made."""
    names = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
    for name in sorted(names):
        path = parent / name
        if name.endswith(_LOCK):
            if name.removesuffix(_LOCK) not in names and not _is_held(path):
                yield path
        elif not (_is_held(_lock_of(path)) if f"{name}{_LOCK}" in names else _is_young(path)):
            yield path


def discard(path: Path) -> None:
    """Remove a leftover, and then its lock."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    _lock_of(path).unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_LOCK}")


def _is_held(lock: Path) -> bool:
    try:
        with file_lock(lock, timeout_s=0):
            return False
    except TimeoutError:
        return True


def _is_young(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < WITHOUT_LOCK_SECONDS
    return True
