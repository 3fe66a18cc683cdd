"""The example deployment: its files agree with the code, and the commands of its services work together.

There are no containers here: `make test-all` starts the commands as processes, with hosts and folders of this machine.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.scheduler.instigation import TickStatus

from orchestration.executors import make_executor
from orchestration.instance import POSTGRES_VARIABLE, prepare_instance
from orchestration.sensors import SENSOR
from orchestration.settings import read_execution
from resources.locks import MACHINE_LOCK
from resources.triton.layout import current_release
from resources.workspace import Workspace
from tests import servers
from tests.conftest import entry_for
from tests.pipeline import add_entry

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "orchestration" / "deployment"
#: Services whose image is this project's.
OURS = ("mlflow", "code", "webserver", "daemon", "worker-cpu", "worker-cuda-sm90")
START_SECONDS, RUN_SECONDS = 90, 600


def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def values():
    return yaml.safe_load((FOLDER / "values.yaml").read_text())


def settings_named(text):
    return set(re.findall(r"\bREFINERY_[A-Z_]+\b", text))


@pytest.mark.parametrize("name", ["compose.yaml", "values.yaml", "Dockerfile", "README.md"])
def test_only_settings_that_exist_are_named(name):
    documented = settings_named((ROOT / "README.md").read_text())
    named = settings_named((FOLDER / name).read_text())
    assert named
    assert named <= documented, named - documented


def test_the_instance_is_what_the_product_writes(workspace, monkeypatch):
    monkeypatch.setenv(POSTGRES_VARIABLE, "postgresql+psycopg2://refinery:secret@postgres:5432/dagster")
    monkeypatch.setenv("DAGSTER_HOME", str(workspace.home / "dagster"))
    assert (prepare_instance(workspace) / "dagster.yaml").read_text() == (FOLDER / "dagster.yaml").read_text()


def test_the_executors_settings_are_those_of_celery():
    given = {"REFINERY_EXECUTOR": "celery", "REFINERY_EXECUTOR_CONFIG": str(FOLDER / "celery.yaml")}
    assert make_executor(read_execution(given)).name == "celery"


def test_services_have_the_files_and_the_others_that_they_name():
    document = compose()
    services, volumes = document["services"], document["volumes"]
    assert set(OURS) < set(services)
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            # By an absolute path: what every machine has.
            assert source in volumes or source.startswith("/") or (FOLDER / source).is_file(), f"{name}: {mount}"
        for part in service.get("command", []):
            if part.startswith("/etc/refinery/"):
                assert any(f":{part}:" in mount for mount in service["volumes"]), f"{name}: {part}"
    workers = {service["command"][-1] for name, service in services.items() if name.startswith("worker-")}
    assert workers == {"cpu", "cuda_sm90"}
    (server,) = yaml.safe_load((FOLDER / "workspace.yaml").read_text())["load_from"]
    assert server["grpc_server"]["host"] in services
    assert str(server["grpc_server"]["port"]) in services["code"]["command"]


def test_kubernetes_runs_the_same_definitions():
    document = values()
    (code,) = document["dagster-user-deployments"]["deployments"]
    variables = {one["name"]: one["value"] for one in code["env"]}
    assert make_executor(read_execution(variables)).name == "k8s"
    assert code["dagsterApiGrpcArgs"] == compose()["services"]["code"]["command"][-2:]
    mounts = {mount["mountPath"] for mount in code["volumeMounts"]}
    assert variables["REFINERY_HOME"] in mounts
    # Where the machine's lock is, which workers of Compose share as well.
    places = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in code["volumes"]}
    shared = {mount["mountPath"] for mount in code["volumeMounts"] if places[mount["name"]] == mount["mountPath"]}
    assert str(MACHINE_LOCK.parent) in shared
    lock = f"{MACHINE_LOCK.parent}:{MACHINE_LOCK.parent}"
    assert all(lock in service["volumes"] for name, service in compose()["services"].items() if "worker" in name)
    # Dead runs as in the product's own instance, in the chart's spelling.
    instance = yaml.safe_load((FOLDER / "dagster.yaml").read_text())
    daemon = document["dagsterDaemon"]

    def spelled(name):
        first, *rest = name.split("_")
        return first + "".join(part.capitalize() for part in rest)

    retries = {spelled(name): value for name, value in instance["run_retries"].items()}
    assert daemon["runRetries"] == retries
    monitoring = {spelled(name): value for name, value in instance["run_monitoring"].items()}
    assert daemon["runMonitoring"] == {**monitoring, "startTimeoutSeconds": 600}  # images may have to be pulled first


# --- together ---------------------------------------------------------------------------------------------------------


class Processes:
    """The services of the compose file, on loopback and below a folder."""

    def __init__(self, folder, postgres, redis):
        self.folder = folder
        self.ports = {name: servers.free_port() for name in ("mlflow", "code", "webserver")}
        self.postgres, self.redis = postgres, redis

    def here(self, text):
        """What a service would read, with names of this machine."""
        for found, replacement in (
            (r"postgresql\+psycopg2://.*@postgres:5432/dagster", self.postgres),
            (r"postgresql\+psycopg2://.*@postgres:5432/mlflow", self.postgres.replace("/postgres", "/mlflow")),
            (r"redis://redis:6379", self.redis),
            (r"\b(mlflow|127\.0\.0\.1):5000", f"127.0.0.1:{self.ports['mlflow']}"),
            # Another address of loopback: to the launcher it is another machine's.
            (r"host: code\b", "host: 127.0.0.2"),
            (r"0\.0\.0\.0", "127.0.0.1"),
            (r"\b5000\b", str(self.ports["mlflow"])),
            (r"\b4000\b", str(self.ports["code"])),
            (r"\b3000\b", str(self.ports["webserver"])),
            (r"/state\b", str(self.folder / "state")),
            (r"/etc/refinery\b", str(self.folder)),
            (r"\$\{REFINERY_TARGETS:-(\w+)\}", r"\1"),
        ):
            text = re.sub(found, replacement, text)
        return text

    def environment(self, service):
        given = {name: self.here(str(value)) for name, value in service["environment"].items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # Not the project's own catalog: the sensor would have its model optimized too. And looks without long waits.
        test = {"REFINERY_CATALOG": str(self.folder / "models.yaml"), "REFINERY_WATCH_SECONDS": "5"}
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **given, **test}

    @contextmanager
    def running(self, name):
        service = compose()["services"][name]
        command = [self.here(part) for part in service["command"]]
        if name == "code":
            command = ["127.0.0.2" if part == "127.0.0.1" else part for part in command]
        program = str(Path(sys.executable).with_name(command[0]))
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                [program, *command[1:]],
                cwd=self.folder,
                env=self.environment(service),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
            assert process.poll() is None, self.log(name).read_text()[-5000:]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name):
        return self.folder / f"{name}.log"


@pytest.mark.whole
def test_the_services_take_a_model_to_a_release(tmp_path, made_checkpoint, postgres, redis, monkeypatch):
    import sqlalchemy

    processes = Processes(tmp_path, postgres, redis)
    home = tmp_path / "state"
    (home / "dagster").mkdir(parents=True)
    for name in ("celery.yaml", "workspace.yaml"):
        (tmp_path / name).write_text(processes.here((FOLDER / name).read_text()))
    shutil.copy(FOLDER / "dagster.yaml", home / "dagster")
    with sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sqlalchemy.text((FOLDER / "databases.sql").read_text()))
    (tmp_path / "models.yaml").write_text("models: []\n")
    workspace = Workspace(home, tmp_path / "models.yaml", tracking_uri="elsewhere")
    add_entry(workspace, entry_for(made_checkpoint(), engines=["onnxruntime_fp32"]))
    environment = processes.environment(compose()["services"]["daemon"])
    for name in ("DAGSTER_HOME", POSTGRES_VARIABLE):
        monkeypatch.setenv(name, environment[name])
    with ExitStack() as started, dg.DagsterInstance.get() as instance:
        for name in ("mlflow", "code", "webserver", "daemon", "worker-cpu"):
            started.enter_context(processes.running(name))
        # The sensor finds the model, makes its partition, and has it optimized: nobody else asks for a run.
        run = wait_for_run(instance, lambda run: run.is_finished)
        failures = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        assert run.status is dg.DagsterRunStatus.SUCCESS, [
            entry.get_dagster_event().step_failure_data.error.cause for entry in failures
        ]
        assert run.tags["dagster/sensor_name"] == SENSOR
        assert instance.get_dynamic_partitions("model") == ["tiny"]
        wait_for_looks(instance, 2)
        assert [one.run_id for one in optimizations(instance)] == [run.run_id]
    release = current_release(workspace.repository("cpu"), "tiny")
    assert release.number == 1
    assert release.proof.passed


def optimizations(instance):
    return instance.get_runs(dg.RunsFilter(job_name="optimize"))


def wait_for_run(instance, ready):
    """The only run there is, once it is ready."""
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        runs = optimizations(instance)
        assert len(runs) <= 1, [(one.run_id, one.tags) for one in runs]
        if runs and ready(runs[0]):
            return runs[0]
        assert time.monotonic() < deadline, [one.status for one in runs]
        time.sleep(1)


def wait_for_looks(instance, count):
    """Until the sensor has looked so often from now on."""
    (state,) = [one for one in instance.all_instigator_state() if one.instigator_name == SENSOR]
    since = time.time()
    while True:
        ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, after=since)
        if len([tick for tick in ticks if tick.status is not TickStatus.STARTED]) >= count:
            return
        assert time.time() < since + START_SECONDS
        time.sleep(1)
