"""The rules about Python models. Their code is parsed and never run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from resources.boundary.foreign import ForeignError
from resources.triton.lint.findings import Finding
from resources.triton.lint.reading import LARGEST_SOURCE_BYTES, TooLargeError, read_file

if TYPE_CHECKING:
    from resources.triton.lint.model import Model

#: The modules that the backend makes available to every model.
_GIVEN = {"triton_python_backend_utils", "c_python_backend_utils"}


def source_findings(model: Model, path: Path) -> Iterator[Finding]:
    """Yield the findings in a version's `model.py`."""
    place = path.relative_to(model.root).as_posix()
    try:
        tree = ast.parse(read_file(path, LARGEST_SOURCE_BYTES))
        imports = list(_imports(tree))
    except TooLargeError as error:
        yield Finding("too-large", place, str(error))
        return
    except SyntaxError as error:
        yield Finding("python-syntax", place, f"is no Python: {error.msg}.", error.lineno or 0)
        return
    except (OSError, ForeignError, ValueError, RecursionError, MemoryError) as error:  # null bytes, deep nesting
        yield Finding("python-syntax", place, f"cannot be read as Python: {error or type(error).__name__}.")
        return
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.alias)}
    names |= {node.asname for node in ast.walk(tree) if isinstance(node, ast.alias) and node.asname}
    if "TritonPythonModel" not in names:
        yield Finding("python-syntax", place, "defines no class TritonPythonModel.")
    seen: set[str] = set()
    for name, line in imports:
        if name not in seen and not _found(name, path.parent):
            yield Finding(
                "python-import",
                place,
                f"imports {name!r}, which is not beside it and not installed here. Install it where the server runs.",
                line,
            )
        seen.add(name)


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the top-level module name and the line of every import that is not inside a `try`."""
    guarded = {
        node
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try)
        for part in attempt.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


def _found(name: str, folder: Path) -> bool:
    if name in _GIVEN or name in sys.stdlib_module_names:
        return True
    if (folder / f"{name}.py").is_file() or (folder / name).is_dir():
        return True
    try:
        return find_spec(name) is not None  # only looks for files, and does not import a top-level module
    except (ImportError, ValueError):
        return False
