"""Where Dagster keeps its runs: files below the home, or the Postgres that a variable names."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from orchestration.runs import instance as module
from orchestration.runs.instance import POSTGRES_VARIABLE, prepare_instance
from resources.errors import CatalogError
from tests import servers, waiting_definitions

ROOT = Path(__file__).resolve().parents[1]
URL = "postgresql+psycopg2://dagster:secret@127.0.0.1:5432/dagster"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, workspace):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.delenv(POSTGRES_VARIABLE, raising=False)
    yield
    os.environ.pop("DAGSTER_HOME", None)  # prepare_instance sets it


def configuration(workspace):
    return workspace.home / "dagster" / "dagster.yaml"


def test_runs_are_kept_in_postgres(workspace, postgres, tmp_path, monkeypatch):
    monkeypatch.setenv(POSTGRES_VARIABLE, postgres)
    monkeypatch.setenv(waiting_definitions.FOLDER, str(tmp_path))
    (tmp_path / "go").touch()
    folder = prepare_instance(workspace)
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", ["tiny"])
        assert {type(instance.run_storage).__name__, type(instance.event_log_storage).__name__} == {
            "PostgresRunStorage",
            "PostgresEventLogStorage",
        }
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "tests.waiting_definitions"]
    subprocess.run([*command, "--select", "waiting"], cwd=ROOT, check=True, capture_output=True, timeout=60)
    with dg.DagsterInstance.get() as instance:
        assert instance.get_dynamic_partitions("model") == ["tiny"]
        (run,) = instance.get_runs()
        assert run.status is dg.DagsterRunStatus.SUCCESS
        assert instance.get_latest_materialization_event(dg.AssetKey("waiting")).run_id == run.run_id
    # Postgres has it all, and only the variable has the password.
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert configuration(workspace) in files
    assert not [path for path in files if path.suffix == ".db"]
    password = postgres.split(":")[2].split("@")[0]
    everything = [path for path in workspace.home.rglob("*") if path.is_file()]
    assert not [path for path in everything if password.encode() in path.read_bytes()]


def test_a_server_that_is_missing_skips_or_fails(monkeypatch):
    monkeypatch.setattr(servers.shutil, "which", lambda name: None)
    monkeypatch.delenv(servers.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install redis-server"), servers.redis():
        pass
    monkeypatch.setenv(servers.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install redis-server"), servers.redis():
        pass


def test_the_configuration_follows_the_settings_until_somebody_changes_it(workspace, monkeypatch):
    prepare_instance(workspace)
    files = configuration(workspace).read_text()
    assert "postgres" not in files
    assert "run_monitoring" in files
    # An earlier version's is renewed, and one that somebody changed names the launcher by its old place for ever.
    for earlier in (module._EARLIER[0], files.replace("orchestration.runs.run_launcher", "orchestration.launcher")):
        assert earlier != files
        configuration(workspace).write_text(earlier)
        prepare_instance(workspace)
        assert configuration(workspace).read_text() == files
    changed = earlier.replace("poll_interval_seconds: 10", "poll_interval_seconds: 20")
    configuration(workspace).write_text(changed)
    prepare_instance(workspace)
    assert configuration(workspace).read_text() == changed
    configuration(workspace).write_text(files)
    monkeypatch.setenv(POSTGRES_VARIABLE, URL)
    prepare_instance(workspace)
    assert f"env: {POSTGRES_VARIABLE}" in configuration(workspace).read_text()
    # Without the variable nothing silently begins anew in files, whichever version wrote the configuration.
    monkeypatch.delenv(POSTGRES_VARIABLE)
    with_postgres = configuration(workspace).read_text()
    for text in (with_postgres, with_postgres.replace("orchestration.runs.run_launcher", "orchestration.launcher")):
        configuration(workspace).write_text(text)
        with pytest.raises(CatalogError, match=f"{POSTGRES_VARIABLE}, but that variable is not set"):
            prepare_instance(workspace)
    own = "telemetry: {enabled: false}\n"
    configuration(workspace).write_text(own)
    prepare_instance(workspace)
    assert configuration(workspace).read_text() == own
    monkeypatch.setenv(POSTGRES_VARIABLE, URL)
    with pytest.raises(CatalogError, match="changed by hand"):
        prepare_instance(workspace)
    assert configuration(workspace).read_text() == own


def test_what_postgres_needs_is_said(workspace, monkeypatch):
    monkeypatch.setenv(POSTGRES_VARIABLE, "postgresql://dagster:secret@db/dagster")
    with pytest.raises(CatalogError, match="begins with 'postgresql'") as raised:
        prepare_instance(workspace)
    assert "secret" not in str(raised.value)
    monkeypatch.setenv(POSTGRES_VARIABLE, URL)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(CatalogError, match=r"pip install 'transformer-refinery\[postgres\]'"):
        prepare_instance(workspace)
    assert not configuration(workspace).exists()
