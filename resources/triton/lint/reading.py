"""Reading files of a repository that anybody may have written: bounded, and never from outside of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from resources.boundary.foreign import ForeignError, local_path, open_regular, read_whole

#: Triton's documentation knows no limit. A configuration of a thousand steps has a quarter of this.
LARGEST_CONFIG_BYTES = 2**20
LARGEST_SOURCE_BYTES = 2**20
#: Protobuf takes no message beyond this.
LARGEST_GRAPH_BYTES = 2**31 - 1
#: Of one model, so that a hostile configuration does not fill the report.
MOST_FINDINGS = 200
#: Of one finding. Names in it may be as long as their file.
LONGEST_MESSAGE = 500


class TooLargeError(Exception):
    """A file is larger than anything of its kind."""


def read_file(path: Path, limit_bytes: int) -> bytes:
    """Read a regular file of at most that size. Raises OSError, ForeignError, or TooLargeError with a sentence for
    people.
    """
    with open_regular(path) as file:
        data = read_whole(file, limit_bytes)
    if data is None:
        raise TooLargeError(f"is larger than {limit_bytes:,} bytes, so it was not read. Put the right file there.")
    return data


def is_below(folder: Path, path: Path) -> bool:
    """Tell whether the path, all its links followed, is in the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def why_not_below(folder: Path, name: str) -> str | None:
    """Say what is wrong with a name that a file gives for another one below the folder; None where nothing is."""
    try:
        # ONNX Runtime and Triton take ./x and a//x as well.
        local_path(folder, PurePosixPath(name).as_posix())
    except ForeignError as error:
        return str(error)
    return None


def links_out(root: Path, folder: Path) -> Iterator[Path]:
    """The links in a folder of the repository that lead out of the repository."""
    for where, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(where, name)
            if path.is_symlink() and not is_below(root, path):
                yield path


def text_of(name: str | bytes) -> str:
    """A name in a graph, which protobuf gives as bytes where it is no UTF-8."""
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")


def shortened(text: str) -> str:
    """The beginning of a message that is too long to be read."""
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
