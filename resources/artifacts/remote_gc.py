"""The removal of unneeded artifacts from object storage, by the rules of resources.artifacts.gc.

An artifact there was used last when its `record.json` was written last. A machine that uses an artifact writes that
object again if it is more than half a day old (see RemoteArtifacts.has). A folder of files that no record names is a
leftover of a killed or slower machine, and goes when it is as old as an unused artifact.

Machines may work there meanwhile. An artifact that is used between the look and its removal stays. A process that finds
an artifact a moment before it is removed makes it again, or fails and makes it the next time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from resources.artifacts.gc import Amount, Collected, assert_old_enough, digests_in, kinds, reachable
from resources.artifacts.remote import RemoteArtifacts, upload_of
from resources.artifacts.store import RECORD_FILE
from resources.storage.objects import LISTING_SECONDS, Listed, RemotePath


@dataclass
class _Entry:
    """All objects of one artifact, by their names below its folder."""

    kind: str
    place: RemotePath
    objects: dict[str, Listed] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """The time of its last use, in seconds since the epoch.

        If the store does not report times, all its artifacts count as used and stay.
        """
        return _time(self.objects[RECORD_FILE])

    @property
    def whole(self) -> bool:
        """Return whether the artifact has its record."""
        return RECORD_FILE in self.objects

    def named(self) -> set[str]:
        """Return the digests of the artifacts that it was made from."""
        found: set[str] = set()
        for name in (RECORD_FILE, *(name for name in self.objects if PurePosixPath(name).name == "rebuild.py")):
            with suppress(FileNotFoundError):
                found |= digests_in((self.place / name).read_bytes())
        return found


def collect_remote(
    remote: RemoteArtifacts, wanted: Collection[str], *, used_since: float, dry_run: bool = False
) -> Collected:
    """Remove the artifacts and uploads that are not needed, and return the amounts.

    The arguments are those of `resources.artifacts.gc.collect`.

    Raises:
        StorageError: The store does not answer or refuses.
    """
    assert_old_enough(used_since)
    done = Collected()
    objects = remote.root.listing(timeout_s=LISTING_SECONDS)
    entries = _entries(remote.root, objects)
    whole = {name: entry for name, entry in entries.items() if entry.whole}
    kept = reachable(whole, {*_current(remote.root, objects), *wanted}, used_since)
    for name, entry in entries.items():
        if entry.whole and name not in kept:
            gone = dry_run or _remove(entry, used_since)
            size = sum(one.size_bytes for one in entry.objects.values())
            (done.removed if gone else done.kept).setdefault(entry.kind, Amount()).add(size)
            continue
        left = _leftovers(entry, used_since)
        if left and not dry_run:
            entry.place.remove(left)
        for leftover in left:
            done.removed.setdefault("unfinished work", Amount()).add(entry.objects[leftover].size_bytes)
        if entry.whole:
            size = sum(one.size_bytes for file, one in entry.objects.items() if file not in left)
            done.kept.setdefault(entry.kind, Amount()).add(size)
    return done


def _entries(root: RemotePath, objects: Mapping[str, Listed]) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    known = kinds()
    for name, listed in objects.items():
        kind, _, rest = name.partition("/")
        digest, _, file = rest.partition("/")
        if kind in known and file:
            found.setdefault(digest, _Entry(kind, root / kind / digest)).objects[file] = listed
    return found


def _current(root: RemotePath, objects: Mapping[str, Listed]) -> Iterator[str]:
    """Yield the digests of the artifacts that every step made last, for all catalogs."""
    for name in objects:
        if name.startswith("current/"):
            with suppress(FileNotFoundError):
                yield from digests_in((root / name).read_bytes())


def _remove(entry: _Entry, used_since: float) -> bool:
    """Remove the artifact, its record first, and return True, or return False because it is being used."""
    now = entry.place.listing()
    if RECORD_FILE in now and _time(now[RECORD_FILE]) >= used_since:
        return False
    entry.place.remove([RECORD_FILE, *(name for name in now if name != RECORD_FILE)])
    return True


def _leftovers(entry: _Entry, used_since: float) -> list[str]:
    """Return the files of uploads that the artifact's record does not name and that are older than `used_since`."""
    uploads = {name.partition("/")[0] for name in entry.objects if "/" in name}
    if entry.whole and len(uploads) < 2:
        return []
    named = upload_of(entry.place) if entry.whole else None
    if entry.whole and named is None:  # the record has just gone, or only another version reads it
        return []
    fresh = {name.partition("/")[0] for name, listed in entry.objects.items() if _time(listed) >= used_since}
    old = uploads - fresh - {named}
    return [name for name in entry.objects if name.partition("/")[0] in old]


def _time(listed: Listed) -> float:
    return listed.modified or float("inf")
