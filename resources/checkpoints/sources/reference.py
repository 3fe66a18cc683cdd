"""Where checkpoints come from: a folder, a Python package, the Hugging Face Hub, a registry, or object storage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resources.errors import CheckpointError

Kind = Literal["folder", "package", "hub", "registry", "objects"]

PACKAGE_PREFIX = "package:"
#: May stand before a Hub id, which then is no name of the catalog.
HUB_PREFIX = "hub:"
#: Places in object storage, as Triton writes them too.
OBJECT_SCHEMES = ("s3://", "gs://", "as://")
_HUB_ID = re.compile(r"(hub:)?(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder on this machine. `revision`: the source's own name of it, such as the Hub's commit; None
    where the content names itself.
    """

    folder: Path
    revision: str | None


def kind_of(source: str) -> Kind:
    """Raises CheckpointError where it is of no kind."""
    if source.startswith(PACKAGE_PREFIX):
        return "package"
    if source.startswith("/"):
        return "folder"
    if source.startswith("models:"):
        return "registry"
    if source.startswith(OBJECT_SCHEMES):
        return "objects"
    if not is_hub_id(source):
        raise CheckpointError(f"source: {source_forms(source)}")
    return "hub"


def hub_reference(source: str) -> tuple[str, str | None]:
    """The repository's id, and the branch, tag or commit, if one is named."""
    match = _HUB_ID.fullmatch(source)
    assert match is not None, "kind_of said so"
    return match["id"], match["revision"]


def is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None


def source_forms(source: str) -> str:
    """What a source may be, for one that is none of it."""
    return (
        f"{source!r} is neither a folder (/..., ./...), nor package:NAME/path, nor a Hub id (org/name or "
        "org/name@revision), nor models:/name@alias, nor s3://, gs:// or as://."
    )
