"""Processes that we start get the variables that they need, and no key, token or password of ours."""

import os
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from orchestration.ui.ui import mlflow_variables
from resources.boundary.addresses import Address
from resources.processes.variables import (
    COMPUTE,
    DATABASE,
    HUGGING_FACE,
    MLFLOW,
    NETWORK,
    PIP,
    PROGRAM,
    PYTHON,
    inherited,
)
from resources.triton.server import EmbeddedServer

#: Variables that hold secrets, by what sets them.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "canary",
    "AWS_SECRET_ACCESS_KEY": "canary",
    "AWS_SESSION_TOKEN": "canary",
    "AZURE_STORAGE_KEY": "canary",
    "GOOGLE_APPLICATION_CREDENTIALS": "/canary",
    "HF_TOKEN": "canary",
    "HUGGINGFACE_API_KEY": "canary",
    "HF_ENDPOINT": "https://user:canary@mirror",
    "MLFLOW_TRACKING_PASSWORD": "canary",
    "MLFLOW_TRACKING_TOKEN": "canary",
    "MLFLOW_TRACKING_URI": "postgresql://user:canary@host/db",
    "NVIDIA_API_KEY": "canary",
    "PGPASSWORD": "canary",
    "REFINERY_DAGSTER_POSTGRES_URL": "postgresql+psycopg2://user:canary@host/db",
    "REFINERY_MLFLOW_URI": "https://user:canary@host",
    "REFINERY_WEBHOOK": "https://host/canary",
    "HTTPS_PROXY": "http://user:canary@proxy",
    "PIP_INDEX_URL": "https://user:canary@index",
    "DATABASE_URL": "postgres://user:canary@host/db",
}
NEEDED = {
    "PATH": "/bin",
    "HOME": "/home/x",
    "LC_ALL": "C.UTF-8",
    "TMPDIR": "/scratch",
    "LD_LIBRARY_PATH": "/lib",
    "CUDA_VISIBLE_DEVICES": "0",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCHINDUCTOR_CACHE_DIR": "/cache",
    "PYTHONPATH": "/code",
    "HF_HOME": "/hub",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {**SECRETS, **NEEDED}.items():
        monkeypatch.setenv(name, value)


def test_what_is_needed_is_given_and_secrets_are_not(environment):
    assert inherited(PROGRAM, COMPUTE, PYTHON, HUGGING_FACE) == NEEDED
    assert "canary" not in str(inherited(PROGRAM, COMPUTE, PYTHON, HUGGING_FACE, MLFLOW, DATABASE, SETTING="x"))
    assert inherited(SETTING="x") == {"SETTING": "x"}


def test_who_asks_a_server_has_what_it_needs_for_that(environment):
    assert inherited(NETWORK) == {"HTTPS_PROXY": SECRETS["HTTPS_PROXY"]}
    assert inherited(PIP, secrets=PIP) == {"PIP_INDEX_URL": SECRETS["PIP_INDEX_URL"]}
    assert inherited(MLFLOW, secrets=DATABASE) == {"PGPASSWORD": "canary"}


PARENT = """
import os
from child import seen
from resources.processes import isolation
from resources.processes.isolation import Limits, run_isolated
isolation.PRELOAD = ()
if __name__ == "__main__":
    print(run_isolated(seen, limits=Limits(60, 10**10), what="a child")[0])
    os.environ["HF_TOKEN"]  # ours are left alone
"""
#: A module of its own, because a child imports what it runs.
CHILD = """
import os
from pathlib import Path
def seen():
    # All that a child finds of its environment, and of the server's that it was forked from.
    found = [f"{name}={value}" for name, value in os.environ.items()]
    for process in (os.getpid(), os.getppid()):
        found += Path(f"/proc/{process}/environ").read_text().split("\\0")
    return found
"""


def test_children_that_load_checkpoints_have_no_secret(tmp_path):
    """Nor does the server that they are forked from, whose environment is theirs in /proc."""
    (tmp_path / "main.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)
    result = subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env={**os.environ, **SECRETS, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "canary" not in result.stdout
    assert "OMP_NUM_THREADS=3" in result.stdout


def test_the_server_of_mlflow_has_its_database_and_no_other_secret(environment, workspace):
    database = "postgresql+psycopg2://user:password@host/db"
    given = mlflow_variables(replace(workspace, tracking_uri=Address(database)))
    assert given["MLFLOW_BACKEND_STORE_URI"] == database
    assert [name for name, value in given.items() if "canary" in value] == ["PGPASSWORD"]
    assert "canary" not in str(mlflow_variables(workspace))


def test_triton_has_no_secret(tmp_path, monkeypatch, triton_settings):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "repository").mkdir()
    with EmbeddedServer(tmp_path / "repository", triton_settings, models=[], log=tmp_path / "log") as server:
        (triton,) = psutil.Process(server.pid).children()
        assert "tritonserver" in triton.name()
        for process in (psutil.Process(server.pid), triton):
            assert "canary" not in str(process.environ())
            assert process.environ()["OMP_NUM_THREADS"] == "3"
