"""Names and files of other parties: how they become paths on this machine, and how they are read.

Anybody may make a checkpoint, a bucket, a registry or a shared store. Every name in them that becomes a path goes
through `local_path`. Every file of a foreign folder is opened by `open_below`, and every JSON document is read by
`parse_json`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resources.errors import RefineryError

#: Linux allows 255 bytes for one part of a path and 4,096 for the whole path, of which the folder needs some.
_MOST_PART_BYTES = 255
_MOST_NAME_BYTES = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: The paths at which huggingface_hub keeps files that several repositories share, below its cache's `blobs`.
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")

#: A configuration has a few kilobytes; one with a hundred thousand labels has five megabytes.
MOST_CONFIG_BYTES = 16 * 2**20
MOST_CONFIG_VALUES = 10**6
#: A tokenizer of 900,000 pieces, as XLM-V's, has 58 MB and 2.7 million values.
MOST_TOKENIZER_BYTES = 64 * 2**20
MOST_TOKENIZER_VALUES = 3 * 10**6
#: For a record, manifest or configuration of our own. A record with a hundred thousand long labels needs half of it.
MOST_DOCUMENT_BYTES = 64 * 2**20
#: Real configurations nest five levels deep.
MOST_DEPTH = 32
#: For one text in a configuration, in characters. Chat templates have some ten thousand.
MOST_TEXT = 2**20
_VALUE_MARKS = (b",", b"[", b"{")


class ForeignError(RefineryError):
    """A name or a file of another party is refused.

    The message begins with the name or file and says what is wrong with it.
    """


def check_name(name: object) -> str:
    """Return a relative path of another party if it stays below a folder.

    Raises:
        ForeignError: The path leads out of its folder or is no valid name of a file.
    """
    if not isinstance(name, str):
        # The value is never shown, because a few lines of YAML whose aliases multiply become an endless text.
        raise ForeignError(f"a {type(name).__name__} is not a file name")
    shown = repr(name if len(name) <= 100 else f"{name[:100]}...")
    try:
        parts = [part.encode() for part in name.split("/")]
    except UnicodeEncodeError:
        raise ForeignError(f"{shown} is not a file name: it is not valid Unicode") from None
    if not {b"", b".", b".."}.isdisjoint(parts):
        raise ForeignError(f"{shown} leads out of its folder, or has an empty part")
    if "\\" in name or _CONTROL.search(name):
        raise ForeignError(f"{shown} holds a backslash or a control character")
    if max(map(len, parts)) > _MOST_PART_BYTES or len(name.encode()) > _MOST_NAME_BYTES:
        raise ForeignError(f"{shown} is too long for a file's name")
    return name


def local_path(folder: Path, name: object) -> Path:
    """Return the path of a foreign name below the folder.

    Raises:
        ForeignError: The path leads out of the folder, by itself or through a link that lies there.
    """
    path = folder / check_name(name)
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # the links form a circle
        inside = False
    if not inside:
        raise ForeignError(f"{name!r} is a link that leads out of {folder}")
    return path


def open_below(folder: Path, name: object) -> io.BufferedReader:
    """Open a regular file of a foreign folder.

    Raises:
        OSError: The file does not exist (FileNotFoundError) or cannot be opened.
        ForeignError: It is no regular file, or a link that leads out of the folder.
    """
    path = folder / check_name(name)
    stream = open_regular(path)
    try:
        # The opened file is checked, because the path may name another one by now.
        real = Path(f"/proc/self/fd/{stream.fileno()}").readlink()
        if not _belongs(folder, real):
            raise ForeignError(f"{path} is a link that leads out of its folder")
    except BaseException:
        stream.close()
        raise
    return stream


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, wherever its links lead.

    Other kinds of files are refused, because a pipe would wait for ever and a device has no end.

    Raises:
        OSError: The file cannot be opened.
        ForeignError: It is no regular file.
    """
    _require_regular(path, path.stat())
    # A pipe may replace the file at this moment. O_NONBLOCK opens a pipe without waiting.
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise ForeignError(f"{path} is not a regular file") from None
        raise
    try:
        _require_regular(path, os.fstat(opened))
        return os.fdopen(opened, "rb")
    except BaseException:
        os.close(opened)
        raise


def is_file_below(folder: Path, name: object) -> bool:
    """Return whether the foreign folder has a regular file of that name.

    Raises:
        ForeignError: The name leads to something that `open_below` refuses.
    """
    path = folder / check_name(name)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # the links form a circle
        raise ForeignError(f"{path} cannot be inspected: {error.strerror}") from None
    if stat.S_ISDIR(found.st_mode):
        return False
    _require_regular(path, found)
    if not _belongs(folder, path.resolve()):
        raise ForeignError(f"{path} is a link that leads out of its folder")
    return True


def read_below(folder: Path, name: object, most_bytes: int) -> bytes:
    """Return the bytes of a regular file of a foreign folder.

    Raises:
        OSError: The file cannot be read.
        ForeignError: It is larger than `most_bytes`, or `open_below` refuses it.
    """
    with open_below(folder, name) as stream:
        data = read_whole(stream, most_bytes)
    if data is None:
        raise ForeignError(f"{folder / str(name)} is larger than {most_bytes // 2**20} MB")
    return data


def read_whole(stream: io.BufferedReader, most_bytes: int) -> bytes | None:
    """Read a file to its end, or return None if it is larger than `most_bytes`.

    The limit also holds if the file grows during the read.
    """
    if os.fstat(stream.fileno()).st_size > most_bytes:
        return None
    data = stream.read(most_bytes + 1)
    return data if len(data) <= most_bytes else None


def parse_json(data: bytes, *, most_values: int = MOST_CONFIG_VALUES) -> Any:
    """Parse a JSON document in UTF-8.

    One byte of JSON can become a hundred bytes of objects, so the values are counted before anything is parsed.

    Raises:
        ValueError: Anything is wrong with the document.
    """
    if sum(data.count(mark) for mark in _VALUE_MARKS) > most_values:
        raise ValueError(f"it holds more than {most_values} values")
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except MemoryError:
        raise ValueError("it needs more memory than this machine has") from None


def values_of(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value of a JSON document with its key, however deep it lies.

    The items of a list come with the list's key.

    Raises:
        ValueError: The document is too deep for its later readers, or holds a text that is too long or cannot be
            written as UTF-8.
    """
    left: list[tuple[str, Any, int]] = [("", document, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > MOST_DEPTH:
            raise ValueError(f"its brackets are nested more than {MOST_DEPTH} levels deep")
        if isinstance(value, str):
            _require_text(value)
        elif isinstance(value, dict):
            for name in value:
                _require_text(name)
            left += [(name, part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list):
            left += [(key, part, depth + 1) for part in value]
        yield key, value


def _require_text(text: str) -> None:
    if len(text) > MOST_TEXT:
        raise ValueError(f"it holds a text of more than {MOST_TEXT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ForeignError(f"{path} is not a regular file")


def _belongs(folder: Path, real: Path) -> bool:
    """Return whether the file lies in the folder, or in the Hub's cache that holds the folder.

    `real` is the file's path with all links followed.
    """
    home = folder.resolve()
    if real.is_relative_to(home):
        return True
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    if real.is_relative_to(repository / "blobs"):
        return True
    shared = repository.parent / "blobs"
    return real.is_relative_to(shared) and _SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()) is not None
