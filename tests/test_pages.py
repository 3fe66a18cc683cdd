"""`refinery ui` as a process: what it serves, what it refuses from other web pages, and that nothing of it stays."""

import http.client
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import quote

import dagster as dg
import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from orchestration.automation.sensors import SENSOR
from orchestration.ui.guard import origin_of
from orchestration.ui.ui import mlflow_variables
from resources.settings.workspace import Workspace
from tests.test_cli import REFINERY, environment, free

#: Where a proxy of the user's stands.
PROXY = "https://refinery.example.org"
JSON = {"Content-Type": "application/json"}


@dataclass
class Pages:
    process: subprocess.Popen
    ports: dict[str, int]
    workspace: Workspace
    nowhere: str

    def ask(self, method, path, headers=None, body=None, page="dagster", host=None):
        """The status and the text of one answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.ports[page], timeout=60)) as connection:
            connection.putrequest(method, path, skip_host=True)
            connection.putheader("Host", f"127.0.0.1:{self.ports[page]}" if host is None else host)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body.encode())))
            connection.endheaders(None if body is None else body.encode())
            answer = connection.getresponse()
            self.headers = answer.headers
            return answer.status, answer.read().decode(errors="replace")

    def post(self, query, headers=None, host=None, **variables):
        body = json.dumps({"query": query, "variables": variables})
        return self.ask("POST", "/graphql", {**JSON, **(headers or {})}, body, host=host)

    def instance(self):
        return dg.DagsterInstance.from_config(str(self.workspace.home / "dagster"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory, made_checkpoint) -> Iterator[Pages]:
    """The pages, with a source that is there and one that is not. None of its processes may be left at the end.

    The run of the one that is there waits for its evaluation set, without end, so that it is under way all the time.
    """
    folder = tmp_path_factory.mktemp("pages")
    workspace = Workspace(folder / "home", folder / "models.yaml")
    nowhere = str(folder / "nowhere")
    sources = {"m": nowhere, "tiny": str(made_checkpoint())}
    waiting = folder / "requests.jsonl"
    os.mkfifo(waiting)
    fields = {"task": "embedding", "evaluation": str(waiting)}
    models = [{"name": name, "source": source, **fields} for name, source in sources.items()]
    workspace.catalog_path.write_text(json.dumps({"models": models}))
    ports = {name: free() for name in ("dagster", "mlflow")}
    command = [REFINERY, "ui", *(part for name in ports for part in (f"--{name}-port", str(ports[name])))]
    variables = environment(workspace, REFINERY_WATCH_SECONDS="1", REFINERY_DAGSTER_UI=PROXY)
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    begun = []
    try:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(4))
        assert "Ctrl-C" in said
        for port in ports.values():
            assert f"http://127.0.0.1:{port}" in said
        begun = psutil.Process(process.pid).children(recursive=True)
        assert len(begun) >= 2
        yield Pages(process, ports, workspace, nowhere)
        begun = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        assert process.wait(60) == 0
        assert not [one for one in psutil.wait_procs(begun, timeout=20)[1] if one.is_running()]


def test_both_pages_are_served_and_sources_are_watched(pages):
    """The sensor is on: what is new in a folder is optimized, and what is wrong with a source is seen in its partition.
    A run that is under way ends with the pages.
    """
    for name in pages.ports:
        status, page = pages.ask("GET", "/", page=name)
        assert status == 200
        assert name in page.lower()
    with pages.instance() as instance:
        (record,) = first(instance.fetch_observations, "m")
        assert f"the folder {pages.nowhere} does not exist" in record.asset_observation.description
        (record,) = first(instance.fetch_materializations, "tiny")
        (run,) = instance.get_runs(dg.RunsFilter(job_name="optimize"))
    assert run.run_id == record.run_id
    assert run.tags["dagster/sensor_name"] == SENSOR


def first(fetch, model):
    """The first record of the model's partition of `checkpoint`, which is waited for."""
    which = dg.AssetRecordsFilter(asset_key=dg.AssetKey("checkpoint"), asset_partitions=[model])
    deadline = time.monotonic() + 180  # benchmarks of others on this machine come first
    while not (records := fetch(which, limit=1).records):
        assert time.monotonic() < deadline, f"{model}: nothing was seen"
        time.sleep(0.5)
    return records


def limiting(pool):
    """A mutation that leaves a trace, which nothing else removes."""
    return f'mutation {{ setConcurrencyLimit(concurrencyKey: "{pool}", limit: 1) }}'


def limited(instance):
    """The pools that have a limit."""
    return instance.event_log_storage.get_concurrency_keys()


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        (None, {}),
        ("localhost:{port}", {"Origin": "http://localhost:{port}"}),
        ("[::1]:3001", {"Origin": "http://[::1]:3001"}),  # a tunnel of ssh
        ("refinery.example.org", {"Origin": PROXY}),
        (None, {"Origin": PROXY}),  # a proxy that names the address which it asks
    ],
)
def test_a_mutation_of_the_pages_own_is_done(pages, host, headers):
    port = pages.ports["dagster"]
    filled = {name: value.format(port=port) for name, value in headers.items()}
    status, text = pages.post(limiting("own"), filled, host=host and host.format(port=port))
    assert status == 200, text
    with pages.instance() as instance:
        assert "own" in limited(instance)
        instance.event_log_storage.delete_concurrency_limit("own")


ATTACK = limiting("attack")
QUERY = f"/graphql?query={quote(ATTACK)}"
DOCUMENT = json.dumps({"query": ATTACK})
REPORT = "/report_asset_materialization/checkpoint?partition=attack"
FOREIGN = {"Origin": "https://evil.example.org"}


@pytest.mark.parametrize(
    ("status", "method", "path", "headers", "body", "host"),
    [
        pytest.param(405, "GET", QUERY, {}, None, None, id="an image"),
        pytest.param(405, "GET", QUERY.replace("?", "%0A?"), {}, None, None, id="a path with a line break"),
        pytest.param(405, "HEAD", QUERY, {}, None, None, id="a prefetch"),
        pytest.param(415, "POST", QUERY, {}, None, None, id="a form without a body"),
        pytest.param(415, "POST", QUERY, {"Content-Type": "text/plain"}, "x", None, id="plain text"),
        pytest.param(
            415,
            "POST",
            "/graphql",
            {"Content-Type": "text/plain; a=application/json"},
            DOCUMENT,
            None,
            id="a parameter",
        ),
        pytest.param(
            415, "POST", "/graphql", {"Content-Type": "application/graphql"}, ATTACK, None, id="another JSON-less type"
        ),
        pytest.param(
            415, "POST", QUERY, {"Content-Type": "multipart/form-data; boundary=x"}, "--x--\r\n", None, id="multipart"
        ),
        pytest.param(
            415, "POST", QUERY, {"Content-Type": "application/x-www-form-urlencoded"}, "a=b", None, id="a form"
        ),
        pytest.param(415, "POST", REPORT, {}, None, None, id="a report without a body"),
        pytest.param(403, "POST", REPORT, {**FOREIGN, **JSON}, "{}", None, id="a report of another page"),
        pytest.param(403, "POST", "/graphql", {**FOREIGN, **JSON}, DOCUMENT, None, id="another page"),
        pytest.param(403, "POST", "/graphql", {"Origin": "null", **JSON}, DOCUMENT, None, id="a sandboxed frame"),
        pytest.param(
            403, "POST", "/graphql", {"Origin": "http://127.0.0.1:1", **JSON}, DOCUMENT, None, id="another local page"
        ),
        pytest.param(
            403, "POST", "/graphql", {"Origin": "http://refinery.example.org", **JSON}, DOCUMENT, None, id="no TLS"
        ),
        pytest.param(403, "POST", "/graphql", JSON, DOCUMENT, "evil.example.org:3000", id="rebinding"),
        pytest.param(403, "POST", "/graphql", JSON, DOCUMENT, "127.0.0.1.evil.example.org", id="a name like ours"),
        pytest.param(403, "POST", "/graphql", JSON, DOCUMENT, "127.0.0.1@evil.example.org", id="a user in Host"),
        pytest.param(403, "POST", "/graphql", JSON, DOCUMENT, "", id="no host"),
        pytest.param(403, "POST", "/graphql", {"host": "evil", **JSON}, DOCUMENT, None, id="two hosts"),
        pytest.param(403, "GET", "/", {}, None, "evil.example.org", id="reading after rebinding"),
    ],
)
def test_what_another_page_can_send_is_refused(pages, status, method, path, headers, body, host):
    assert pages.ask(method, path, headers, body, host=host)[0] == status
    with pages.instance() as instance:
        assert "attack" not in limited(instance)
        events = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey("checkpoint"), asset_partitions=["attack"]), limit=1
        )
    assert not events.records


def test_the_pages_stay_out_of_frames_and_the_query_editor_works(pages):
    assert pages.ask("GET", "/runs")[0] == 200
    assert pages.headers["X-Frame-Options"] == "SAMEORIGIN"
    status, text = pages.ask("GET", "/graphql", {"Accept": "text/html"})
    assert status == 200
    assert "graphiql" in text.lower()


def websocket(pages, origin, host=None):
    """A connection as a browser opens it for what is live on the pages."""
    headers = {"Host": host} if host else {}
    return connect(
        f"ws://127.0.0.1:{pages.ports['dagster']}/graphql",
        origin=origin,
        subprotocols=["graphql-ws"],
        additional_headers=headers,
        open_timeout=30,
    )


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example.org", None),
        ("null", None),
        ("http://127.0.0.1:1", None),
        ("http://evil.example.org:3000", "evil.example.org:3000"),
    ],
)
def test_another_page_opens_no_websocket(pages, origin, host):
    with pytest.raises(InvalidStatus) as caught:
        websocket(pages, origin, host)
    assert caught.value.response.status_code == 403


def test_a_websocket_subscribes_and_changes_nothing(pages):
    with websocket(pages, f"http://127.0.0.1:{pages.ports['dagster']}") as socket:
        socket.send(json.dumps({"type": "connection_init"}))
        assert json.loads(socket.recv(30)) == {"type": "connection_ack"}
        socket.send(json.dumps({"type": "start", "id": "1", "payload": {"query": ATTACK}}))
        assert json.loads(socket.recv(30))["type"] == "error"
        with pages.instance() as instance:
            assert "attack" not in limited(instance)
            run = instance.create_run_for_job(nothing)
        query = f'subscription {{ pipelineRunLogs(runId: "{run.run_id}") {{ __typename }} }}'
        socket.send(json.dumps({"type": "start", "id": "2", "payload": {"query": query}}))
        said = json.loads(socket.recv(30))
        assert said["payload"]["data"]["pipelineRunLogs"]["__typename"] == "PipelineRunLogsSubscriptionSuccess"


@dg.job
def nothing():
    pass


@pytest.mark.parametrize(
    ("headers", "host"), [({"Origin": "https://evil.example.org"}, None), ({}, "evil.example.org")]
)
def test_mlflow_refuses_other_pages_too(pages, headers, host):
    """MLflow checks Host and Origin itself, as long as nothing in its command line turns that off."""
    body = json.dumps({"name": "attack"})
    path = "/api/2.0/mlflow/experiments/create"
    assert pages.ask("POST", path, {**JSON, **headers}, body, page="mlflow", host=host)[0] == 403
    find = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=attack"
    assert pages.ask("GET", find, page="mlflow")[0] == 404


def test_mlflow_starts_no_processes_for_jobs(pages):
    """They would take 1 GB of memory, and nothing here uses MLflow's jobs."""
    commands = [one.cmdline() for one in psutil.Process(pages.process.pid).children(recursive=True)]
    assert any("mlflow" in command for command in commands)
    assert not [command for command in commands if any("mlflow.server.jobs" in part for part in command)]


def test_jobs_of_mlflow_run_where_the_user_asks_for_them(workspace, monkeypatch):
    monkeypatch.delenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", raising=False)
    assert mlflow_variables(workspace)["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true")
    assert mlflow_variables(workspace)["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "true"


def test_no_other_port_is_open(pages):
    processes = [psutil.Process(pages.process.pid), *psutil.Process(pages.process.pid).children(recursive=True)]
    listening = set()
    for process in processes:
        try:
            found = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        listening |= {tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", port) for port in pages.ports.values()}


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("https://Example.org", ("https", "example.org", 443)),
        ("http://user:secret@example.org:3000/path", ("http", "example.org", 3000)),
        ("http://[::1]:80", ("http", "::1", 80)),
        ("null", None),
        ("file:///etc", None),
        ("http://", None),
        ("http://example.org:port", None),
        ("http://[::1", None),
    ],
)
def test_the_origin_of_an_address(address, origin):
    assert origin_of(address) == origin
