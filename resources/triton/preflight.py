"""What would keep a release from being published, as far as it is known before anything is built."""

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
    """Raise ReleaseError or ServerError, as publishing would at its end: where the target's repository cannot be
    written, or its servers do not answer, or not in the mode that is configured. Nothing there is changed.
    """
    repository, settings = workspace.repository(target), workspace.triton
    require_writable(repository, model)
    if settings.driven:
        with Fleet(settings) as fleet:
            fleet.require_ready()
    elif settings.provable and not is_published_here(repository, model):
        require_installed(settings.environment)  # a run that changes nothing can do without


def require_writable(repository: Location, model: str) -> None:
    """Raise ReleaseError where no release could be brought into the repository, by trying with a file."""
    if isinstance(repository, RemotePath):
        beside, name = repository.parent / f".{repository.name}.probe", uuid.uuid4().hex
        (beside / name).write_bytes(b"probe")
        beside.remove([name])
        return
    with clear_disk_errors(model, repository, 0):
        # Not in the staging folder: who holds the repository's lock sweeps that.
        above = next(path for path in repository.parents if path.exists())
        try:
            with TemporaryDirectory(dir=above, prefix=".refinery-probe-") as folder:
                probe = Path(folder) / uuid.uuid4().hex
                probe.touch()
                if repository.exists():
                    # Triton looks at folders alone.
                    probe.rename(repository / probe.name).unlink()
        except OSError as error:
            error.filename = str(above)  # not that of the probe
            raise
