"""`refinery lint`: the findings on a model repository, as text for people, and as JSON or SARIF for programs."""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestration.terminal.output import printable
from resources.errors import ReleaseError
from resources.storage.locations import parse_location
from resources.storage.objects import RemotePath
from resources.triton.files import copy_tree
from resources.triton.lint import RULES, Finding
from resources.triton.lint import lint as find


def lint(options: Namespace) -> int:
    """Print what is wrong with the repository. The exit status is 1 if one of the findings is an error."""
    findings = _find(options.path)
    print(FORMATS[options.format](findings))
    return int(any(finding.severity == "error" for finding in findings))


def _find(path: str) -> list[Finding]:
    """Return the findings on a folder, or on a copy of a repository in object storage."""
    try:
        return _look(path)
    except FileNotFoundError as error:
        raise ReleaseError(
            f"{path}: the repository changed while it was read: {error.filename or error} no longer exists. Run again."
        ) from error
    except OSError as error:
        where = f"{error.filename or path}: {error.strerror or error}"
        raise ReleaseError(
            f"{path}: the repository could not be read, or could not be copied to {tempfile.gettempdir()}: {where}. "
            "Correct this, or set TMPDIR to a folder on a disk with enough space."
        ) from error


def _look(path: str) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="refinery-lint-") as scratch:
        try:
            place = parse_location(path, Path(scratch), os.environ)
        except ValueError as error:
            raise ReleaseError(f"{error}.") from None
        if not isinstance(place, RemotePath):
            return find(Path(path))
        copy = Path(scratch) / place.name
        copy_tree(place, copy)
        if not copy.is_dir():
            raise ReleaseError(f"{place} is empty. Give the location that holds the models' folders.")
        return find(copy)


def as_text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, and their count."""
    errors = sum(finding.severity == "error" for finding in findings)
    count = f"{errors} errors, {len(findings) - errors} warnings" if findings else "nothing found"
    # A line break in a name would look like another finding.
    lines = (printable(str(finding)).replace("\n", "\\n") for finding in findings)
    return "\n".join([*lines, count])


def as_json(findings: Sequence[Finding]) -> str:
    """Return a JSON list of objects with rule, severity, path, line and message."""
    return json.dumps([{**asdict(finding), "severity": finding.severity} for finding in findings], indent=1)


def as_sarif(findings: Sequence[Finding]) -> str:
    """Return the findings as SARIF 2.1.0 (OASIS), which code hosts show beside the lines."""
    rules = [
        {
            "id": name,
            "shortDescription": {"text": rule.meaning},
            "defaultConfiguration": {"level": rule.severity},
        }
        for name, rule in RULES.items()
    ]
    run = {
        "tool": {"driver": {"name": "refinery lint", "rules": rules}},
        "results": [_result(finding) for finding in findings],
    }
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1)


def _result(finding: Finding) -> dict[str, Any]:
    place: dict[str, Any] = {"artifactLocation": {"uri": quote(os.fsencode(finding.path))}}
    if finding.line:
        place["region"] = {"startLine": finding.line}
    return {
        "ruleId": finding.rule,
        "ruleIndex": list(RULES).index(finding.rule),
        "level": finding.severity,
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": place}],
    }


FORMATS: dict[str, Callable[[Sequence[Finding]], str]] = {"text": as_text, "json": as_json, "sarif": as_sarif}
