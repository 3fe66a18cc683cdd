"""Local copies of checkpoints from registries and object stores.

Each revision has a folder of its own, which appears only when the copy is complete.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from resources.artifacts.fingerprint import fingerprint
from resources.storage.atomic import move_whole
from resources.storage.locks import file_lock

#: An older revision's copy is removed when it has not been asked for in this time. Its readers have copied it long
#: before.
KEPT_SECONDS = 24 * 3600.0
_STAGING = ".staging-"


def kept_copy(root: Path, what: str, revision: str, fetch: Callable[[Path], None]) -> Path:
    """Return the folder below `root` that holds a revision of `what`, and make the copy if it does not exist.

    If two processes ask for the same copy, only one makes it. If `fetch` raises, nothing is left behind.

    Args:
        root: The folder with the copies of all sources of one kind.
        what: A text that names the source.
        revision: The revision's name.
        fetch: A function that fills an empty folder with the copy.
    """
    home = root / fingerprint("source", what=what)[:32]
    place = home / revision
    with file_lock(home / "lock"):
        for path in home.iterdir():
            if path.name.startswith(_STAGING) or (path.is_dir() and path != place and _is_old(path)):
                shutil.rmtree(path, ignore_errors=True)
        if not place.is_dir():
            staged = home / f"{_STAGING}{uuid.uuid4().hex}"
            staged.mkdir()
            try:
                fetch(staged)
                move_whole(staged, place)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        os.utime(place)
    return place


def kept(root: Path, what: str, revision: str) -> Path | None:
    """Return the folder of an existing copy, or None if there is none."""
    place = root / fingerprint("source", what=what)[:32] / revision
    return place if place.is_dir() else None


def _is_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > KEPT_SECONDS
    return False
