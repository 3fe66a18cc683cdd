"""Digests of everything that makes an artifact: the same digest means the same artifact, so nothing is built twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
#: Longer parts are kept by their digest: a record is there to be read.
_LONGEST_PART = 200
_PENDING = "pending:"


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
    """Digest of the source of the named modules or packages, found without importing them.

    What produces an artifact is part of what it was made from: a corrected exporter must export again.
    """
    files = []
    for module in modules:
        path = _PACKAGE_ROOT.joinpath(*module.split("."))
        sources = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for source in sources:
            name = source.relative_to(_PACKAGE_ROOT).as_posix()
            files.append((name, hashlib.sha256(source.read_bytes()).hexdigest()))
    return digest_of_files(files)[:16]


@cache
def code_versions(*modules: str) -> dict[str, str]:
    """The same of each of the modules alone, by name: a part of a fingerprint that can say which of them changed."""
    return {module: code_version(module) for module in modules}


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
