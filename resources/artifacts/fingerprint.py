"""Digests of everything that makes an artifact: the same digest means the same artifact, so nothing is built twice."""

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
#: Longer parts are kept by their digest: a record is there to be read.
_LONGEST_PART = 200
_PENDING = "pending:"
_STRING = r"""{0}(?!{0}{0})(?:[^{0}\\\n]|\\.)*+{0}"""
_LONG_STRING = r"""{0}{{3}}(?:[^{0}\\]|\\.|{0}(?!{0}{0}))*+{0}{{3}}"""
#: Code with its short strings, and then a long string or a comment.
_PIECE = re.compile(
    rf"""(?P<code>(?>[^"'\#]+|{_STRING.format('"')}|{_STRING.format("'")})*+)"""
    rf"""(?P<other>\#[^\n]*|{_LONG_STRING.format('"')}|{_LONG_STRING.format("'")})?""",
    re.DOTALL,
)
#: How the last line of a heading ends, which a docstring may follow.
_HEADING = re.compile(r"\s*(?:(?:async def|def|class)\b|[)\]]).*:")


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact is made of, part by part, and the digest that names it: that of the kind and the parts.

    parts: JSON values, what is long by its own digest. They are kept with the record, so that it can be said later
    which of them is another, and that the record is the one that the digest names. awaits: of a plan's, the steps that
    have to be done before all of it is known.
    """

    kind: str
    digest: str
    parts: dict[str, Any]
    awaits: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: str, **inputs: Any) -> Self:
        """See `fingerprint`, which is its digest."""
        values: dict[str, Any] = json.loads(json.dumps(inputs, default=_fields))
        parts = {name: _part(value) for name, value in values.items()}
        return cls(kind, fingerprint(kind, **parts), parts, tuple(sorted(_awaited(values))))


def is_made_of(kind: str, digest: str, parts: Mapping[str, Any]) -> bool:
    """Tell whether the digest is that of the kind and the parts."""
    return "kind" not in parts and fingerprint(kind, **parts) == digest


def is_of_earlier_version(value: Any) -> bool:
    """Tell whether parts were noted by a version whose digests cannot be computed again from them.

    It noted 16 digits of a long part's digest, and made the artifact's digest from the part itself.
    """
    if isinstance(value, dict):
        return any(is_of_earlier_version(inner) for inner in value.values())
    return isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{16}", value) is not None


def _part(value: Any) -> Any:
    if isinstance(value, dict):
        # Names of files may be any bytes, and a record holds text.
        return {name.encode("utf-8", "backslashreplace").decode(): _part(inner) for name, inner in value.items()}
    text = json.dumps(value, sort_keys=True)
    if len(text) <= _LONGEST_PART and not re.search(r"\\ud[89ab]", text):
        return value
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def pending(step: str) -> str:
    """Stands in a plan for a digest that is known once the step is done, and not before."""
    return f"{_PENDING}{step}"


def is_pending(text: str) -> bool:
    """Whether it is what `pending` gives."""
    return text.startswith(_PENDING)


def _awaited(value: Any) -> set[str]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return {step for one in inner for step in _awaited(one)}
    return {value.removeprefix(_PENDING)} if isinstance(value, str) and is_pending(value) else set()


def fingerprint(kind: str, **inputs: Any) -> str:
    """Hex SHA-256 of the kind and its inputs; their order does not matter.

    Inputs are what JSON can say, and dataclasses. Anything else is a TypeError: the text of a set or of an object is
    another in every process, and nothing would ever be found again.
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
        found = found - files if module.startswith("-") else found | files
    return found


def _name_of(file: Path) -> str:
    return file.relative_to(_PACKAGE_ROOT).as_posix()


@cache
def _code_digest(file: Path) -> str:
    return hashlib.sha256(code_of(file.read_text(encoding="utf-8")).encode()).hexdigest()


def code_of(source: str) -> str:
    """Return what counts of Python's source: all but comments, docstrings, blank lines and spaces at ends of lines.

    The text alone is looked at, because `ast.dump` and `tokenize` give other results in other versions of Python.
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
    """Yield where each long string and each comment begins and ends, and whether it is prose.

    A long string is prose, a docstring, if it is the only text of its lines and follows a heading or the file's top.
    """
    last = ""  # line of code
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
    """Return the code version of each of the modules alone, by name, so that a plan can say which of them changed."""
    left_out = [module for module in modules if module.startswith("-")]
    return {module: code_version(module, *left_out) for module in modules if module not in left_out}


@cache
def file_versions(*modules: str) -> dict[str, str]:
    """Return the digest of each module's files byte for byte, for those that are copied into what is made."""
    return {
        module: digest_of_files(
            (_name_of(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in _files_of([module])
        )[:16]
        for module in modules
    }


@cache
def library_versions(*distributions: str) -> dict[str, str]:
    """Installed versions by distribution name; `absent` where one is not installed."""
    return {name: _version(name) for name in distributions}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def digest_of_files(files: Iterable[tuple[str, str]]) -> str:
    """One digest for several files, each given as name and SHA-256."""
    return fingerprint("files", files=sorted(files))
