"""The rooms and who may enter: imports run one way, and definitions stay light."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import structure

ROOT = Path(__file__).resolve().parents[1]
#: What each package may import of this project.
ALLOWED = {
    "resources": {"resources"},
    "assets": {"resources", "assets"},
    "orchestration": {"resources", "assets", "orchestration"},
}
#: The rooms of `resources`, the lowest first, each with the rooms that it may import from.
ROOMS: dict[str, str] = {
    "errors": "",
    "boundary": "errors",
    "storage": "boundary errors",
    "processes": "boundary errors storage",
    "machine": "errors processes storage",
    "artifacts": "boundary errors machine storage",
    "pipelines": "",
    "tasks": "boundary errors pipelines",
    "engines.specs": "errors machine",
    "catalog": "artifacts boundary engines.specs errors storage tasks",
    "settings": "artifacts boundary catalog errors machine processes storage",
    "checkpoints": "artifacts boundary catalog errors machine pipelines processes settings storage tasks",
    "accuracy": "artifacts boundary checkpoints errors pipelines tasks",
    "engines": "accuracy artifacts boundary catalog checkpoints engines.specs errors machine pipelines processes "
    "storage tasks",
    "export": "artifacts boundary checkpoints engines errors pipelines tasks",
    "benchmark": "accuracy artifacts catalog engines engines.specs errors machine pipelines processes settings tasks",
    "report": "artifacts benchmark catalog engines.specs settings storage tasks",
    "tracking": "artifacts boundary checkpoints errors machine report storage",
    "triton": "accuracy artifacts benchmark boundary catalog engines engines.specs errors machine pipelines processes "
    "settings storage tasks",
    "steps": "accuracy artifacts benchmark boundary catalog checkpoints engines engines.specs errors export machine "
    "pipelines processes settings tracking triton",
    "plan": "artifacts catalog engines.specs errors machine settings steps triton",
}
#: The rooms of `orchestration`, the lowest first, each with its own rooms that it may import from.
ORCHESTRATION: dict[str, str] = {
    "certificates": "",
    "terminal": "",
    "runs": "",
    "automation": "runs",
    "settings": "automation certificates runs",
    "definitions": "automation runs settings terminal",
    "cli": "automation definitions runs settings terminal",
    "ui": "automation runs settings",
    "launcher": "runs",
    "webserver": "ui",
}
#: Folders with more Python files than a reader keeps apart. resources/triton is divided next.
MOST_FILES, DIVIDED_NEXT = 15, "resources/triton"
LONGEST_FUNCTION = 80
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "mlflow",
    "pandas",
    "numpy",
    "huggingface_hub",
    "tritonclient",
    "tokenizers",
    "matplotlib",
    "dagster_celery",
    "dagster_k8s",
    "dagster_postgres",
    "celery",
    "kubernetes",
    "redis",
)


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent.name == "pipelines":
                continue  # a release carries a copy of that package, under another name
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def of_package(package: str, table: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the table with whole names."""
    return {f"{package}.{room}": {f"{package}.{other}" for other in others.split()} for room, others in table.items()}


@pytest.mark.parametrize("table", [ROOMS, ORCHESTRATION], ids=["resources", "orchestration"])
def test_the_rooms_of_a_package_are_layers(table):
    lower: set[str] = set()
    for room, others in table.items():
        assert lower.issuperset(others.split()), f"{room} may import from a room above it"
        lower.add(room)


def test_rooms_import_from_the_rooms_that_the_tables_name_and_from_no_others():
    allowed = of_package("resources", ROOMS) | of_package("orchestration", ORCHESTRATION)
    found = {room: set(others) for room, others in structure.arrows().items() if "." in room}
    assert found.keys() <= allowed.keys(), found.keys() - allowed.keys()
    for room, others in found.items():
        # `test_imports_run_one_way` holds the packages apart.
        own = {other for other in others if other.startswith(f"{room.partition('.')[0]}.")}
        # A room that is no longer imported is no longer allowed.
        assert own == allowed[room], f"{room}: imported but not allowed, or allowed but not imported"


def test_no_files_import_each_other_in_a_circle():
    assert structure.circles(structure.loads()) == []
    assert structure.circles({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")}) == [["a", "b", "c"]]


def test_folders_and_functions_are_short_enough_to_be_read():
    large = {name: count for name, count in structure.folders().items() if count > MOST_FILES}
    assert large.keys() <= {DIVIDED_NEXT}, large
    assert [where for lines, where in structure.functions() if lines > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_run_one_way(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        ours = imported(file) & {*ALLOWED, "tests"}
        assert ours <= ALLOWED[room], f"{file} imports {ours - ALLOWED[room]}"


def test_artifacts_and_their_store_know_no_dagster():
    for file in (ROOT / "resources").rglob("*.py"):
        assert "dagster" not in imported(file), file


def test_only_orchestration_reads_the_environment():
    """`os.environ` and `os.getenv` are settings in disguise anywhere else."""
    allowed = {
        "resources/processes/preload.py",  # sets variables of libraries, before they are imported
        "resources/processes/variables.py",  # what processes that we start inherit
    }
    for room in ("resources", "assets"):
        for file in (ROOT / room).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)]
            reads = [node for node in nodes if node.attr in ("environ", "getenv")]
            assert not reads or name in allowed, f"{name}:{reads[0].lineno}"


@pytest.mark.parametrize("module", ["orchestration.definitions", "orchestration.cli"])
def test_importing_stays_light(module):
    """Dagster loads the definitions anew for every run and step; heavy imports would be paid each time."""
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
