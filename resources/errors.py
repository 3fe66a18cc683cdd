"""What can go wrong, by the part that found it.

Every message is written for the person who has to act: what was being done, to which model and revision, what was
wrong, and what to do now. Anything that is not a `RefineryError` is a defect of this project.
"""

import errno

#: What the system says where nothing more can be written: no room, no quota, or a file too large for its limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: What it says where a file may not be written, and where the disk itself is at fault.
CLOSED, BROKEN = (errno.EACCES, errno.EPERM, errno.EROFS), (errno.EIO, errno.ESTALE)

#: How SQLite's words begin where it may not open or write a file. It says the same where there is no room for another.
_DATABASE_CLOSED = ("unable to open", "attempt to write")


def disk_remedy(number: int | None) -> str:
    """Say what to do about a disk, by the system's number of the error. Empty: no disk is to blame."""
    if number in FULL:
        return "Make room there and run again; `refinery gc` removes what nobody needs any more."
    if number in CLOSED:
        return "Whoever runs this has to be able to read and to write there."
    return "Look after that disk, and run again." if number in BROKEN else ""


def database_trouble(said: str) -> str:
    """Say what to do about a database whose files cannot be written, in SQLite's words."""
    remedy = disk_remedy(errno.ENOSPC)
    if said.startswith(_DATABASE_CLOSED):
        remedy = remedy.replace("Make room there", "Make room there, or let whoever runs this write there,")
    return f"A database below REFINERY_HOME: {said}. {remedy}"


def disk_trouble(error: BaseException | None) -> str:
    """Say of an error, or of what caused it, which file it concerns and what to do. Empty: no disk is to blame."""
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
    """What a library says first: its error's first line, or the error's type where it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


class RefineryError(Exception):
    """Base of all errors that a user can cause and mend."""


class CatalogError(RefineryError):
    """The models file cannot be used."""


class CheckpointError(RefineryError):
    """A checkpoint cannot be had, is incomplete, or does not fit its task."""


class UnfetchedError(CheckpointError):
    """A checkpoint is not on this machine. revision: what would be fetched."""

    def __init__(self, source: str, revision: str) -> None:
        super().__init__(f"source: {source} at {revision[:12]} is not on this machine yet.")
        self.revision = revision


class ExportError(RefineryError):
    """PyTorch's model could not be turned into an ONNX graph that computes the same."""


class EngineError(RefineryError):
    """One engine could not be built or run. Costs that candidate alone."""


class IsolationError(EngineError):
    """A child process was stopped by a limit, killed, or failed."""


class NoChampionError(RefineryError):
    """No engine of a model is accurate enough to be served."""


class ReleaseError(RefineryError):
    """A release could not be made, proven, or read back."""


class ServerError(RefineryError):
    """A Triton server could not be started or did not answer as it should."""


class StorageError(RefineryError):
    """Object storage does not answer or refuses, or another process holds what was to be changed there."""


class ArtifactError(RefineryError):
    """The artifact store lacks what a step needs."""


class LockError(RefineryError):
    """A lock cannot be held."""


class TrackingError(RefineryError):
    """MLflow could not be written."""


class NotificationError(RefineryError):
    """Nobody could be told of what happened."""
