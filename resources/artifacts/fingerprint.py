"""Digests of everything that makes an artifact: the same digest means the same artifact, so nothing is built twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


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
