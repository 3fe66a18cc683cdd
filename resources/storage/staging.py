"""Folders for work in progress, each locked by the process that fills it.

The kernel releases a lock when its holder ends, however it ends. A folder whose lock is free is therefore a leftover of
a killed process. Clocks do not decide this, because a clock that is set ahead would make a folder look old while a step
works in it. On a file system that machines share, locks have to work between the machines. NFS supports that since
version 4, but not with the mount options `nolock` and `local_lock`.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resources.storage.locks import file_lock

#: Folders without a lock were made by an earlier version, whose steps may take a day.
WITHOUT_LOCK_SECONDS = 24 * 3600
_LOCK = ".lock"


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder below `parent`, and remove it at the end, whatever happens.

    The leftovers of killed processes are removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for path in leftovers(parent):
        discard(path)
    with claimed(parent) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def claimed(parent: Path) -> Iterator[Path]:
    """Yield a path below `parent` that no other process uses or removes.

    If the path exists at the end, it is removed.
    """
    path = parent / uuid.uuid4().hex
    with file_lock(_lock_of(path)):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            _lock_of(path).unlink(missing_ok=True)


def leftovers(parent: Path) -> Iterator[Path]:
    """Yield the leftovers of killed processes below `parent`: folders, and locks of folders that were never made."""
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
