"""Read and change object storage (`s3://`, `gs://`, `as://`) by paths that behave as `pathlib.Path` does.

`RemotePath` has the part of `Path` that this project uses, over fsspec. universal_pathlib's UPath would not do:
fsspec's `isfile` and `exists` answer False when the store cannot be asked, and folders are removed here on the strength
of that answer. Nothing is cached between two requests, so changes of other processes are seen.
"""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from resources.boundary.deadlines import Pace
from resources.boundary.foreign import MOST_DOCUMENT_BYTES
from resources.errors import StorageError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: For one question or small file; a store that does not answer is said to be dead after about as long.
ANSWER_SECONDS = 15.0
#: For the names of all that lies below a place, however much: a thousand come at a time, some ten times a second.
LISTING_SECONDS = 3600.0
TRIES = 2
#: For a whole file of any size, from any store: it must not take for ever, and a slow line is none of a dead store.
_POLL_SECONDS = 0.2
_FILE_SECONDS = 60.0
_FILE_BYTES_PER_SECOND = 1e6

#: By fsspec's protocol: the extra of this project that brings it, and the variables that Triton reads too.
_EXTRAS = {
    "s3": ("s3", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION"),
    "gs": ("gs", "GOOGLE_APPLICATION_CREDENTIALS"),
    "abfs": ("as", "AZURE_STORAGE_KEY"),
}
#: As S3, Google's and Azure's answers put it.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified (bucket|container) does not exist")
_REFUSED = re.compile(
    r"\b40[13]\b|AccessDenied|Access Denied|Forbidden|Unauthorized|AuthorizationFailure|AuthenticationFailed|"
    r"InvalidAccessKeyId|SignatureDoesNotMatch|[Cc]redentials"
)
#: HTTP's status 416.
_NO_RANGE = re.compile(r"InvalidRange|\b416\b|[Rr]ange [Nn]ot [Ss]atisfiable")
#: Of the disk on this side, which resources.triton.files explains.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Listed:
    """What a store says of an object. tag: its ETag, another one for other bytes. modified: seconds since 1970, 0 where
    it does not say.
    """

    size_bytes: int
    tag: str
    modified: float


class RefusedError(StorageError):
    """The store answers, and that this user may not."""


@dataclass(frozen=True)
class LeaseTimes:
    """The times of a lease, all in seconds; see resources.storage.lease.

    Args:
        life: How long a claim may stay unchanged and still counts as alive.
        margin: How much sooner its holder stops: for the answer to the change that it has just begun, and as long again
            for a store that carries out a change after nobody waits for the answer any more.
        renewal: How often the holder writes its claim anew: several times in what is left of its life, or one lost
            write would end it.
        look: How often a waiting process looks, on average.
        patience: How long a process waits. Several releases are published in that time.
    """

    life: float = 60.0
    margin: float = 2 * ANSWER_SECONDS
    renewal: float = 5.0
    look: float = 1.0
    patience: float = 1800.0


class Held(Protocol):
    """What a lease does for who changes the repository under it."""

    def require(self) -> None:
        """Raise StorageError where it may be another's by now."""


@dataclass(eq=False)
class Store:
    """One service with its buckets. scratch: a folder on this machine where releases are made and looked at.

    shown: what comes before the bucket's name in a path as a person writes it. leases: of who changes what lies at or
    below a key right now. setting, rights: where the address stands, and what its credentials have to allow.
    """

    protocol: str
    shown: str
    scratch: Path
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # keys among them
    leases: dict[str, Held] = field(default_factory=dict)
    setting: str = "REFINERY_TRITON_REPOSITORIES"
    rights: str = "list, read, write and delete"
    lease_times: LeaseTimes = LeaseTimes()

    def filesystem(self) -> AbstractFileSystem:
        """fsspec's, which it keeps by process and thread. Raises StorageError where its package is missing."""
        extra, _ = _EXTRAS.get(self.protocol, (self.protocol, ""))
        try:
            import fsspec

            files = fsspec.filesystem(self.protocol, **self.options)
        except ImportError as error:
            remedy = f"Run: pip install 'transformer-refinery[{extra}]'."
            raise StorageError(f"{self.shown}... cannot be used: {first_line(error)}. {remedy}") from error
        if self.protocol == "s3":
            files.retries = TRIES  # its own, around botocore's
        files.invalidate_cache()  # adlfs keeps listings whatever it is told
        return files

    @property
    def variables(self) -> str:
        """Where credentials are looked for."""
        return _EXTRAS.get(self.protocol, ("", "the store's variables"))[1]


class RemotePath:
    """A place in a bucket, whether or not anything is there. `key`: from the bucket's name on, without a slash at its
    ends. Everything that asks the store raises StorageError where it does not answer or refuses.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def __str__(self) -> str:
        return f"{self.store.shown}{self.key}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return self.key < other.key

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.store, str(PurePosixPath(self.key).parent))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(other.key)

    def exists(self) -> bool:
        return self._kind() != ""

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether anything lies below it: stores know no empty folders."""
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies right below; nothing where nothing is there."""
        try:
            with self._asking("list") as (files, bound):
                found = files.ls(self.key, detail=True, **bound)
        except FileNotFoundError:
            return
        for name in sorted({str(one["name"]).strip("/") for one in found} - {self.key}):
            yield RemotePath(self.store, name)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Files alone, by a pattern whose stars hold no slash."""
        depth = pattern.count("/")
        for name in self.sizes():
            if name.count("/") == depth and PurePosixPath(name).match(pattern):
                yield self / name

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, by its path from here. One question, however many there are."""
        return {name: one.size_bytes for name, one in self.listing().items()}

    def listing(self, *, timeout_s: float | None = None) -> dict[str, Listed]:
        """The same, with what tells one content from another. timeout_s: of the whole answer; default: of any other
        question's, enough for about a hundred thousand files.
        """
        try:
            with self._asking("list") as (files, bound):
                given = bound if timeout_s is None or not bound else {"timeout": timeout_s}
                found = files.find(self.key, detail=True, **given)
        except FileNotFoundError:
            return {}
        # Some tools make an object of no bytes stand for a folder.
        names = {name.strip("/").removeprefix(f"{self.key}/"): one for name, one in found.items()}
        return {
            name: Listed(int(one["size"]), _tag(one), _modified(one))
            for name, one in sorted(names.items())
            if one["type"] == "file" and name != self.key and not str(one["name"]).endswith("/")
        }

    def read_bytes(self) -> bytes:
        """Read a document; larger files are for `download`. Raises FileNotFoundError too."""
        with self._asking("read") as (files, bound):
            try:
                data = bytes(files.cat_file(self.key, start=0, end=MOST_DOCUMENT_BYTES + 1, **bound))
            except Exception as error:
                if not _NO_RANGE.search(" ".join(_chain(error))):
                    raise
                data = b""  # an empty object has no range
        if len(data) > MOST_DOCUMENT_BYTES:
            raise StorageError(
                f"{self} is larger than {MOST_DOCUMENT_BYTES // 2**20} MB, as no record, manifest or configuration is. "
                "See who can write there, and remove it."
            )
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """Raises FileNotFoundError and UnicodeDecodeError too."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Readers see all of it or what was there before."""
        with self._changing("write") as (files, bound):
            files.pipe_file(self.key, data, **bound)

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Make sure that the bucket is there and answers: folders need not be made."""
        del parents, exist_ok
        list(self.iterdir())

    def upload(self, source: Path) -> None:
        """Put a local file there, whole or not at all."""
        with self._changing("write", source) as (files, _):
            files.put_file(str(source), self.key, **_whole(files, source.stat().st_size))
        self._require_lease()  # it may have taken long

    def download(self, target: Path, size_bytes: int) -> None:
        """Get a file. Raises FileNotFoundError too."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._asking("read", target) as (files, _):
            if files.async_impl:
                self._download_apace(files, target, _whole(files, size_bytes)["timeout"])
            else:
                files.get_file(self.key, str(target))

    def _download_apace(self, files: AbstractFileSystem, target: Path, seconds: float) -> None:
        """As fsspec's `get_file`, which has a limit for the whole alone: gigabytes may drip for hours before that."""
        pace, deadline = Pace(), time.monotonic() + seconds
        future = asyncio.run_coroutine_threadsafe(files._get_file(self.key, str(target)), files.loop)
        try:
            while not wait([future], timeout=_POLL_SECONDS).done:
                pace.require(target.stat().st_size if target.exists() else 0)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it was not whole within {seconds:.0f} s")
            future.result()
        finally:
            future.cancel()

    def remove(self, names: Sequence[str]) -> None:
        """Remove the named files below it, in their order. Those that are gone already are no error.

        One by one: fsspec's `rm` takes stars and brackets in a key for a pattern, and s3fs's does not look at the
        errors that S3 answers many removals at once with.
        """
        for name in names:
            with suppress(FileNotFoundError), (self / name)._changing("remove") as (files, bound):
                files.rm_file(f"{self.key}/{name}", **bound)

    def _kind(self) -> str:
        try:
            with self._asking("read") as (files, bound):
                return str(files.info(self.key, **bound)["type"])
        except FileNotFoundError:
            return ""

    @contextmanager
    def _changing(self, what: str, local: Path | None = None) -> Iterator[tuple[AbstractFileSystem, dict[str, float]]]:
        self._require_lease()
        with self._asking(what, local) as asked:
            yield asked

    def _require_lease(self) -> None:
        for key, lease in [*self.store.leases.items()]:
            if f"{self.key}/".startswith(f"{key}/"):
                lease.require()

    @contextmanager
    def _asking(self, what: str, local: Path | None = None) -> Iterator[tuple[AbstractFileSystem, dict[str, float]]]:
        """fsspec's file system, and what bounds one of its answers; its errors as ours, but FileNotFoundError, and
        those of the file on this machine.
        """
        try:
            files = self.store.filesystem()
            yield files, {"timeout": ANSWER_SECONDS} if files.async_impl else {}
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and local is not None and error.filename in (local, str(local)):
                raise
            self._explain(error, what)
            raise

    def _explain(self, error: Exception, what: str) -> None:
        said = " ".join(_chain(error))
        gone = isinstance(error, FileNotFoundError)
        if _NO_BUCKET.search(said) or (gone and what == "write"):
            raise StorageError(
                f"{self.store.shown}{self.key.split('/')[0]} is not there. Make the bucket, or correct "
                f"{self.store.setting}."
            ) from error
        if gone or getattr(error, "errno", None) in _DISK:
            return
        if isinstance(error, PermissionError) or _REFUSED.search(said):
            raise RefusedError(
                f"{self}: the store refuses to {what} it: {first_line(error)}. Set {self.store.variables}, as for "
                f"Triton, to credentials that may {self.store.rights} there."
            ) from error
        reason = first_line(error) if str(error) else "no answer in time"
        raise StorageError(
            f"{self}: the store could not be asked to {what} it: {reason}. See that its address is right and that it "
            "can be reached, and run again. What served before goes on serving."
        ) from error


def _whole(files: AbstractFileSystem, size_bytes: int) -> dict[str, float]:
    """What bounds a whole file's way."""
    return {"timeout": _FILE_SECONDS + size_bytes / _FILE_BYTES_PER_SECOND} if files.async_impl else {}


def _tag(one: Mapping[str, Any]) -> str:
    """As S3's, Google's and Azure's file systems call it."""
    return str(one.get("ETag") or one.get("etag") or one.get("md5Hash") or "").strip('"')


def _modified(one: Mapping[str, Any]) -> float:
    said = one.get("LastModified") or one.get("last_modified") or one.get("mtime") or one.get("updated")
    with suppress(ValueError):
        said = datetime.fromisoformat(said) if isinstance(said, str) else said
    return said.timestamp() if isinstance(said, datetime) else 0.0


def _chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__
