"""Files of a repository: what reaches the disk in which order, and what a full disk means to a person."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from resources.boundary.foreign import ForeignError, local_path
from resources.errors import FULL, ReleaseError, StorageError
from resources.storage import atomic as files
from resources.storage.lease import leased
from resources.storage.locations import Location, contents
from resources.storage.locks import file_lock
from resources.storage.objects import RefusedError, RemotePath
from resources.triton.layout import CONFIG, MANIFEST, internal_names
from resources.triton.release import Release

#: Beside the engine: the tokenizer with its library, configurations and manifest.
_BESIDE_ENGINE_BYTES = 20 * 2**20
#: In a staging folder on this machine: it left a note in the store.
_NOTED = ".noted"
#: How long a process waits for the lock of a repository: several releases are published in that time.
PATIENCE_SECONDS = 1800.0
#: Of a place where this user may not write.
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOG = logging.getLogger(__name__)


def sync(path: Location) -> None:
    """Make a file's bytes, or a folder's names, durable. Object storage has done so when it answers."""
    if isinstance(path, Path):
        files.sync(path)


def bring_in(folder: Path, place: Location) -> None:
    """Move a staged folder to its place in the repository: at once by renaming, or file by file where nothing can be
    renamed, in the order that does least harm where a server looks in between.
    """
    if not isinstance(place, RemotePath):
        folder.rename(place)
        return
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (_rank(name), name)):
        (place / name).upload(folder / name)


def replace_file(new: Location, place: Location) -> None:
    """Put a file in another's place: readers see the one or the other, whole. The new one may be gone then."""
    if isinstance(place, RemotePath):
        place.write_bytes(new.read_bytes())
    else:
        assert isinstance(new, Path)
        new.replace(place)


def discard(path: Location, bin_folder: Location) -> None:
    """Remove a folder of a repository at once, by renaming it out; in object storage file by file, the last first.

    A server that polls must not see a Python model without its `model.py`: it would wait for it for ever.
    """
    if isinstance(path, RemotePath):
        names = list(path.sizes())
        for rank in sorted({_rank(name) for name in names}, reverse=True):
            path.remove([name for name in names if _rank(name) == rank])
        return
    if not path.exists():
        return
    assert isinstance(bin_folder, Path)
    # On a full disk no folder can be made, and this is how room is made: the first to go becomes the bin.
    gone = bin_folder / uuid.uuid4().hex if bin_folder.exists() else bin_folder
    try:
        path.rename(gone)
    except OSError as error:
        if error.errno not in FULL:
            raise
        # Not even a name has room, and this is how room is made: file by file, as in object storage.
        names = [name.relative_to(path).as_posix() for name in path.rglob("*") if not name.is_dir()]
        for name in sorted(names, key=_rank, reverse=True):
            (path / name).unlink(missing_ok=True)
        gone = path
    shutil.rmtree(gone, ignore_errors=True)


def _rank(name: str) -> int:
    """When a file of a folder is put into object storage, and, backwards, when it is removed.

    `model.py` before all else: its version folder is there from its first file on. A manifest once its release is
    whole. The folder's own configuration last: without it a server that looks meanwhile completes one by itself, or
    fails to load the model, and looks again.
    """
    top, last = "/" not in name, PurePosixPath(name).name
    if last == "model.py":
        return 0
    if last == CONFIG:
        return 4 if top else 2
    if last == MANIFEST:
        return 5 if top else 3
    return 1


def copy_tree(source: RemotePath, target: Path) -> None:
    """Download a whole folder; nothing where nothing is there. Raises ReleaseError for names that lead out of it."""
    for name, size_bytes in source.sizes().items():
        try:
            path = local_path(target, name)  # lint reads anybody's
        except ForeignError as error:
            raise ReleaseError(f"{source}: {error}, and is no path of a repository. Remove it.") from None
        (source / name).download(path, size_bytes)


@contextmanager
def on_this_machine(repository: Location, release: Release, *, alone: bool = True) -> Iterator[Path]:
    """A repository whose files of that release can be opened: the folder itself, or a copy that goes at the end.

    alone: for who holds the repository's lock; a copy that somebody left who was killed goes too.
    """
    if not isinstance(repository, RemotePath):
        yield repository
        return
    root = _local_staging(repository).with_suffix(".copy" if alone else f".{uuid.uuid4().hex}")
    shutil.rmtree(root, ignore_errors=True)  # somebody was killed
    try:
        copy = root / repository.name
        for name in (release.model, *internal_names(release)):
            copy_tree(repository / name, copy / name)
        yield copy
    finally:
        shutil.rmtree(root, ignore_errors=True)


def repository_lock(repository: Location, patience_s: float = PATIENCE_SECONDS) -> AbstractContextManager[None]:
    """Hold the repository's lock, as every process does that changes it. A process that waits says for whom.

    Args:
        patience_s: How long to wait for the lock of a folder. A lease in object storage has its own `LeaseTimes`.

    Raises:
        ReleaseError: Another process held the lock of the folder for all that time.
        StorageError: Another process held the lease, or the store does not answer.
    """
    place, root = repository.parent / f".{repository.name}.lock", staging_root(repository)
    if isinstance(place, RemotePath):
        changed = (repository, root, repository.parent / "unverified" / repository.name)
        return leased(place, [path for path in changed if isinstance(path, RemotePath)])
    return _locked(place, repository, patience_s)


@contextmanager
def _locked(place: Path, repository: Location, patience_s: float) -> Iterator[None]:
    def say(who: str) -> None:
        _LOG.warning("%s is being changed by %s; waiting", repository, who)

    with ExitStack() as held:
        try:
            held.enter_context(file_lock(place, timeout_s=patience_s, waiting=say))
        except TimeoutError as error:
            raise ReleaseError(
                f"{repository} has been changed by another process for {patience_s / 60:.0f} minutes: {error}. "
                "Wait for that to end, or stop it."
            ) from error
        yield


@contextmanager
def lock_to_read(repository: Location) -> Iterator[bool]:
    """The repository's lock for who only looks; False where that may not be written, which looking does not need."""
    with ExitStack() as held:
        try:
            held.enter_context(repository_lock(repository))
            locked = True
        except RefusedError:
            locked = False
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            locked = False
        yield locked


def staging_root(repository: Location) -> Location:
    """Beside the repository, on its file system: a dot folder inside would be polled as a model."""
    return repository.parent / f".{repository.name}.staging"


@contextmanager
def staging_folder(repository: Location) -> Iterator[Path]:
    """An empty folder there, removed at the end whatever is left in it. Of object storage: a folder on this machine,
    with what `leave_note` left in the store.
    """
    root = _local_staging(repository)
    folder = root / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        take_note_back(folder, repository)
        shutil.rmtree(folder, ignore_errors=True)


def clear_staging(repository: Location, *, but: Collection[str] = ()) -> None:
    """Remove what killed publishers left there. but: names of folders below `staging_root` that stay."""
    root = staging_root(repository)
    for path in contents(root) if but else []:
        if path.name in but:
            continue
        if isinstance(path, RemotePath):
            discard(path, root)
        else:
            shutil.rmtree(path, ignore_errors=True)
    if isinstance(root, RemotePath) and not but:
        discard(root, root)
    if isinstance(root, RemotePath) or not but:
        shutil.rmtree(_local_staging(repository), ignore_errors=True)


def leave_note(staged: Path, repository: Location, names: Sequence[str]) -> None:
    """Before a pointer is moved: leave the named staged files, in their order, where the next publisher finds them in
    `staging_root` if this one is killed. In a folder they are there anyhow.
    """
    root = staging_root(repository)
    if isinstance(root, RemotePath):
        (staged / _NOTED).touch()
        for name in names:
            (root / staged.name / name).upload(staged / name)


def take_note_back(staged: Path, repository: Location) -> None:
    """Once the pointer is moved, or will not be. It stays where the store does not answer, until the next publisher."""
    root = staging_root(repository)
    if isinstance(root, RemotePath) and (staged / _NOTED).exists():
        with suppress(StorageError):
            discard(root / staged.name, root)
            (staged / _NOTED).unlink()


def keep_note(staged: Path) -> None:
    """Leave the note to the next publisher: `take_note_back` passes it over."""
    (staged / _NOTED).unlink(missing_ok=True)


def _local_staging(repository: Location) -> Path:
    root = staging_root(repository)
    if isinstance(root, RemotePath):
        # One for each place: `clear_staging` removes them all, under that place's lock alone.
        return root.store.scratch / hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return root


@contextmanager
def clear_disk_errors(model: str, repository: Location, engine_bytes: int) -> Iterator[None]:
    """Turn any OSError into a ReleaseError that says what, where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            needed = (engine_bytes + _BESIDE_ENGINE_BYTES) / 1e6
            if isinstance(repository, RemotePath):
                place, elsewhere = f"in {repository.store.scratch}, where it is made", "REFINERY_HOME"
            else:
                place, elsewhere = "there", "REFINERY_TRITON_REPOSITORIES"
            remedy = f"It needs about {needed:.0f} MB {place}: make room, or set {elsewhere} elsewhere."
        elif error.errno in READ_ONLY:
            # Not the file that was tried first, a lock of ours say: all beside it would follow.
            remedy = (
                f"Whoever runs this has to be able to write in {repository} and in {repository.parent}, beside it. "
                "Allow that, or set REFINERY_TRITON_REPOSITORIES elsewhere."
            )
        elif error.errno == errno.EXDEV:
            remedy = (
                f"It is a file system of its own; mount it at {repository.parent}, so that folders can be moved in."
            )
        else:
            remedy = f"Mend it ({error.filename or repository}) and run again."
        raise ReleaseError(
            f"{model}: the release could not be written to {repository}: {error.strerror or error}. {remedy} "
            "What served before goes on serving."
        ) from error


def last_number(repository: Location, model: str) -> int:
    """The largest number that a release of the model ever had where a server could see it; 0: none is known."""
    try:
        return int(_numbers(repository, model).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0


def remember_number(repository: Location, model: str, number: int) -> None:
    """Never give that number to another release: servers keep what they said of its names, and cached answers."""
    path = _numbers(repository, model)
    if isinstance(path, RemotePath):
        path.write_bytes(str(number).encode())
        return
    files.write_whole(path, str(number))


def _numbers(repository: Location, model: str) -> Location:
    return repository.parent / f".{repository.name}.numbers" / model
