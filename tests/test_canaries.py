"""No secret of an address or a variable reaches what others see: real commands and servers, with failures among them.

Every secret is a canary of its own. Then all is searched that the commands left or showed: what they printed, logs,
Dagster's and MLflow's storage, reports, releases, a webhook's bodies, command lines, and what served models have.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from tests import servers
from tests.conftest import entry_for
from tests.pipeline import add_entry

CANARY = "canary"
REFINERY = str(Path(sys.executable).with_name("refinery"))


def canary(what):
    return f"{CANARY}-{what}"


def login(what):
    return f"{canary(f'{what}-name')}:{canary(f'{what}-password')}@"


#: Of nobody's use here, as every machine has some.
VARIABLES = {
    "AWS_ACCESS_KEY_ID": canary("aws-id"),
    "AWS_SECRET_ACCESS_KEY": canary("aws-key"),
    "AZURE_STORAGE_KEY": canary("azure"),
    "DATABASE_URL": f"postgresql://{login('another')}host/db",
    "GOOGLE_APPLICATION_CREDENTIALS": f"/{canary('google')}",
    "HF_ENDPOINT": f"http://{login('hub')}127.0.0.1:9",
    "HF_TOKEN": canary("hub-token"),
    "MLFLOW_TRACKING_TOKEN": canary("mlflow-token"),
    "NVIDIA_API_KEY": canary("nvidia"),
    "REFINERY_DAGSTER_UI": f"http://{login('dagster-ui')}dagster:3000",
    "REFINERY_MLFLOW_UI": f"http://{login('mlflow-ui')}mlflow:5000",
}


@contextmanager
def webhook():
    """A chat's address with secrets in it, and what it was sent."""
    sent = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield (
            f"http://{login('hook')}127.0.0.1:{server.server_port}/{canary('hook-path')}?x={canary('hook-query')}",
            sent,
        )
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def databases():
    """Two of one Postgres, whose password is a canary: Dagster's and MLflow's."""
    import psycopg2

    with servers.postgres() as url:
        plain = url.replace("+psycopg2", "")
        connection = psycopg2.connect(plain)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE USER {CANARY}_user SUPERUSER PASSWORD '{canary('database')}'")
            cursor.execute("CREATE DATABASE mlflow")
        connection.close()
        host = url.rpartition("@")[2].rpartition("/")[0]
        yield tuple(
            f"postgresql+psycopg2://{CANARY}_user:{canary('database')}@{host}/{name}" for name in ("postgres", "mlflow")
        )


def rows(url):
    """Every row of a database as text."""
    import psycopg2

    with psycopg2.connect(url.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT t::text FROM "{table}" t')  # noqa: S608 - a table's own name
            yield from (f"{table}: {row}" for (row,) in cursor.fetchall())


def hits(text):
    return [line[:500] for line in text.splitlines() if CANARY in line.replace(f"{CANARY}_user", "")]


def files_with(folder):
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in found if CANARY.encode() in path.read_bytes().replace(f"{CANARY}_user".encode(), b"")]


class Machine:
    """Commands with that environment, and all that they printed."""

    def __init__(self, workspace, **variables):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
        self.home, self.printed = workspace.home, []
        self.environment = {
            **clean,
            **VARIABLES,
            **variables,
            "REFINERY_HOME": str(workspace.home),
            "REFINERY_CATALOG": str(workspace.catalog_path),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        }

    def run(self, *command, code=0):
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=300, check=False, cwd=self.home
        )
        self.printed.append(done.stdout + done.stderr)
        assert done.returncode == code, self.printed[-1][-3000:]

    @contextmanager
    def running(self, *command, until):
        """A command until the context ends; until: what it prints once it is ready."""
        log = self.home.parent / f"{command[1]}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, env=self.environment, stdout=stream, stderr=subprocess.STDOUT, cwd=self.home
            )
        try:
            wait(lambda: until in log.read_text(), lambda: log.read_text()[-3000:])
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            self.printed.append(log.read_text())


def wait(true, why, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, why()
        time.sleep(0.5)


def descendants(process):
    for one in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            yield one, " ".join(one.cmdline()), "\n".join(f"{name}={value}" for name, value in one.environ().items())


@pytest.fixture
def home(workspace, made_checkpoint):
    """A catalog with a model that is made, and with two that cannot be had."""
    add_entry(workspace, entry_for(made_checkpoint(), name="tiny", engines=["onnxruntime_fp32"]))
    add_entry(workspace, entry_for("models:/absent@live", name="unregistered"))
    add_entry(workspace, entry_for("org/absent", name="unreachable"))
    return workspace


@pytest.mark.whole
def test_nothing_of_a_run_on_a_tracking_server_shows_a_secret(home, tmp_path, triton_settings):
    with servers.mlflow(f"sqlite:///{tmp_path / 'server.db'}", tmp_path) as address, webhook() as (hook, _):
        uri = address.replace("//", f"//{login('mlflow')}")
        variables = {"REFINERY_MLFLOW_URI": uri, "REFINERY_WEBHOOK": hook}
        machine = Machine(home, **variables, REFINERY_TRITON_ENVIRONMENT=str(triton_settings.environment))
        machine.run(REFINERY, "optimize", "tiny")
        for broken in ("unregistered", "unreachable"):
            machine.run(REFINERY, "optimize", broken, code=1)
        machine.run(REFINERY, "plan", "tiny", "unregistered", code=1)
        machine.run(REFINERY, "models")
        machine.run(REFINERY, "releases", "tiny")
        machine.run(REFINERY, "gc", "--dry-run")
        ports = [f"--{name}-port={servers.free_port()}" for name in ("http", "grpc", "metrics")]
        with machine.running(REFINERY, "serve", *ports, until="serving tiny") as serving:
            wait(lambda: "triton_python_backend_stub" in str([line for _, line, _ in descendants(serving)]), str)
            for process, line, environment in descendants(serving):
                assert not hits(line), process
                assert not hits(environment), process
        # A server that is away is told of, too.
        machine.environment["REFINERY_MLFLOW_URI"] = f"http://{login('mlflow')}127.0.0.1:9"
        machine.run(REFINERY, "releases", "tiny")
    assert "registry at http://127.0.0.1:" in "".join(machine.printed)
    assert not hits("".join(machine.printed))
    assert not files_with(home.home)
    assert not files_with(tmp_path / "artifacts")
    assert CANARY.encode() not in (tmp_path / "server.db").read_bytes()


@pytest.mark.whole
def test_nothing_of_the_pages_on_databases_shows_a_secret(home, tmp_path):
    with databases() as (of_dagster, of_mlflow), webhook() as (hook, sent):
        machine = Machine(
            home,
            REFINERY_DAGSTER_POSTGRES_URL=of_dagster,
            REFINERY_MLFLOW_URI=of_mlflow,
            REFINERY_WEBHOOK=hook,
            REFINERY_WATCH_SECONDS="5",
        )
        ports = [f"--{name}-port={servers.free_port()}" for name in ("dagster", "mlflow")]
        with machine.running(REFINERY, "ui", *ports, until="Ctrl-C stops the pages") as pages:
            launch = [
                sys.executable,
                "-m",
                "dagster",
                "job",
                "launch",
                "-w",
                str(home.home / "logs" / "workspace.yaml"),
            ]
            machine.environment["DAGSTER_HOME"] = str(home.home / "dagster")
            tags = '{"dagster/partition": "unreachable"}'
            time.sleep(40)  # the sensor tells of runs that fail after its first look
            machine.run(*launch, "--location", "transformer-refinery", "-j", "optimize", "--tags", tags)
            seen = []

            def told():
                for process, line, environment in descendants(pages):
                    seen.append(line)
                    assert not hits(line), process
                    if "mlflow" in line:
                        own = environment.replace(canary("database"), "")
                        assert not hits(own), process
                return sent

            wait(told, lambda: machine.home.joinpath("logs", "dagster.log").read_text()[-3000:])
        assert [line for line in seen if "mlflow" in line]
        assert [line for line in seen if "dagster" in line]
        assert "unreachable" in sent[0]
        assert not hits("\n".join(sent))
        for database in (of_dagster, of_mlflow):
            stored = list(rows(database))
            assert stored
            assert not hits("\n".join(stored))
    assert not hits("".join(machine.printed))
    assert not files_with(home.home)
