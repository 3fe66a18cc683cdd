"""The rooms and who may enter: imports run one way, and definitions stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: What each room may import of this project.
ALLOWED = {
    "resources": {"resources"},
    "assets": {"resources", "assets"},
    "orchestration": {"resources", "assets", "orchestration"},
}
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
