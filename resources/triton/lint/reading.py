"""Read files of a repository of unknown origin. Sizes are bounded, and no file outside of the repository is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from resources.boundary.foreign import ForeignError, local_path, open_regular, read_whole

#: Triton's documentation states no limit. A configuration with a thousand steps has a quarter of this size.
LARGEST_CONFIG_BYTES = 2**20
LARGEST_SOURCE_BYTES = 2**20
#: Protobuf accepts no larger message.
LARGEST_GRAPH_BYTES = 2**31 - 1
#: The most findings of one model. The limit keeps a hostile configuration from filling the report.
MOST_FINDINGS = 200
#: The most characters of one finding. A name in it could be as long as the file that it comes from.
LONGEST_MESSAGE = 500


class TooLargeError(Exception):
    """A file is larger than any valid file of its kind."""


def read_file(path: Path, limit_bytes: int) -> bytes:
    """Read a regular file of at most `limit_bytes`.

    Raises:
        OSError: The file cannot be read.
        ForeignError: The file is not a regular file.
        TooLargeError: The file is larger. The message is meant for the user.
    """
    with open_regular(path) as file:
        data = read_whole(file, limit_bytes)
    if data is None:
        raise TooLargeError(f"is larger than {limit_bytes:,} bytes, so it was not read. Put the right file there.")
    return data


def is_below(folder: Path, path: Path) -> bool:
    """Return whether the path is in the folder after all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def why_not_below(folder: Path, name: str) -> str | None:
    """Return why a name, which a file of the repository gives, is not a path below the folder, or None if it is one."""
    try:
        # ONNX Runtime and Triton also accept ./x and a//x.
        local_path(folder, PurePosixPath(name).as_posix())
    except ForeignError as error:
        return str(error)
    return None


def links_out(root: Path, folder: Path) -> Iterator[Path]:
    """Yield the links in a folder of the repository that lead out of the repository."""
    for where, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(where, name)
            if path.is_symlink() and not is_below(root, path):
                yield path


def text_of(name: str | bytes) -> str:
    """Return a name in a graph as text. Protobuf gives names that are not UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")


def shortened(text: str) -> str:
    """Return the message, cut off after LONGEST_MESSAGE characters."""
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
