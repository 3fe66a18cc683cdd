"""A content-addressed store: one folder for each artifact, named by the digest of everything that made it.

    <root>/<kind>/<digest>/record.json    the typed record; written last, so a folder without it is not an artifact.
                                          The time of this file is that of its last use: see resources.artifacts.gc
    <root>/<kind>/<digest>/...            its files
    <root>/<kind>/<digest>/.verified      their sizes and times when their bytes were read last
    <root>/current/<name>.json            the artifact that a step of the pipeline made last (kind and digest)
    <root>/staging/<random>/              work in progress; renamed into place when whole
    <root>/staging/<random>.lock          held while a process works there
    <root>/caches/                        files that save work and are no artifacts: timings, digests, plots

Nothing is ever edited in place, so readers need no lock, and a killed writer leaves only a staging folder behind.

If several machines share artifacts through object storage, this folder is each machine's own copy of the artifacts that
it has made or asked for. The pointers of `current` then lie in object storage alone: see resources.artifacts.remote.

The bytes of a file are compared with their digest if its size or times have changed, once a week, and before something
is made from it. A damaged artifact counts as missing: the step that needs it makes it again, and says so.
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
#: A disk may lose bits without a change of a file's times. Bytes are read again after this long.
VERIFY_AGAIN_SECONDS = 7 * 24 * 3600
_VERIFIED_FILE = ".verified"


@dataclass(frozen=True)
class Made(Generic[R]):
    """A record, and whether its artifact was there already.

    Args:
        damaged: The files because of which the artifact was made again. If it was reused, another machine's copy has
            replaced these files.
    """

    record: R
    reused: bool
    damaged: tuple[str, ...] = ()


class ArtifactStore:
    """A store in one folder, in the layout that the module describes.

    Several processes may use all methods at once.

    Args:
        remote: The artifacts that several machines share.
        traceless: Whether reading leaves no trace and fetches nothing that another machine made. Nothing can be made in
            such a store: it is for finding out what would be made.
    """

    #: The artifacts that this process has read whole: each one's folder, with its files' sizes and times.
    _read: ClassVar[set[tuple[Path, str]]] = set()

    def __init__(self, root: Path, remote: RemoteArtifacts | None = None, *, traceless: bool = False) -> None:
        self.root, self.remote, self._traceless = root, remote, traceless

    def without_traces(self) -> ArtifactStore:
        """Return the same store for reading without a trace."""
        return ArtifactStore(self.root, self.remote, traceless=True)

    @property
    def caches(self) -> Path:
        """The folder for the caches of builds. It may be removed at any time."""
        return self.root / "caches"

    def folder(self, record: Record) -> Path:
        """Return the folder of the record's files."""
        return self._folder(record.kind, record.digest)

    def find(self, kind: type[R], digest: str) -> R | None:
        """Return the stored record, or None.

        A record that cannot be read, such as an older version's, and a damaged artifact count as missing.
        """
        return self.here_or_there(kind, digest)[0]

    def here_or_there(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """Return the stored record of an artifact on this machine or on another.

        An artifact that another machine made is fetched. A store that leaves no traces reads its record alone.

        Returns:
            The record, or None and the files because of which the artifact counts as missing.
        """
        found, damaged = self.look(kind, digest)
        if self.remote is None or (found is not None and found.reusable):
            return found, damaged
        if self._traceless:
            return self.remote.record(kind, digest) or found, damaged
        with file_lock(self.lock_of(kind.kind, digest)):
            return self._newest(kind, digest)

    def _newest(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """Return what `here_or_there` does, for a caller that holds the artifact's lock.

        Another machine may have made an artifact since its build failed here.
        """
        found, damaged = self.look(kind, digest)
        if found is not None and found.reusable:
            return found, damaged
        pulled, damaged_there = self._pull(kind, digest)
        return pulled or found, damaged or damaged_there

    def look(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """Return the record of an artifact on this machine.

        Returns:
            The record, or None and the files because of which the artifact counts as missing.
        """
        folder = self._folder(kind.kind, digest)
        try:
            # This comes before any read, because an artifact that was used just now is not removed.
            self._touch(folder / RECORD_FILE)
            record = kind.model_validate_json(read_below(folder, RECORD_FILE, MOST_DOCUMENT_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return None, (RECORD_FILE,) if folder.is_dir() else ()
        except ForeignError:  # a pipe, a link to elsewhere, or too large: somebody else put it there
            return None, (RECORD_FILE,)
        except ValidationError as error:  # an older version's record, or no JSON at all
            return None, (RECORD_FILE,) if error.errors()[0]["type"] == "json_invalid" else ()
        if record.digest != digest:  # folders are named by half of the digest
            return None, ()
        if not record.fits_its_digest:
            return None, (RECORD_FILE,)
        damaged = tuple(self.damaged(record))
        return (None, damaged) if damaged else (record, ())

    def damaged(self, record: Record, *, every_byte: bool = False) -> list[str]:
        """Return the files of the artifact that are missing or differ from the record.

        The bytes of a file are read if its size or times have changed since they were read last, or if that was long
        ago.

        Args:
            record: The artifact's record.
            every_byte: Whether to read the bytes in any case.
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
        """Read every byte of the artifacts that something is about to be made from, once in each process.

        A damaged artifact is removed, so that it is made again when it is asked for.

        Raises:
            ArtifactError: An artifact is damaged.
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
        """Remove a whole artifact from this store, so that it is made again when it is asked for.

        The copy that machines share stays. It is fetched instead, if all its bytes are what they were.
        """
        folder = self.folder(record)
        lock = file_lock(self.lock_of(record.kind, record.digest))
        with lock, self.staging() as aside, suppress(FileNotFoundError):
            folder.rename(aside / folder.name)

    def reject(self, record: Record) -> None:
        """Remove an artifact from this store and from the shared ones, so that it is made again everywhere."""
        if self.remote is not None:
            self.remote.withdraw(record)
        self.remove(record)

    def get_or_make(self, kind: type[R], made_of: Fingerprint | str, make: Callable[[Path], R]) -> Made[R]:
        """Return the artifact of a fingerprint, and make it if it is missing.

        If two processes ask for the same artifact, one of them does the work. If `make` raises, nothing is left behind.

        Args:
            kind: The kind of the record.
            made_of: The artifact's fingerprint, or its digest alone.
            make: A function that fills an empty folder and returns the record.

        Raises:
            ArtifactError: One of the files that `make` wrote has a name that the store keeps for its own.
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
        """Remember the record as the newest that the named step made.

        Raises:
            ArtifactError: The artifact is missing both in object storage and in this store.
        """
        if self.remote is not None:
            if not self.remote.has(record):  # it was made while the store did not answer, or was found damaged there
                stored, _ = self.look(type(record), record.digest)  # the caller's record may have been renamed
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
        """Remove the pointer of the named step, because the step made nothing this time."""
        if self.remote is not None:
            self.remote.forget(name)
        else:
            self._pointer(name).unlink(missing_ok=True)

    def current(self, kind: type[R], name: str) -> R:
        """Return the newest record that the named step made.

        Raises:
            ArtifactError: There is none, or its artifact is missing or damaged.
        """
        digest = self.pointed(name)
        record, damaged = self.here_or_there(kind, digest) if digest else (None, ())
        if digest and record is None and self.remote is None:
            with file_lock(self.lock_of(kind.kind, digest)):  # resources.artifacts.gc may be about to put it back
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
        """Return what `record` returns for the artifact that the named step made last, or None if there is none."""
        digest = self.pointed(name)
        return self.record(kind, digest) if digest else None

    def record(self, kind: type[R], digest: str) -> R | None:
        """Return the record of that digest, or None, whatever has happened to its files.

        The files are neither read nor fetched.
        """
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
        return self.remote.record(kind, digest) or here  # another machine may have made it since it failed here

    def pointed(self, name: str) -> str:
        """Return the digest of the newest record that the named step made, or an empty text if there is none."""
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
        """Yield an empty folder on the store's own file system, and remove it at the end, whatever happens."""
        with staging_folder(self.root / "staging") as folder:
            yield folder

    def _pull(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """Fetch a whole artifact that another machine has made.

        Returns:
            The record, or None and the files in object storage that are not what was uploaded.
        """
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
        with suppress(OSError):  # the file is missing, another user's, or on a read-only disk
            os.utime(file)

    def _verified(self, folder: Path) -> dict[str, list[int]]:
        """Return the sizes and times of the files whose bytes were read, by name.

        The result is empty if the bytes were read too long ago.
        """
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
        with suppress(OSError):  # the disk is read-only, and the bytes are read again next time
            write_json(folder / _VERIFIED_FILE, seen)

    def _folder(self, kind: str, digest: str) -> Path:
        return self.root / kind / digest[:32]

    def lock_of(self, kind: str, digest: str) -> Path:
        """Return the lock for making or removing the artifact.

        The beginning of its digest is enough, as in `_folder`.
        """
        return self.root / "locks" / f"{kind}-{digest[:32]}.lock"

    def _put(self, staged: Path, record: Record) -> None:
        """Move a filled folder with its record to its place, whole and flushed to the disk."""
        place = self.folder(record)
        (staged / RECORD_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        place.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.root / "staging") as aside:
            if place.exists():  # it is damaged or cannot be reused. It goes aside whole, never file by file.
                place.rename(aside)
            move_whole(staged, place)


def _answers(record: R | None, parts: Mapping[str, Any]) -> TypeGuard[R]:
    """Return whether the record is one that was made of those parts and may be used again."""
    return record is not None and record.reusable and (not parts or record.made_of == parts)
