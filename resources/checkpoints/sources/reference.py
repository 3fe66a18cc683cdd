"""The forms of a source: a folder, a Python package, a Hugging Face Hub id, a registry version, or object storage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resources.errors import CheckpointError

Kind = Literal["folder", "package", "hub", "registry", "objects"]

PACKAGE_PREFIX = "package:"
#: The prefix that marks a text as a Hub id, where a name of the catalog is possible too.
HUB_PREFIX = "hub:"
#: The schemes of object storage. Triton uses the same.
OBJECT_SCHEMES = ("s3://", "gs://", "as://")
_HUB_ID = re.compile(r"(hub:)?(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder on this machine.

    Args:
        folder: The folder.
        revision: The source's own name of the revision, such as the Hub's commit. None means that the revision is
            derived from the content.
    """

    folder: Path
    revision: str | None


def kind_of(source: str) -> Kind:
    """Return the kind of a source.

    Raises:
        CheckpointError: The source has none of the known forms.
    """
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
    """Return the repository's id, and the branch, tag or commit if the source names one."""
    match = _HUB_ID.fullmatch(source)
    assert match is not None, "callers check the form with kind_of"
    return match["id"], match["revision"]


def is_hub_id(source: str) -> bool:
    """Return whether the source has the form of a Hub id."""
    return _HUB_ID.fullmatch(source) is not None


def source_forms(source: str) -> str:
    """Return a message with all forms of a source, for a source that has none of them."""
    return (
        f"{source!r} has none of the forms of a source. Give a folder (/..., ./...), package:NAME/path, a Hub id "
        "(org/name or org/name@revision), models:/name@alias, or an s3://, gs:// or as:// address."
    )
