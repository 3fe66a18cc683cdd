"""The layout of a Triton model repository, read from the repository itself. Everything here is pure or only reads.

minilm/config.pbtxt                  the pointer: the public ensemble, pinned to one release
minilm/<N>/release.json              what release N is; Triton needs the folder, and git would drop it if empty
minilm/<N>/config.pbtxt              the pointer as release N wrote it: rolling back is copying it one folder up
minilm__r<N>__tokenizer/1/...        immutable
minilm__r<N>__engine/1/...           immutable
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from resources.triton.release import Release

CONFIG = "config.pbtxt"
MANIFEST = "release.json"
PARTS = ("tokenizer", "engine")
_INTERNAL = re.compile(r"(?P<model>.+)__r(?P<number>\d+)__(?P<part>[a-z]+)")
_PINNED = re.compile(r"version_policy\s*{\s*specific\s*{\s*versions:\s*(\d+)")


def internal_name(model: str, number: int, part: Literal["tokenizer", "engine", "proof"]) -> str:
    """The folder, and so the Triton name, of one part of a release."""
    return f"{model}__r{number}__{part}"


def parse_internal(name: str) -> tuple[str, int, str] | None:
    """Model, release number and part of an internal's name; None for any other name."""
    match = _INTERNAL.fullmatch(name)
    return (match["model"], int(match["number"]), match["part"]) if match else None


def public_models(repository: Path) -> list[str]:
    """Names that a server of this repository answers to."""
    if not repository.is_dir():
        return []
    return sorted(
        path.name for path in repository.iterdir() if (path / CONFIG).is_file() and parse_internal(path.name) is None
    )


def read_release(repository: Path, model: str, number: int) -> Release | None:
    """The manifest of a release; None where it is not there or not readable."""
    try:
        return Release.model_validate_json((repository / model / str(number) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def list_releases(repository: Path, model: str) -> list[Release]:
    """All releases of a model that the repository holds whole, oldest first."""
    folder = repository / model
    numbers = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()) if folder.is_dir() else []
    found = (read_release(repository, model, number) for number in numbers)
    return [release for release in found if release is not None]


def pinned_number(config: str) -> int | None:
    """The release that a public model's configuration names."""
    match = _PINNED.search(config)
    return int(match[1]) if match else None


def current_release(repository: Path, model: str) -> Release | None:
    """The release that serves; None where the model was never published."""
    try:
        number = pinned_number((repository / model / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        return None
    return read_release(repository, model, number) if number is not None else None


def highest_number(repository: Path, model: str) -> int:
    """The largest release number that was ever seen for a model, whole or not; 0 for none. Numbers are not reused."""
    numbers = [0]
    if repository.is_dir():
        parsed = (parse_internal(path.name) for path in repository.iterdir())
        numbers += [number for item in parsed if item is not None for name, number, _ in [item] if name == model]
        numbers += [int(path.name) for path in (repository / model).glob("[0-9]*") if path.name.isdigit()]
    return max(numbers)
