"""Machines as containers and other languages have them: odd folders, no home, and a user without a name."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from orchestration.cli import main
from orchestration.runs.instance import prepare_instance
from orchestration.settings import complete_environment, read_workspace
from resources.errors import CatalogError
from resources.settings.workspace import Workspace
from resources.tracking.store import TrackingStore
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_job
from tests.servers import free_port
from tests.test_cli import REFINERY, environment, refinery

#: All that a path may hold and an address, a shell or markup would take otherwise, but for `?` and `%`.
ODD = "a #1 'b\" [ü] 日本;&=@:"


@pytest.mark.parametrize("variable", ["REFINERY_HOME", "DAGSTER_HOME"])
@pytest.mark.parametrize("name", ["a?b", "a%b", "a%41b"])
def test_a_folder_that_no_database_address_can_hold_is_refused(empty, tmp_path, monkeypatch, capsys, variable, name):
    folder = tmp_path / name / "state"
    monkeypatch.setenv("REFINERY_HOME", str(empty.home))
    monkeypatch.setenv("REFINERY_CATALOG", str(empty.catalog_path))
    monkeypatch.setenv(variable, str(folder))
    assert main(["ui", f"--dagster-port={free_port()}", f"--mlflow-port={free_port()}"]) == 1
    said = capsys.readouterr().err
    assert f"{variable}: '{folder}' holds '{name[1]}'" in said
    assert not folder.exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("REFINERY_WEBHOOK", "hooks.example.org"), ("REFINERY_EXECUTOR", "slurm"), ("REFINERY_OWNERS", "nobody")],
)
def test_pages_do_not_start_with_settings_that_break_their_definitions(empty, monkeypatch, capsys, variable, value):
    monkeypatch.setenv("REFINERY_HOME", str(empty.home))
    monkeypatch.setenv("REFINERY_CATALOG", str(empty.catalog_path))
    monkeypatch.setenv(variable, value)
    assert main(["ui"]) == 1
    assert variable in capsys.readouterr().err


def test_stores_lie_in_an_odd_folder(empty, tmp_path, monkeypatch):
    home = tmp_path / ODD
    monkeypatch.setenv("DAGSTER_HOME", "")
    workspace = read_workspace({"REFINERY_HOME": str(home), "REFINERY_CATALOG": str(empty.catalog_path)})
    store = TrackingStore(workspace.mlflow_uri(), ui=None, folder=home / "tracking")
    run = store.client.create_run(store.experiment("m"))
    store.log_files(run.info.run_id, {"a.txt": b"content"})
    assert store.read_file(run.info.run_id, "a.txt") == b"content"
    with dg.DagsterInstance.from_config(str(prepare_instance(workspace))) as instance:
        instance.add_dynamic_partitions("model", ["m"])
    assert (home / "mlflow.db").is_file()
    assert (home / "dagster" / "history" / "runs.db").is_file()
    # Nothing beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ODD, empty.catalog_path.name])


@pytest.mark.whole
def test_a_model_is_optimized_and_asked_in_an_odd_folder(empty, tmp_path, made_checkpoint, triton_settings):
    workspace = replace(empty, home=tmp_path / ODD, triton=triton_settings)
    add_entry(workspace, entry_for(made_checkpoint(), shapes=["1x16"], engines=["onnxruntime_fp32"]))
    assert run_job(workspace, "tiny").success
    for command in (
        ["query", "tiny", "a text"],
        ["releases", "tiny"],
        ["verify", "tiny"],
        ["plan"],
        ["gc", "--dry-run"],
    ):
        code, out, err = refinery(workspace, *command)
        assert code == 0, out + err


#: A user whom no system knows.
USER = 54321


@pytest.fixture
def nameless():
    """A workspace that belongs to such a user. Pytest's own folders may not be entered by others."""
    if os.geteuid() != 0:
        pytest.skip("becoming a user who has no name needs root")
    folder = Path(tempfile.mkdtemp(prefix="refinery-nameless-"))
    os.chown(folder, USER, USER)
    workspace = Workspace(folder / "home", folder / "models.yaml")
    workspace.catalog_path.write_text("models: []\n")
    yield workspace
    shutil.rmtree(folder)


def without_a_name(workspace, *command):
    """A command as that user, and without HOME. Where Python and its libraries lie it may read."""
    can = "+dac_override,+dac_read_search"
    prefix = ["setpriv", f"--inh-caps={can}", f"--ambient-caps={can}", f"--reuid={USER}", f"--regid={USER}"]
    kept = {name: value for name, value in environment(workspace).items() if name not in UNKNOWN}
    return subprocess.run(
        [*prefix, "--clear-groups", *command],
        env=kept,
        cwd=workspace.home.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


UNKNOWN = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
_LOOK = """
import getpass, os
from pathlib import Path
import orchestration.definitions
print(Path.home(), getpass.getuser())
"""


def test_a_user_without_name_and_home_has_both(nameless):
    """Of the definitions, which Dagster's processes and workers load, and of the command line."""
    found = without_a_name(nameless, sys.executable, "-c", _LOOK)
    assert found.stdout.split() == [str(nameless.home / "user"), f"uid-{USER}"], found.stderr
    found = without_a_name(nameless, REFINERY, "gc", "--dry-run")
    assert found.returncode == 0, found.stderr
    assert not (nameless.home.parent / "~").exists()


@pytest.mark.whole
def test_a_user_without_name_and_home_optimizes_a_model(nameless, made_checkpoint, triton_settings):
    folder = shutil.copytree(made_checkpoint(), nameless.home.parent / "checkpoint")
    add_entry(nameless, entry_for(folder, shapes=["1x16"], engines=["onnxruntime_fp32"]))
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(nameless.home.parent)], check=True)  # noqa: S607
    for command in (["optimize", "tiny"], ["query", "tiny", "a text"], ["verify", "tiny"]):
        found = without_a_name(nameless, REFINERY, *command)
        assert found.returncode == 0, found.stdout + found.stderr
    assert not (nameless.home.parent / "~").exists()


def test_a_home_and_a_name_that_are_there_stay(monkeypatch):
    given = {"HOME": "/home/somebody", "USER": "somebody"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    complete_environment(given)
    assert given == {"HOME": "/home/somebody", "USER": "somebody"}


def test_the_remedy_is_named():
    with pytest.raises(CatalogError, match=r"Choose a folder whose path has no '\?' and no '%'"):
        read_workspace({"REFINERY_HOME": "/state/a?b"})


@pytest.fixture
def empty(workspace):
    workspace.catalog_path.write_text("models: []\n")
    return workspace
