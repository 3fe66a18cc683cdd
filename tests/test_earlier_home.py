"""A REFINERY_HOME of an earlier version is still served, rolled back and run again.

It was made at commit 62ac807: a tiny embedder in two revisions, with artifacts, MLflow's and Dagster's databases, and
two releases. Paths in it are made those of the test, and the libraries that releases carry are taken from here.
"""

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import onnx
import pytest
import tokenizers

from resources.settings.workspace import Workspace
from tests.test_cli import refinery

ARCHIVE = Path(__file__).parent / "data" / "home_of_62ac807.tar.xz"
#: Where it was made.
WAS = "/srv/refinery"
TEXT = "How long should I boil the eggs?"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, triton_settings):
    """The home, in a workspace."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    home = folder / "home"
    for path in (home / "models.d" / "tiny.yaml", *(home / "tracking" / "links").glob("*.json")):
        path.write_text(path.read_text().replace(WAS, str(folder)))
    with sqlite3.connect(home / "mlflow.db") as database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            change = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"  # noqa: S608 - names of ours
            database.execute(change, (WAS, str(folder)))
    for release in (home / "triton_models" / "cpu" / "tiny").glob("*/release.json"):
        data = json.loads(release.read_text())
        for name in data["files"]:
            if name.endswith(".so"):
                data["files"][name] = library(home / "triton_models" / "cpu" / name)
        release.write_text(json.dumps(data))
    (folder / "models.yaml").write_text("models: []\n")
    return Workspace(home, folder / "models.yaml", triton=triton_settings)


def library(place):
    """Bring the tokenizers' library to a place, and describe it as a manifest does."""
    (found,) = Path(tokenizers.__file__).parent.glob("*.so")
    shutil.copyfile(found, place)
    return {"sha256": hashlib.sha256(place.read_bytes()).hexdigest(), "size_bytes": place.stat().st_size}


def test_it_serves_and_rolls_back_and_says_what_a_run_would_make(earlier):
    code, said, errors = refinery(earlier, "releases", "tiny")
    assert (code, errors) == (0, "")
    assert re.findall(r"│ (\d) +│ (\w+)", said) == [("1", "kept"), ("2", "current")]
    newest = refinery(earlier, "query", "tiny", TEXT, "--json")
    assert newest[0] == 0, newest[2]
    code, said, errors = refinery(earlier, "rollback", "tiny")
    assert code == 0, errors
    assert "points to release 1" in said
    older = refinery(earlier, "query", "tiny", TEXT, "--json")
    assert older[0] == 0, older[2]
    assert older[1] != newest[1]
    code, said, errors = refinery(earlier, "plan", "tiny", "--json")
    assert code == 0, errors
    steps = {step["step"]: step for step in json.loads(said)["steps"]}
    assert "the code of" in " ".join(steps["checkpoint"]["reasons"])
    assert steps["reference"]["reasons"] == ["it was never made"]


def operators(path):
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_the_script_of_an_engine_builds_it_again(earlier, tmp_path):
    """Engines carry a script that names a module of this project."""
    scripts = sorted((earlier.home / "artifacts" / "engine").glob("*/rebuild.py"))
    script = next(path for path in scripts if "'onnxruntime_fp32'" in path.read_text())
    command = [sys.executable, script, "--artifacts", earlier.home / "artifacts", "--output", tmp_path / "again"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr  # other libraries may make other bytes
    assert operators(tmp_path / "again" / "model.onnx") == operators(script.with_name("model.onnx"))


def test_the_old_names_of_modules_that_deployments_name_still_lead_somewhere():
    """dagster.yaml names the first, a container's command the second."""
    from orchestration.launcher import WatchedRunLauncher
    from orchestration.runs.run_launcher import WatchedRunLauncher as Launcher

    assert WatchedRunLauncher is Launcher
    command = [sys.executable, "-m", "orchestration.webserver", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Serve Dagster's pages behind a guard" in result.stdout


@pytest.mark.whole
def test_it_is_run_again(earlier):
    code, said, errors = refinery(earlier, "optimize", "tiny")
    assert code == 0, errors
    assert "Release 3 of tiny serves" in said
    with sqlite3.connect(earlier.home / "mlflow.db") as database:
        ((count,),) = database.execute("SELECT count(*) FROM experiments WHERE name LIKE '%tiny%'").fetchall()
    assert count == 1
