"""The example deployment: its files agree with the code, and the commands of its services work together.

There are no containers here: `make test-all` starts the commands as processes, with hosts and folders of this machine.
"""

import copy
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

from orchestration.automation.sensors import SENSOR
from orchestration.runs.executors import make_executor
from orchestration.runs.instance import POSTGRES_VARIABLE, prepare_instance
from orchestration.settings import read_execution
from resources.settings.workspace import Workspace
from resources.triton.layout import current_release
from tests import servers
from tests.conftest import entry_for
from tests.pipeline import add_entry

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "orchestration" / "deployment"
#: Services whose image is this project's.
OURS = ("mlflow", "code", "webserver", "daemon", "worker-cpu", "worker-cuda-sm90")
START_SECONDS, RUN_SECONDS = 90, 600
#: Where resources.machine.lock.MACHINE_LOCK lies outside of tests, and what else is written for a while.
MACHINE_LOCK_FOLDER = "/tmp"  # noqa: S108


def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def values():
    return yaml.safe_load((FOLDER / "values.yaml").read_text())


def settings_named(text):
    return set(re.findall(r"\bREFINERY_[A-Z_]+\b", text))


@pytest.mark.parametrize("name", ["compose.yaml", "values.yaml", "Dockerfile", "README.md"])
def test_only_settings_that_exist_are_named(name):
    documented = settings_named((ROOT / "docs" / "settings.md").read_text())
    named = settings_named((FOLDER / name).read_text())
    assert named
    assert named <= documented, named - documented


def test_the_instance_is_what_the_product_writes(workspace, monkeypatch):
    monkeypatch.setenv(POSTGRES_VARIABLE, "postgresql+psycopg2://refinery:secret@postgres:5432/dagster")
    monkeypatch.setenv("DAGSTER_HOME", str(workspace.home / "dagster"))
    assert (prepare_instance(workspace) / "dagster.yaml").read_text() == (FOLDER / "dagster.yaml").read_text()


def test_the_executors_settings_are_those_of_celery(monkeypatch):
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, "redis://:secret@redis:6379/0")
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
            assert source in volumes or (FOLDER / source).is_file(), f"{name}: {mount}"
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
    here = {**variables, "REFINERY_EXECUTOR_CONFIG": str(FOLDER / "kubernetes.yaml")}
    assert make_executor(read_execution(here)).name == "k8s"
    assert code["dagsterApiGrpcArgs"] == compose()["services"]["code"]["command"][-2:]
    mounts = {mount["mountPath"] for mount in code["volumeMounts"]}
    assert variables["REFINERY_HOME"] in mounts
    settings = Path(variables["REFINERY_EXECUTOR_CONFIG"])
    assert settings.is_relative_to("/opt/refinery")
    assert (ROOT / settings.relative_to("/opt/refinery")).is_file()
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


# --- least rights -----------------------------------------------------------------------------------------------------

#: Who may reach what. The code server runs whatever it is asked to.
NETWORKS = {
    "database": {"postgres", "mlflow", "code", "webserver", "daemon", "worker-cpu", "worker-cuda-sm90"},
    "queue": {"redis", "code", "worker-cpu", "worker-cuda-sm90"},
    "tracking": {"mlflow", "code", "worker-cpu", "worker-cuda-sm90"},
    "definitions": {"code", "webserver", "daemon"},
    "internet": {"code", "worker-cpu", "worker-cuda-sm90"},
    "pages": {"mlflow", "webserver"},
    "serving": {"triton"},
}
#: Whose files are the state, and who may write the repositories.
STATE = {"code", "worker-cpu", "worker-cuda-sm90"}


def looseness_of_compose(document):
    """What its services may do beyond what they need."""
    for name, service in document["services"].items():
        user = str(service.get("user", "0")).split(":")[0]
        if not user.isdigit() or int(user) == 0:
            yield f"{name}: runs as root, or as a name that the image decides on"
        if service.get("read_only") is not True:
            yield f"{name}: its root file system can be written"
        if service.get("cap_drop") != ["ALL"] or "cap_add" in service:
            yield f"{name}: has capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name}: may gain privileges"
        if service.get("privileged") or {"pid", "ipc", "network_mode", "userns_mode", "devices"} & set(service):
            yield f"{name}: has a part of the machine"
        if not service.get("pids_limit"):
            yield f"{name}: may start processes without end"
        for mount in service.get("volumes", []):
            source, place, *mode = mount.split(":")
            if source.startswith(("/", "~", "..")):
                yield f"{name}: a folder of the machine is mounted: {mount}"
            if source.startswith("./") and mode != ["ro"]:
                yield f"{name}: may change the deployment itself: {mount}"
            if source in ("state", "repositories") and name not in STATE and (source == "state" or mode != ["ro"]):
                yield f"{name}: may change what it only reads: {mount}"
            if place.startswith("/var/run/docker"):
                yield f"{name}: is root of the machine by {mount}"
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name}: is open to the network at {port}"
        said = [*service.get("command", []), *map(str, service.get("healthcheck", {}).get("test", []))]
        if any(re.search(r"(?<!\$)\$\{?\w*PASSWORD", part) or "://" in part for part in said):
            yield f"{name}: a secret is on its command line"
        if not service.get("networks"):
            yield f"{name}: is in the network of all"
    for network, settings in document["networks"].items():
        members = {name for name, service in document["services"].items() if network in service.get("networks", [])}
        if members != NETWORKS[network]:
            yield f"{network}: {members ^ NETWORKS[network]} is not in its place"
        closed = (settings or {}).get("internal") is True
        masquerade = (settings or {}).get("driver_opts", {}).get("com.docker.network.bridge.enable_ip_masquerade")
        if network != "internet" and not closed and masquerade != "false":
            yield f"{network}: leads to the internet"
    redis = document["services"]["redis"]
    if "requirepass" not in redis["command"][-1] or "REDIS_PASSWORD:?" not in redis["environment"]["REDIS_PASSWORD"]:
        yield "redis: answers everybody"
    for name, service in document["services"].items():
        for variable, value in service.get("environment", {}).items():
            if "redis://" in str(value) and ":${REDIS_PASSWORD:?}@" not in value:
                yield f"{name}: {variable} has no password"
            if re.search(r"PASSWORD|redis:", f"{variable} {value}") and name not in NETWORKS["database"] | {"redis"}:
                yield f"{name}: knows a secret that it does not need"


def test_compose_gives_no_right_that_is_not_needed():
    assert list(looseness_of_compose(compose())) == []
    # What the workers of a machine share is where its lock lies, and theirs alone.
    for name, service in compose()["services"].items():
        shared = f"workers:{MACHINE_LOCK_FOLDER}" in service.get("volumes", [])
        assert shared == name.startswith("worker-"), name
    assert compose()["services"]["triton"]["volumes"] == ["repositories:/models:ro"]


@pytest.mark.parametrize(
    ("service", "change"),
    [
        ("code", {"user": None}),
        ("postgres", {"user": "0:0"}),
        ("redis", {"user": "redis"}),
        ("mlflow", {"read_only": False}),
        ("daemon", {"cap_drop": None}),
        ("daemon", {"cap_add": ["SYS_ADMIN"]}),
        ("triton", {"security_opt": None}),
        ("triton", {"privileged": True}),
        ("triton", {"ipc": "host"}),
        ("triton", {"network_mode": "host"}),
        ("triton", {"pids_limit": None}),
        ("triton", {"volumes": ["repositories:/models"]}),
        ("triton", {"volumes": ["state:/state:ro"]}),
        ("mlflow", {"volumes": ["state:/state"]}),
        ("worker-cpu", {"volumes": ["/srv:/tmp"]}),
        ("worker-cpu", {"volumes": ["./celery.yaml:/etc/refinery/celery.yaml"]}),
        ("worker-cpu", {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]}),
        ("webserver", {"ports": ["3000:3000"]}),
        ("redis", {"command": ["redis-server", "--requirepass", "${REDIS_PASSWORD}"]}),
        ("redis", {"command": ["redis-server"]}),
        ("redis", {"environment": {"REDIS_PASSWORD": "redis"}}),
        ("redis", {"healthcheck": {"test": ["CMD", "redis-cli", "-a", "${REDIS_PASSWORD}", "ping"]}}),
        ("mlflow", {"command": ["mlflow", "server", "--backend-store-uri", "postgresql://a:b@postgres/mlflow"]}),
        ("code", {"environment": {"CELERY_BROKER_URL": "redis://redis:6379/0"}}),
        ("triton", {"environment": {"POSTGRES_PASSWORD": "x"}}),
        ("triton", {"networks": ["serving", "database"]}),
        ("webserver", {"networks": None}),
        ("worker-cpu", {"networks": ["database", "queue", "tracking", "internet", "definitions"]}),
    ],
)
def test_a_right_too_many_is_seen_in_compose(service, change):
    document = compose()
    for key, value in change.items():
        if value is None:
            del document["services"][service][key]
        else:
            document["services"][service][key] = value
    assert any(one.startswith(f"{service}: ") or "is not in its place" in one for one in looseness_of_compose(document))


@pytest.mark.parametrize("network", sorted(set(NETWORKS) - {"internet"}))
def test_a_network_that_leads_out_is_seen(network):
    document = compose()
    document["networks"][network] = None
    assert list(looseness_of_compose(document)) == [f"{network}: leads to the internet"]


def loose_pod(pod, container):
    """What a pod with these security contexts may do, against Kubernetes' Pod Security Standard "restricted"."""
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser"):
        yield "runs as root"
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "may call all of the kernel"
    if container.get("allowPrivilegeEscalation") is not False or container.get("privileged"):
        yield "may gain privileges"
    if container.get("capabilities") != {"drop": ["ALL"]}:
        yield "has capabilities"
    if container.get("readOnlyRootFilesystem") is not True:
        yield "its root file system can be written"


def looseness_of_values(document):
    """What the pods of the chart may do beyond what they need."""
    (code,) = document["dagster-user-deployments"]["deployments"]
    launcher = document["runLauncher"]["config"]["k8sRunLauncher"]
    parts = {"webserver": document["dagsterWebserver"], "daemon": document["dagsterDaemon"], "code": code}
    contexts = {
        name: (part.get("podSecurityContext", {}), part.get("securityContext", {})) for name, part in parts.items()
    }
    run = launcher.get("runK8sConfig", {}).get("podSpecConfig", {}).get("securityContext", {})
    contexts["run"] = (run, launcher.get("securityContext", {}))
    for name, (pod, container) in contexts.items():
        yield from (f"{name}: {what}" for what in loose_pod(pod, container))
    for name, part in (*parts.items(), ("run", launcher)):
        for volume in part.get("volumes", []):
            if "hostPath" in volume:
                yield f"{name}: a folder of the node is mounted"
        written = {mount["mountPath"] for mount in part.get("volumeMounts", [])}
        if name != "run" and not {MACHINE_LOCK_FOLDER, "/opt/dagster/dagster_home"} <= written:
            yield f"{name}: has no place to write"


def test_kubernetes_gives_no_right_that_is_not_needed():
    assert list(looseness_of_values(values())) == []
    config = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["execution"]["config"]
    (account,) = values()["extraManifests"]
    assert account["kind"] == "ServiceAccount"
    assert account["metadata"]["name"] == config["service_account_name"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dagsterWebserver.podSecurityContext.runAsUser", 0),
        ("dagsterWebserver.securityContext.readOnlyRootFilesystem", False),
        ("dagsterDaemon.securityContext.allowPrivilegeEscalation", None),
        ("dagsterDaemon.podSecurityContext.seccompProfile", None),
        ("dagsterDaemon.volumeMounts", []),
        ("dagster-user-deployments.deployments.0.securityContext", {}),
        ("dagster-user-deployments.deployments.0.volumes.1", {"name": "tmp", "hostPath": {"path": "/srv"}}),
        ("runLauncher.config.k8sRunLauncher.securityContext.capabilities", {"drop": ["ALL"], "add": ["NET_ADMIN"]}),
        ("runLauncher.config.k8sRunLauncher.runK8sConfig.podSpecConfig.securityContext.runAsNonRoot", False),
    ],
)
def test_a_right_too_many_is_seen_in_the_values(path, value):
    document = copy.deepcopy(values())  # anchors are one object each
    *way, last = path.split(".")
    place = document
    for part in way:
        place = place[int(part)] if part.isdigit() else place[part]
    place[int(last) if last.isdigit() else last] = value
    assert list(looseness_of_values(document))


def test_images_run_as_a_user_and_hold_what_they_need_alone():
    stages = (FOLDER / "Dockerfile").read_text().split("\nFROM ")[1:]
    assert len(stages) == 2
    for stage in stages:
        instructions = [line for line in stage.splitlines() if re.match("[A-Z]+ ", line)]
        assert instructions[-1] == "USER 10001:10001", stage.splitlines()[0]
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    taken = {line[1:] for line in ignored if line.startswith("!")}
    assert taken == {"pyproject.toml", "README.md", "LICENSE", "assets", "orchestration", "resources"}
    assert all((ROOT / name).exists() for name in taken)
    assert "orchestration/deployment/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_redis_answers_to_its_password_alone_and_shows_it_nobody(tmp_path, unused_port):
    """The command of compose.yaml, and its health check, on a real Redis."""
    if shutil.which("redis-server") is None:
        servers.missing("Redis", "redis-server")
    service, password = compose()["services"]["redis"], "a-secret-of-this-test"
    *shell, script = service["command"]
    script = script.replace("$$", "$").replace(f"{MACHINE_LOCK_FOLDER}/", f"{tmp_path}/")
    script += f" --port {unused_port} --bind 127.0.0.1 --dir {tmp_path} --save ''"
    given = dict.fromkeys(service["environment"], password)
    process = subprocess.Popen([*shell, script], env={**os.environ, **given})
    try:
        client = ["redis-cli", "-p", str(unused_port), "ping"]
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(client, env={**os.environ, **given}, capture_output=True).stdout != b"PONG\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert b"NOAUTH" in subprocess.run(client, capture_output=True).stdout
        started = Path(f"/proc/{process.pid}")
        assert b"redis-server" in (started / "cmdline").read_bytes()
        assert password.encode() not in (started / "cmdline").read_bytes() + (started / "environ").read_bytes()
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    finally:
        process.kill()
        process.wait()


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
            (r"redis://:.*@redis:6379", self.redis),
            (r"\b(mlflow|127\.0\.0\.1):5000", f"127.0.0.1:{self.ports['mlflow']}"),
            # Another address of loopback: to the launcher it is another machine's.
            (r"host: code\b", "host: 127.0.0.2"),
            (r"0\.0\.0\.0", "127.0.0.1"),
            (r"\b5000\b", str(self.ports["mlflow"])),
            (r"\b4000\b", str(self.ports["code"])),
            (r"\b3000\b", str(self.ports["webserver"])),
            (r"/state\b", str(self.folder / "state")),
            (r"^/mlflow$", str(self.folder / "mlflow")),
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
