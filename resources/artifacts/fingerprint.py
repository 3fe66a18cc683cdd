"""Fingerprints: digests of everything that makes an artifact.

The same digest means the same artifact, so nothing is built twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
#: Longer parts are kept as their digest, because people read the record.
_LONGEST_PART = 200
_PENDING = "pending:"
_STRING = r"""{0}(?!{0}{0})(?:[^{0}\\\n]|\\.)*+{0}"""
_LONG_STRING = r"""{0}{{3}}(?:[^{0}\\]|\\.|{0}(?!{0}{0}))*+{0}{{3}}"""
#: A piece of source: code with its short strings, and then a long string or a comment.
_PIECE = re.compile(
    rf"""(?P<code>(?>[^"'\#]+|{_STRING.format('"')}|{_STRING.format("'")})*+)"""
    rf"""(?P<other>\#[^\n]*|{_LONG_STRING.format('"')}|{_LONG_STRING.format("'")})?""",
    re.DOTALL,
)
#: The last line of a heading. A docstring may follow it.
_HEADING = re.compile(r"\s*(?:(?:async def|def|class)\b.*|[)\]][^{]*):")


@dataclass(frozen=True)
class Fingerprint:
    """The parts that an artifact is made of, and the digest of kind and parts, which names the artifact.

    Args:
        parts: JSON values. A long value is replaced by its own digest. The parts are kept with the record. They show
            later which of them has changed, and that the record is the one that the digest names.
        awaits: For a plan, the steps that have to be done before all parts are known.
    """

    kind: str
    digest: str
    parts: dict[str, Any]
    awaits: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: str, **inputs: Any) -> Self:
        """Make the fingerprint of a kind and its inputs.

        `fingerprint` computes its digest, and says which inputs are allowed.
        """
        values: dict[str, Any] = json.loads(json.dumps(inputs, default=_fields))
        parts = {name: _part(value) for name, value in values.items()}
        return cls(kind, fingerprint(kind, **parts), parts, tuple(sorted(_awaited(values))))


def is_made_of(kind: str, digest: str, parts: Mapping[str, Any]) -> bool:
    """Return whether the digest is that of the kind and the parts."""
    return "kind" not in parts and fingerprint(kind, **parts) == digest


def is_of_earlier_version(value: Any) -> bool:
    """Return whether the parts were noted by an earlier version, whose digests cannot be computed again from them.

    That version noted 16 digits of a long part's digest, and made the artifact's digest from the part itself.
    """
    if isinstance(value, dict):
        return any(is_of_earlier_version(inner) for inner in value.values())
    return isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{16}", value) is not None


def _part(value: Any) -> Any:
    if isinstance(value, dict):
        # Names of files may hold any bytes, and a record holds text.
        return {name.encode("utf-8", "backslashreplace").decode(): _part(inner) for name, inner in value.items()}
    text = json.dumps(value, sort_keys=True)
    if len(text) <= _LONGEST_PART and not re.search(r"\\ud[89ab]", text):
        return value
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def pending(step: str) -> str:
    """Return the text that stands in a plan for a digest that is not known before the step is done."""
    return f"{_PENDING}{step}"


def is_pending(text: str) -> bool:
    """Return whether the text is a result of `pending`."""
    return text.startswith(_PENDING)


def _awaited(value: Any) -> set[str]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return {step for one in inner for step in _awaited(one)}
    return {value.removeprefix(_PENDING)} if isinstance(value, str) and is_pending(value) else set()


def fingerprint(kind: str, **inputs: Any) -> str:
    """Return the hex SHA-256 of the kind and its inputs, whose order does not matter.

    Inputs are JSON values and dataclasses. The text of a set or of an object is different in every process, so an
    artifact with such an input would never be found again.

    Raises:
        TypeError: An input is neither a JSON value nor a dataclass.
    """
    text = json.dumps({"kind": kind, **inputs}, sort_keys=True, default=_fields)
    return hashlib.sha256(text.encode()).hexdigest()


def _fields(value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} cannot be part of a fingerprint")


@cache
def code_version(*modules: str) -> str:
    """Return the digest of the code of the named modules or packages, found without importing them.

    The code that produces an artifact is part of its inputs: a corrected exporter must export again. Comments,
    docstrings and blank lines are not part of the code.

    Args:
        modules: Names of modules and packages. `-NAME` leaves out a part of a package that is named before it.
    """
    return digest_of_files((_name_of(file), _code_digest(file)) for file in _files_of(modules))[:16]


def _files_of(modules: Iterable[str]) -> set[Path]:
    found: set[Path] = set()
    for module in modules:
        path = _PACKAGE_ROOT.joinpath(*module.removeprefix("-").split("."))
        files = {*path.rglob("*.py")} if path.is_dir() else {path.with_suffix(".py")}
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{module} is no module: {missing[0]} is not there")
        found = found - files if module.startswith("-") else found | files
    return found


def _name_of(file: Path) -> str:
    return file.relative_to(_PACKAGE_ROOT).as_posix()


@cache
def _code_digest(file: Path) -> str:
    return hashlib.sha256(code_of(file.read_text(encoding="utf-8")).encode()).hexdigest()


def code_of(source: str) -> str:
    """Return the part of Python source that counts: all but comments, docstrings, blank lines and trailing spaces.

    Only the text is examined, because `ast.dump` and `tokenize` give other results in other versions of Python.
    """
    parts: list[str] = []
    end = 0
    for begin, stop, is_prose in _long_strings_and_comments(source):
        parts += _lines(source[end:begin])
        if not is_prose:
            parts.append(source[begin:stop])
        end = stop
    return "\n".join([*parts, *_lines(source[end:])])


def _lines(code: str) -> list[str]:
    return [line.rstrip() for line in code.split("\n") if line.strip()]


def _long_strings_and_comments(source: str) -> Iterator[tuple[int, int, bool]]:
    """Yield the beginning and the end of each long string and each comment, and whether it is prose.

    A long string is prose, that is a docstring, if it is the only text of its lines and follows a heading or begins the
    file.
    """
    last = ""  # the last line of code
    for piece in _PIECE.finditer(source):
        code = piece["code"].rstrip()
        last = code[code.rfind("\n") + 1 :] or last
        begin, end = piece.span("other")
        if begin < 0:
            continue
        is_prose = source[begin] == "#"
        if not is_prose:
            is_prose = (not last or _HEADING.fullmatch(last) is not None) and _has_its_lines_alone(source, begin, end)
            last = "a string"
        yield begin, end, is_prose


def _has_its_lines_alone(source: str, begin: int, end: int) -> bool:
    before = source[source.rfind("\n", 0, begin) + 1 : begin]
    stop = source.find("\n", end)
    after = source[end : stop if stop >= 0 else len(source)]
    return not before.strip() and not after.partition("#")[0].strip()


@cache
def code_versions(*modules: str) -> dict[str, str]:
    """Return the code version of each module by name, so that a plan can say which of them changed."""
    left_out = [module for module in modules if module.startswith("-")]
    return {module: code_version(module, *left_out) for module in modules if module not in left_out}


@cache
def file_versions(*modules: str) -> dict[str, str]:
    """Return the digest of each module's files, byte for byte, for modules that are copied into artifacts."""
    return {
        module: digest_of_files(
            (_name_of(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in _files_of([module])
        )[:16]
        for module in modules
    }


@cache
def library_versions(*distributions: str) -> dict[str, str]:
    """Return the installed versions by distribution name, `absent` for one that is not installed."""
    return {name: _version(name) for name in distributions}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def digest_of_files(files: Iterable[tuple[str, str]]) -> str:
    """Return one digest for several files, each given as name and SHA-256."""
    return fingerprint("files", files=sorted(files))
