"""Measure the structure of the code: rooms, arrows between them, circles of files, sizes of folders and functions.

Run `python -m tests.structure` to print the figures. tests/test_layers.py holds the limits.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("resources", "assets", "orchestration")


def files() -> list[Path]:
    """Return every Python file of the product."""
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def module_of(file: Path) -> str:
    """Return the module's dotted name; a package is named by its folder."""
    name = file.relative_to(ROOT).with_suffix("")
    return ".".join(name.parts[:-1] if name.name == "__init__" else name.parts)


def room_of(module: str) -> str:
    """Return the room that a module lies in: a folder right below a package, or the package's loose file.

    `assets` is one room. `resources.engines.specs` is a room of its own, because rooms below the engines use it.
    """
    parts = module.split(".")
    if parts[0] == "assets":
        return "assets"
    return module if module == "resources.engines.specs" else ".".join(parts[:2])


@cache
def syntax_of(file: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Return the modules of this project that each module imports, at any depth of it."""
    known = {module_of(file) for file in files()}
    found: dict[str, set[str]] = {}
    for file in files():
        own = module_of(file)
        package = own if file.name == "__init__.py" else own.rpartition(".")[0]
        names: set[str] = set()
        for node in ast.walk(syntax_of(file)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package if node.level else ""
                source = ".".join(filter(None, [base, node.module or ""]))
                inner = {f"{source}.{alias.name}" for alias in node.names}
                names |= {name if name in known else source for name in inner}
        found[own] = names & known - {own}
    return {module: frozenset(names) for module, names in found.items()}


def loads() -> Mapping[str, frozenset[str]]:
    """Return the modules that Python runs for each module: its imports, and the packages that these lie in."""
    found = {}
    for module, names in imports().items():
        packages = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
        found[module] = names | {name for name in packages if not f"{module}.".startswith(f"{name}.")}
    return found


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def arrows() -> Mapping[str, Mapping[str, int]]:
    """Return, for each room, the rooms that it imports from and by how many imports."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for module, names in imports().items():
        found[room_of(module)].update(room_of(name) for name in names if room_of(name) != room_of(module))
    return found


def functions() -> Iterator[tuple[int, str]]:
    """Yield the number of lines of every function, without its docstring, and where it stands."""
    for file in files():
        for node in ast.walk(syntax_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                yield lines, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"


def folders() -> Mapping[str, int]:
    """Return the number of Python files in each folder, without `__init__.py`."""
    return Counter(str(file.parent.relative_to(ROOT)) for file in files() if file.name != "__init__.py")


def code_lines(file: Path) -> int:
    """Count the lines of code, without comments, docstrings and blank lines."""
    source = file.read_text(encoding="utf-8")
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(syntax_of(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print the figures."""
    print("lines of code:", sum(map(code_lines, files())))
    found = circles(loads())
    print("circles of files:", len(found))
    for group in found:
        print("   ", ", ".join(group))
    rooms = {room: frozenset(to) for room, to in arrows().items()}
    print("circles of rooms:", circles(rooms))
    for room in sorted(rooms):
        print(f"  {room} -> {', '.join(f'{to} ({count})' for to, count in sorted(arrows()[room].items()))}")
    print(
        "folders:", ", ".join(f"{name} {count}" for name, count in sorted(folders().items(), key=lambda one: -one[1]))
    )
    print("longest functions:")
    for lines, where in sorted(functions(), reverse=True)[:10]:
        print(f"  {lines} {where}")


if __name__ == "__main__":
    main()
