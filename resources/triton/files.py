"""File operations on a repository: the order of writes and removals, the lock, staging folders, and disk errors."""

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
from resources.errors import FULL, RefusedError, ReleaseError, StorageError
from resources.storage import atomic as files
from resources.storage.lease import leased
from resources.storage.locations import Location, contents
from resources.storage.locks import file_lock
from resources.storage.objects import LeaseTimes, RemotePath
from resources.triton.layout import CONFIG, MANIFEST, internal_names
from resources.triton.release import Release

#: The room that a release needs beside its engine, for the tokenizer with its library, configurations and manifest.
_BESIDE_ENGINE_BYTES = 20 * 2**20
#: This file marks a staging folder on this machine that has left a note in the store.
_NOTED = ".noted"
#: How long a process waits for the lock of a repository. Several releases can be published in that time.
PATIENCE_SECONDS = LeaseTimes().patience
#: The error numbers of a place where this user may not write.
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOG = logging.getLogger(__name__)


def sync(path: Location) -> None:
    """Make a file's bytes or a folder's names durable. Object storage does so before it answers."""
    if isinstance(path, Path):
        files.sync(path)


def bring_in(folder: Path, place: Location) -> None:
    """Move a staged folder to its place in the repository.

    A folder is renamed at once. Object storage cannot rename, so files are uploaded one by one, in the order that does
    the least harm if a server looks in between.
    """
    if not isinstance(place, RemotePath):
        folder.rename(place)
        return
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (_rank(name), name)):
        (place / name).upload(folder / name)


def replace_file(new: Location, place: Location) -> None:
    """Replace the file at `place` with `new`, which may be gone afterwards. Readers see one of the two, complete."""
    if isinstance(place, RemotePath):
        place.write_bytes(new.read_bytes())
    else:
        assert isinstance(new, Path)
        new.replace(place)


def discard(path: Location, bin_folder: Location) -> None:
    """Remove a folder of a repository.

    A folder on disk is renamed out of the repository at once. In object storage files are removed one by one, in the
    reverse order of `bring_in`. A server that polls must not see a Python model without its `model.py`, because it
    would wait for that file for ever.

    Args:
        path: The folder to remove.
        bin_folder: A folder on the same file system to move it into. It is not used in object storage.
    """
    if isinstance(path, RemotePath):
        names = list(path.sizes())
        for rank in sorted({_rank(name) for name in names}, reverse=True):
            path.remove([name for name in names if _rank(name) == rank])
        return
    if not path.exists():
        return
    assert isinstance(bin_folder, Path)
    # On a full disk no folder can be made, so the first removed folder becomes the bin itself.
    gone = bin_folder / uuid.uuid4().hex if bin_folder.exists() else bin_folder
    try:
        path.rename(gone)
    except OSError as error:
        if error.errno not in FULL:
            raise
        # The disk has no room even for a new name. Files are removed one by one, as in object storage, to make room.
        names = [name.relative_to(path).as_posix() for name in path.rglob("*") if not name.is_dir()]
        for name in sorted(names, key=_rank, reverse=True):
            (path / name).unlink(missing_ok=True)
        gone = path
    shutil.rmtree(gone, ignore_errors=True)


def _rank(name: str) -> int:
    """Return a file's place in the order of upload to object storage. Files are removed in the reverse order.

    `model.py` is first, because its version folder exists from the first file on. A manifest follows the other files
    of its release. The configuration at the top of the folder follows everything below it. A server that looks earlier
    completes a configuration by itself, or fails to load the model and looks again.
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
    """Download a whole folder. A folder that does not exist is treated as empty.

    Raises:
        ReleaseError: An object's name leads out of the folder.
    """
    for name, size_bytes in source.sizes().items():
        try:
            path = local_path(target, name)  # lint also reads repositories of unknown origin
        except ForeignError as error:
            raise ReleaseError(f"{source}: {error}, and is no path of a repository. Remove it.") from None
        (source / name).download(path, size_bytes)


@contextmanager
def on_this_machine(repository: Location, release: Release, *, alone: bool = True) -> Iterator[Path]:
    """Yield a repository on this machine that holds the release.

    It is the repository's own folder, or a copy that is removed at the end.

    Args:
        repository: The repository that holds the release.
        release: The release to open.
        alone: Whether the caller holds the repository's lock. Then a copy that a killed process left is removed too.
    """
    if not isinstance(repository, RemotePath):
        yield repository
        return
    root = _local_staging(repository).with_suffix(".copy" if alone else f".{uuid.uuid4().hex}")
    shutil.rmtree(root, ignore_errors=True)  # a killed process may have left it
    try:
        copy = root / repository.name
        for name in (release.model, *internal_names(release)):
            copy_tree(repository / name, copy / name)
        yield copy
    finally:
        shutil.rmtree(root, ignore_errors=True)


def repository_lock(repository: Location, patience_s: float = PATIENCE_SECONDS) -> AbstractContextManager[None]:
    """Hold the repository's lock. Every process that changes the repository holds it.

    A process that waits for the lock of a folder logs which process holds it.

    Args:
        repository: The repository to lock.
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
    """Hold the repository's lock for a reader, and yield whether it is held.

    Without the right to write there the lock cannot be taken. A reader can go on without it.
    """
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
    """Return the staging root. It lies beside the repository, on the same file system.

    Inside the repository Triton would poll it as a model, even under a hidden name.
    """
    return repository.parent / f".{repository.name}.staging"


@contextmanager
def staging_folder(repository: Location) -> Iterator[Path]:
    """Yield an empty folder below the staging root, and remove it with its content at the end.

    For object storage the folder is on this machine, and the note that `leave_note` left in the store is removed too.
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
    """Remove what killed publishers left in staging.

    Args:
        repository: The repository whose staging is cleared. The caller holds its lock.
        but: The names of folders below `staging_root` that stay.
    """
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
    """Copy staged files to `staging_root` in the store, so that the next publisher finds them if this one is killed.

    The publisher calls this before it moves the pointer. On disk the staging folder itself is in `staging_root`, so
    nothing is copied.

    Args:
        staged: The staging folder on this machine.
        repository: The repository that the release is published to.
        names: The files to copy, in this order, relative to `staged`.
    """
    root = staging_root(repository)
    if isinstance(root, RemotePath):
        (staged / _NOTED).touch()
        for name in names:
            (root / staged.name / name).upload(staged / name)


def take_note_back(staged: Path, repository: Location) -> None:
    """Remove the note of `leave_note`, once the pointer has moved or will not move.

    If the store does not answer, the note stays for the next publisher.
    """
    root = staging_root(repository)
    if isinstance(root, RemotePath) and (staged / _NOTED).exists():
        with suppress(StorageError):
            discard(root / staged.name, root)
            (staged / _NOTED).unlink()


def keep_note(staged: Path) -> None:
    """Leave the note to the next publisher. After this call, `take_note_back` does not remove it."""
    (staged / _NOTED).unlink(missing_ok=True)


def _local_staging(repository: Location) -> Path:
    root = staging_root(repository)
    if isinstance(root, RemotePath):
        # Each repository has its own folder, because `clear_staging` removes all of it under that repository's lock.
        return root.store.scratch / hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return root


@contextmanager
def clear_disk_errors(model: str, repository: Location, engine_bytes: int) -> Iterator[None]:
    """Turn any OSError into a ReleaseError that says what failed, where it failed, and what to do.

    Args:
        model: The model whose release is written.
        repository: The repository that the release is written to.
        engine_bytes: The size of the release's engine. The message uses it to say how much room is needed.
    """
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
            # The message names the folders and not the file of the error, because other writes there would fail too.
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
    """Return the largest number of any release of the model that a server could see, or 0 if none is known."""
    try:
        return int(_numbers(repository, model).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0


def remember_number(repository: Location, model: str, number: int) -> None:
    """Store the number, so that no other release of the model ever gets it.

    Servers keep the answers that they cached for a number, and what they reported about its models.
    """
    path = _numbers(repository, model)
    if isinstance(path, RemotePath):
        path.write_bytes(str(number).encode())
        return
    files.write_whole(path, str(number))


def _numbers(repository: Location, model: str) -> Location:
    return repository.parent / f".{repository.name}.numbers" / model
