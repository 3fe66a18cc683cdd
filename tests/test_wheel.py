"""The wheel holds all that runs: it is built, installed into an environment of its own, and used from there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("assets", "orchestration", "resources")
#: Examples that people copy: the program does not read them.
NOT_INSTALLED = ("orchestration/deployment/",)


def files_of_rooms():
    """Every file of the packages, by its path in the repository."""
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts]
    return sorted(name for name in names if not any(part in name for part in NOT_INSTALLED))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    # As pip does, which would take twice as long to say so.
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an environment that has the wheel, and beside it the libraries that are installed here."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (libraries,) = environment.glob("lib/python3*/site-packages")
    # A path in a .pth is searched last, and the .pth files there, this checkout's among them, are not read.
    (libraries / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def outside(installed, folder, *command):
    """Run a program of that environment in another folder, with nothing that leads back to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
    kept.pop("PYTHONPATH", None)
    variables = {"REFINERY_HOME": str(folder / "home"), "REFINERY_TRITON_ENVIRONMENT": f"{sys.prefix}/triton"}
    done = subprocess.run(
        command, cwd=folder, env={**kept, **variables}, capture_output=True, text=True, timeout=480, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(ROOT) not in done.stdout
    return done.stdout


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
    assert names == files_of_rooms()


@pytest.mark.whole
def test_dagster_loads_the_definitions_of_the_wheel(installed, tmp_path):
    code = "import orchestration.definitions as found; print(found.__file__, len(found.defs.assets))"
    assert str(installed.parents[1]) in outside(installed, tmp_path, str(installed), "-c", code)


@pytest.mark.whole
def test_every_module_is_imported_from_the_wheel(installed, tmp_path):
    """But the models that Triton runs, and the program that only runs as one."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in files_of_rooms() if name.endswith(".py")]
    left = ("resources.triton.python_models.", "resources.checkpoints.watch.__main__")
    wanted = [name.removesuffix(".__init__") for name in modules if not name.startswith(left)]
    code = (
        "import importlib, json, pathlib, sys\n"
        "from importlib.util import find_spec\n"
        f"for name in {wanted!r}:\n"
        "    importlib.import_module(name)\n"
        f"print(json.dumps([find_spec(room).origin for room in {ROOMS!r}]))\n"
    )
    origins = json.loads(outside(installed, tmp_path, str(installed), "-c", code).splitlines()[-1])
    assert all(Path(origin).is_relative_to(installed.parents[1]) for origin in origins)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["--help"], "optimize", marks=pytest.mark.whole, id="help"),
        pytest.param(["models"], "all-minilm-l6-v2", marks=pytest.mark.whole, id="models"),
        pytest.param(["plan"], "all-minilm-l6-v2", id="plan"),
    ],
)
def test_the_command_line_runs_outside_of_the_checkout(installed, tmp_path, arguments, says):
    assert says in outside(installed, tmp_path, str(installed.with_name("refinery")), *arguments)


@pytest.mark.whole
def test_a_model_is_optimized_and_asked_outside_of_the_checkout(installed, tmp_path, made_checkpoint):
    refinery = str(installed.with_name("refinery"))
    folder = made_checkpoint(labels=("no", "yes"))
    options = ["--name", "yes-or-no", "--seq-len", "16", "--engines", "onnxruntime_fp32", "--seconds", "1"]
    outside(installed, tmp_path, refinery, "optimize", str(folder), *options, "--serving-seconds", "0")
    assert "yes" in outside(installed, tmp_path, refinery, "query", "yes-or-no", "Is this a question?")
