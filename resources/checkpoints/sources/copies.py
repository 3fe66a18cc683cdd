"""Copies of what a registry or an object store holds, one folder a revision, whole or not there."""

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

#: An older revision's copy is removed once nobody has asked for it so long: whoever reads it has long copied it.
KEPT_SECONDS = 24 * 3600.0
_STAGING = ".staging-"


def kept_copy(root: Path, what: str, revision: str, fetch: Callable[[Path], None]) -> Path:
    """The folder below `root` that holds this revision of `what`; `fetch` fills an empty one where it is not there.

    Two processes that ask for the same do the work once. If `fetch` raises, nothing is left behind.
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
    """The copy that is here already."""
    place = root / fingerprint("source", what=what)[:32] / revision
    return place if place.is_dir() else None


def _is_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > KEPT_SECONDS
    return False
