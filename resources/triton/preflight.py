"""Check before anything is built whether a release could be published."""

from __future__ import annotations

import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

from resources.settings.workspace import Workspace
from resources.storage.locations import Location
from resources.storage.objects import RemotePath
from resources.triton.environment import require_installed
from resources.triton.files import clear_disk_errors
from resources.triton.fleet import Fleet
from resources.triton.layout import is_published_here


def require_publishable(workspace: Workspace, model: str, target: str) -> None:
    """Raise the error now that publishing would raise at its end. Nothing is changed.

    Raises:
        ReleaseError: The target's repository cannot be written.
        StorageError: The repository is in object storage, which does not answer or refuses.
        ServerError: A configured server does not answer, or does not run in the configured model control mode. Without
            such servers: the embedded server is not installed, and the model has no release yet.
    """
    repository, settings = workspace.repository(target), workspace.triton
    require_writable(repository, model)
    if settings.driven:
        with Fleet(settings) as fleet:
            fleet.require_ready()
    elif settings.provable and not is_published_here(repository, model):
        # A model with releases may turn out unchanged, and such a run needs no server.
        require_installed(settings.environment)


def require_writable(repository: Location, model: str) -> None:
    """Raise ReleaseError, or StorageError in object storage, if a test file cannot be written to the repository.

    The test file is removed again.
    """
    if isinstance(repository, RemotePath):
        beside, name = repository.parent / f".{repository.name}.probe", uuid.uuid4().hex
        (beside / name).write_bytes(b"probe")
        beside.remove([name])
        return
    with clear_disk_errors(model, repository, 0):
        # The probe is not made in the staging folder, because the process that holds the repository's lock clears that.
        above = next(path for path in repository.parents if path.exists())
        try:
            with TemporaryDirectory(dir=above, prefix=".refinery-probe-") as folder:
                probe = Path(folder) / uuid.uuid4().hex
                probe.touch()
                if repository.exists():
                    # Triton looks at folders only, so it does not see this file.
                    probe.rename(repository / probe.name).unlink()
        except OSError as error:
            error.filename = str(above)  # the probe's own name would tell the user nothing
            raise
