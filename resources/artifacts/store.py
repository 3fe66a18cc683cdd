"""A content-addressed store: one folder an artifact, named by the digest of everything that made it.

    <root>/<kind>/<digest>/record.json    the typed record; written last, so a folder without it is not an artifact.
                                          When it was last used is the time of this file: see resources.artifacts.gc
    <root>/<kind>/<digest>/...            its files
    <root>/<kind>/<digest>/.verified      their sizes and times when their bytes were read last
    <root>/current/<name>.json            what a step of the pipeline made last (kind and digest)
    <root>/staging/<random>/              work under way; renamed into place when whole
    <root>/staging/<random>.lock          held while somebody is at work there
    <root>/caches/                        what saves work and is no artifact: timings, digests, plots

Nothing is ever edited in place, so readers need no lock, and a killed writer leaves only a staging folder behind.

Where several machines share artifacts through object storage, this folder is each one's own copy of what it has made
or asked for, and `current` lies there alone: see resources.artifacts.remote.

Bytes are compared with their digest whenever a file is another than it was by size and times, once a week, and before
something is made from them. Damage counts as not there: the step that needs the artifact makes it again, and says so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeGuard, TypeVar

from pydantic import ValidationError

from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.hashes import signature, write_json
from resources.artifacts.records import Record, sha256_file
from resources.artifacts.remote import RemoteArtifacts
from resources.boundary.foreign import MOST_DOCUMENT_BYTES, ForeignError, parse_json, read_below
from resources.errors import ArtifactError
from resources.storage.atomic import move_whole
from resources.storage.locks import file_lock
from resources.storage.staging import claimed, staging_folder

R = TypeVar("R", bound=Record)

RECORD_FILE = "record.json"
#: A disk may lose bits without touching a file's times; bytes that were read so long ago are read again.
VERIFY_AGAIN_SECONDS = 7 * 24 * 3600
_VERIFIED_FILE = ".verified"


@dataclass(frozen=True)
class Made(Generic[R]):
    """A record, and whether it was there already. damaged: files of the one that was there before, for which it was
    made again; or, where it was reused, brought here again by another machine's copy.
    """

    record: R
    reused: bool
    damaged: tuple[str, ...] = ()


class ArtifactStore:
    """See the module's text. All methods may be used by several processes at once.

    Args:
        remote: What several machines share.
        traceless: Whether reading leaves no trace, and fetches nothing that another machine made. Nothing can be made
            in such a store: it is for finding out what would be made.
    """

    #: What this process has read whole: a folder, with its files' sizes and times.
    _read: ClassVar[set[tuple[Path, str]]] = set()

    def __init__(self, root: Path, remote: RemoteArtifacts | None = None, *, traceless: bool = False) -> None:
        self.root, self.remote, self._traceless = root, remote, traceless

    def without_traces(self) -> ArtifactStore:
        """Return the same store for reading without a trace."""
        return ArtifactStore(self.root, self.remote, traceless=True)

    @property
    def caches(self) -> Path:
        """For what builds remember. Their own business: it may be removed at any time."""
        return self.root / "caches"

    def folder(self, record: Record) -> Path:
        """Where the record's files lie."""
        return self._folder(record.kind, record.digest)

    def find(self, kind: type[R], digest: str) -> R | None:
        """The stored record, or None. An unreadable one (an older version's, say) and damage count as not there."""
        return self.here_or_there(kind, digest)[0]

    def here_or_there(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """Return the stored record, on this machine or on another, or None and the files for which it does not count.

        What another machine made is fetched, unless the store leaves no traces: then it is the record alone.
        """
        found, damaged = self.look(kind, digest)
        if self.remote is None or (found is not None and found.reusable):
            return found, damaged
        if self._traceless:
            return self.remote.record(kind, digest) or found, damaged
        with file_lock(self.lock_of(kind.kind, digest)):
            return self._newest(kind, digest)

    def _newest(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """What is here, or there: what failed here may have been made elsewhere since. The caller holds its lock."""
        found, damaged = self.look(kind, digest)
        if found is not None and found.reusable:
            return found, damaged
        pulled, damaged_there = self._pull(kind, digest)
        return pulled or found, damaged or damaged_there

    def look(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """The record that is here; or None, and the files for which it counts as not there."""
        folder = self._folder(kind.kind, digest)
        try:
            # Before anything is read: what was used just now is not removed.
            self._touch(folder / RECORD_FILE)
            record = kind.model_validate_json(read_below(folder, RECORD_FILE, MOST_DOCUMENT_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return None, (RECORD_FILE,) if folder.is_dir() else ()
        except ForeignError:  # a pipe, a link to elsewhere, or too large: somebody else put it there
            return None, (RECORD_FILE,)
        except ValidationError as error:  # of an older version, or no JSON at all
            return None, (RECORD_FILE,) if error.errors()[0]["type"] == "json_invalid" else ()
        if record.digest != digest:  # folders are named by half of the digest
            return None, ()
        if not record.fits_its_digest:
            return None, (RECORD_FILE,)
        damaged = tuple(self.damaged(record))
        return (None, damaged) if damaged else (record, ())

    def damaged(self, record: Record, *, every_byte: bool = False) -> list[str]:
        """Files of the artifact that are missing or not, byte for byte, what the record says.

        Bytes are read where a file's size or times are others than when they were read last, or that is long ago; with
        `every_byte` always.
        """
        folder = self.folder(record)
        verified = {} if every_byte else self._verified(folder)
        wrong, seen = [], dict[str, list[int]]()
        for name, file in sorted(record.files.items()):
            try:
                seen[name] = signature(folder / name)
                as_it_was = verified.get(name) == seen[name]
                if seen[name][0] != file.size_bytes or (not as_it_was and sha256_file(folder / name) != file.sha256):
                    wrong.append(name)
            except OSError:
                wrong.append(name)
        if not wrong and seen != verified:
            self._note_verified(folder, seen)
        return wrong

    def require_whole(self, *records: Record) -> None:
        """Read every byte of what something is about to be made from, once a process. Raises ArtifactError: what is
        damaged is removed then, so that it is made again when it is asked for.
        """
        for record in records:
            key = (self.folder(record), json.dumps(self._verified(self.folder(record))))
            if key in self._read:
                continue
            damaged = self.damaged(record, every_byte=True)
            if damaged:
                self.remove(record)
                raise ArtifactError(
                    f"{record.model}: {', '.join(damaged)} of the {record.kind.replace('_', ' ')} in "
                    f"{self.folder(record)} changed on the disk since it was made. It was removed; optimize again, and "
                    "it is made anew."
                )
            self._read.add((self.folder(record), json.dumps(self._verified(self.folder(record)))))

    def remove(self, record: Record) -> None:
        """Take an artifact out of the store, whole, so that it is made anew when it is asked for again. What machines
        share stays: it is brought here then, if every byte of it is what it was.
        """
        folder = self.folder(record)
        lock = file_lock(self.lock_of(record.kind, record.digest))
        with lock, self.staging() as aside, suppress(FileNotFoundError):
            folder.rename(aside / folder.name)

    def reject(self, record: Record) -> None:
        """Take an artifact out of the store and out of what machines share, so that it is made anew everywhere."""
        if self.remote is not None:
            self.remote.withdraw(record)
        self.remove(record)

    def get_or_make(self, kind: type[R], made_of: Fingerprint | str, make: Callable[[Path], R]) -> Made[R]:
        """Find the artifact of a fingerprint, or of its digest alone, or make it.

        Two processes that ask for the same artifact do the work once. If `make` raises, nothing is left behind.

        Args:
            make: Fills an empty folder and returns the record.

        Raises:
            ArtifactError: One of the maker's files has a name that the store keeps for its own.
        """
        assert not self._traceless, "nothing is made in a store that leaves no traces"
        digest, parts = (made_of, {}) if isinstance(made_of, str) else (made_of.digest, made_of.parts)
        found, _ = self.look(kind, digest)
        if _answers(found, parts):
            return Made(found, reused=True)
        with file_lock(self.lock_of(kind.kind, digest)):
            found, damaged = self._newest(kind, digest)
            if _answers(found, parts):
                return Made(found, reused=True, damaged=damaged)
            with self.staging() as folder:
                started = time.monotonic()
                record = make(folder)
                if record.build_seconds == 0.0:
                    record = record.model_copy(update={"build_seconds": time.monotonic() - started})
                assert record.digest == digest, "a record under another digest than was asked for is never found"
                record = record.with_files(folder).model_copy(update={"made_of": parts})
                taken = sorted({RECORD_FILE, _VERIFIED_FILE} & record.files.keys())
                if taken:
                    raise ArtifactError(
                        f"{record.model}: one of its files is called {taken[0]}, which the artifact store keeps for "
                        "its own. Rename or remove that file in the source."
                    )
                if record.files:
                    self._note_verified(folder, {name: signature(folder / name) for name in record.files})
                self._put(folder, record)
            if self.remote is not None:
                self.remote.push(record, self.folder(record))
        return Made(record, reused=False, damaged=damaged)

    def point(self, name: str, record: Record) -> None:
        """Remember the record as the newest that the named step made."""
        if self.remote is not None:
            if not self.remote.has(record):  # it was made when the store did not answer, or was found damaged there
                stored, _ = self.look(type(record), record.digest)  # the caller's may have been given another name
                if stored is None:
                    raise ArtifactError(
                        f"{name}: what was made is in {self.folder(record)} no more. Optimize again: it is made anew."
                    )
                self.remote.push(stored, self.folder(record))
            if self.pointed(name) != record.digest:
                self.remote.point(name, json.dumps({"kind": record.kind, "digest": record.digest}))
        elif self.pointed(name) != record.digest:
            write_json(self._pointer(name), {"kind": record.kind, "digest": record.digest})

    def forget(self, name: str) -> None:
        """The named step made nothing this time."""
        if self.remote is not None:
            self.remote.forget(name)
        else:
            self._pointer(name).unlink(missing_ok=True)

    def current(self, kind: type[R], name: str) -> R:
        """The newest record that the named step made. Raises ArtifactError if there is none."""
        digest = self.pointed(name)
        record, damaged = self.here_or_there(kind, digest) if digest else (None, ())
        if digest and record is None and self.remote is None:
            with file_lock(self.lock_of(kind.kind, digest)):  # see resources.artifacts.gc: it may be put back just now
                record, damaged = self.look(kind, digest)
        if record is None and damaged:
            place = self._folder(kind.kind, digest)
            where = f"{place}, or of what machines share in {self.remote.root}," if self.remote is not None else place
            raise ArtifactError(
                f"{name}: {', '.join(damaged)} in {where} changed on the disk since it was made. Optimize again: it is "
                "made anew."
            )
        if record is None:
            raise ArtifactError(
                f"{name} has not been made yet, or its files are gone. Materialize it first: run the job "
                "'optimize' for this model, or choose the asset together with everything upstream of it."
            )
        return record

    def known(self, kind: type[R], name: str) -> R | None:
        """The record that the named step made last, see `record`; None where there is none."""
        digest = self.pointed(name)
        return self.record(kind, digest) if digest else None

    def record(self, kind: type[R], digest: str) -> R | None:
        """What is known of that digest, whatever became of its files: none of them is read, or brought here."""
        here: R | None
        try:
            folder = self._folder(kind.kind, digest)
            here = kind.model_validate_json(read_below(folder, RECORD_FILE, MOST_DOCUMENT_BYTES))
        except (OSError, ForeignError, ValidationError):
            here = None
        if here is not None and (here.digest != digest or not here.fits_its_digest):
            here = None
        if self.remote is None or (here is not None and here.reusable):
            return here
        return self.remote.record(kind, digest) or here  # what failed here may have been made elsewhere since

    def pointed(self, name: str) -> str:
        """The digest of the newest record that the named step made; empty if there is none."""
        try:
            path = self._pointer(name)
            if self.remote is None:
                data = read_below(path.parent, path.name, MOST_DOCUMENT_BYTES)
            else:
                data = self.remote.pointer(name).encode()
            return str(parse_json(data)["digest"])
        except (FileNotFoundError, ForeignError, ValueError, KeyError, TypeError):
            return ""

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the store's own file system, removed at the end whatever happens."""
        with staging_folder(self.root / "staging") as folder:
            yield folder

    def _pull(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """What another machine has made, brought here whole; or the files that are not what they were there."""
        if self.remote is None:
            return None, ()
        with self.staging() as folder:
            record, damaged = self.remote.pull(kind, digest, folder)
            if record is not None:
                self._put(folder, record)
        return record, damaged

    def _pointer(self, name: str) -> Path:
        return self.root / "current" / f"{name}.json"

    def _touch(self, file: Path) -> None:
        if self._traceless:
            return
        with suppress(OSError):  # it is not there; or another user's, or on a disk that is only read
            os.utime(file)

    def _verified(self, folder: Path) -> dict[str, list[int]]:
        """Sizes and times of the files whose bytes were read, by name; nothing where that is too long ago."""
        path = folder / _VERIFIED_FILE
        try:
            if time.time() - path.stat().st_mtime > VERIFY_AGAIN_SECONDS:
                return {}
            verified: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return verified

    def _note_verified(self, folder: Path, seen: dict[str, list[int]]) -> None:
        if self._traceless:
            return
        with suppress(OSError):  # a disk that is only read: bytes are read again then
            write_json(folder / _VERIFIED_FILE, seen)

    def _folder(self, kind: str, digest: str) -> Path:
        return self.root / kind / digest[:32]

    def lock_of(self, kind: str, digest: str) -> Path:
        """The lock of whoever makes or removes the artifact; of its digest the beginning is enough, as in `_folder`."""
        return self.root / "locks" / f"{kind}-{digest[:32]}.lock"

    def _put(self, staged: Path, record: Record) -> None:
        """Move what was made to its place, whole and on the disk, with its record."""
        place = self.folder(record)
        (staged / RECORD_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        place.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.root / "staging") as aside:
            if place.exists():  # not reusable, or damaged: it goes aside whole, never file by file
                place.rename(aside)
            move_whole(staged, place)


def _answers(record: R | None, parts: Mapping[str, Any]) -> TypeGuard[R]:
    """Whether the record is what was asked for by those parts, and may be used again."""
    return record is not None and record.reusable and (not parts or record.made_of == parts)
