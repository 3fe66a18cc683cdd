"""The errors that a user can cause and mend, one class for each part of the project that finds them.

Every message is written for the person who has to act. It says what was being done, to which model and revision, what
was wrong, and what to do now. An exception that is not a `RefineryError` is a defect of this project.
"""

import errno

#: The system's error numbers if nothing more can be written: no room, no quota, or a file too large for its limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: The error numbers if a file may not be written, and if the disk itself is at fault.
CLOSED, BROKEN = (errno.EACCES, errno.EPERM, errno.EROFS), (errno.EIO, errno.ESTALE)

#: SQLite's messages begin like this if it may not open or write a file, and also if there is no room for a new one.
_DATABASE_CLOSED = ("unable to open", "attempt to write")


def disk_remedy(number: int | None) -> str:
    """Return what to do about a disk for a system's error number, or an empty text if no disk is to blame."""
    if number in FULL:
        return "Make room there and run again; `refinery gc` removes artifacts that nothing needs any more."
    if number in CLOSED:
        return "The user who runs this needs permission to read and write there."
    return "Check that disk, and run again." if number in BROKEN else ""


def database_trouble(said: str) -> str:
    """Return what to do about a database whose files cannot be written, from SQLite's message."""
    remedy = disk_remedy(errno.ENOSPC)
    if said.startswith(_DATABASE_CLOSED):
        remedy = remedy.replace("Make room there", "Make room there, or let the user who runs this write there,")
    return f"A database below REFINERY_HOME: {said}. {remedy}"


def disk_trouble(error: BaseException | None) -> str:
    """Return which file an error or one of its causes concerns, and what to do about the disk.

    The text is empty if no disk is to blame.
    """
    while error is not None:
        remedy = disk_remedy(error.errno) if isinstance(error, OSError) else ""
        if isinstance(error, OSError) and remedy:
            return f"{error.filename or 'A file'}: {error.strerror or error}. {remedy}"
        if getattr(error, "sqlite_errorname", "").startswith(
            ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")
        ):
            return database_trouble(str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first line of a library's error, or the error's type if it has no text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


class RefineryError(Exception):
    """Base of all errors that a user can cause and mend."""


class CatalogError(RefineryError):
    """The models file cannot be used."""


class CheckpointError(RefineryError):
    """A checkpoint cannot be obtained, is incomplete, or does not fit its task."""


class UnfetchedError(CheckpointError):
    """A checkpoint is not on this machine.

    Args:
        revision: The revision that would be fetched.
    """

    def __init__(self, source: str, revision: str) -> None:
        super().__init__(f"source: {source} at {revision[:12]} is not on this machine yet.")
        self.revision = revision


class ExportError(RefineryError):
    """PyTorch's model could not be turned into an ONNX graph that computes the same."""


class EngineError(RefineryError):
    """One engine could not be built or run. The failure affects that candidate alone."""


class IsolationError(EngineError):
    """A child process was stopped by a limit, killed, or failed."""


class NoChampionError(RefineryError):
    """No engine of a model is accurate enough to be served."""


class ReleaseError(RefineryError):
    """A release could not be made, proven, or read back."""


class ServerError(RefineryError):
    """A Triton server could not be started or did not answer as it should."""


class StorageError(RefineryError):
    """Object storage does not answer or refuses, or another process holds the place that was to be changed."""


class RefusedError(StorageError):
    """The store answers that this user lacks the permission."""


class ArtifactError(RefineryError):
    """The artifact store lacks what a step needs."""


class LockError(RefineryError):
    """A lock cannot be held."""


class TrackingError(RefineryError):
    """MLflow could not be written to."""


class NotificationError(RefineryError):
    """A notification of what happened could not be delivered."""
