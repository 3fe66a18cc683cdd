"""What needs a key on a Triton server of ours, who has the key, and how the user's own servers are spoken to."""

import base64
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestration.settings import read_workspace
from resources.errors import CatalogError, ServerError
from resources.settings.connection import KEY_HEADER, Connection, held_key, kept_key
from resources.triton.client import TextClient
from resources.triton.fleet import Fleet
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.releases import CONTRACT, ask_together, make_plan, unasked

ROOT = Path(__file__).resolve().parents[1]
#: Backend python and a model.py that leaves a trace, as a web page could send them: without a CORS preflight.
CONFIG = {"name": "evil", "backend": "python", "max_batch_size": 0, "input": [], "output": []}
PAGE = {"Content-Type": "text/plain", "Origin": "https://evil.example", "Host": "evil.example"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restricted")
    publish(make_plan(folder / "plan", seed=0), folder / "cpu", Steps(prove=unasked))
    return folder / "cpu"


@pytest.fixture(scope="module")
def served(repository, triton_settings, tmp_path_factory):
    """A server; AIP_MODE would open the door that Triton has for Vertex AI."""
    log = tmp_path_factory.mktemp("served") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIP_MODE", "PREDICTION")
        with EmbeddedServer(repository, triton_settings, models=["tiny"], log=log) as server:
            yield server


def post(server, path, body=b"{}", **headers):
    request = urllib.request.Request(f"http://{server.http_address}{path}", data=body, headers={**PAGE, **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - loopback
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_request_cannot_upload_code(served, tmp_path):
    trace = tmp_path / "it ran"
    code = f"open({str(trace)!r}, 'w').close()\nclass TritonPythonModel:\n    pass\n"
    parameters = {"config": json.dumps(CONFIG), "file:1/model.py": base64.b64encode(code.encode()).decode()}
    body = json.dumps({"parameters": parameters}).encode()
    assert post(served, "/v2/repository/models/evil/load", body) == 403
    assert post(served, "/v2/repository/models/evil/load", body, **{KEY_HEADER: "guessed"}) == 403
    assert not trace.exists()
    # With the key it would run: the attack itself is right.
    post(served, "/v2/repository/models/evil/load", body, **{KEY_HEADER: served.connection.key})
    assert trace.exists()


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/tiny/unload",
        "/v2/repository/models/tiny/load",
        "/v2/systemsharedmemory/region/r/register",
        "/v2/cudasharedmemory/region/r/register",
        "/v2/trace/setting",
        "/v2/models/tiny/trace/setting",
        "/v2/logging",
    ],
)
def test_every_api_that_changes_the_server_needs_the_key(served, path):
    assert post(served, path) == 403
    assert post(served, path, **{KEY_HEADER: served.connection.key}) != 403


def test_the_same_over_grpc(served):
    import tritonclient.grpc as api

    closed = ["get_model_repository_index", "get_trace_settings", "get_log_settings"]
    closed += ["get_system_shared_memory_status", "get_cuda_shared_memory_status"]
    client = api.InferenceServerClient(served.grpc_address)
    for name in closed:
        with pytest.raises(api.InferenceServerException, match="restricted, expecting header"):
            getattr(client, name)()
    for change in (client.load_model, client.unload_model):
        with pytest.raises(api.InferenceServerException, match="restricted, expecting header"):
            change("tiny")
    assert client.get_model_config("tiny").config.name == "tiny"  # it only reads, and perf_analyzer needs it
    client.close()
    with (
        pytest.raises(ServerError, match=r"unload tiny: .*Set REFINERY_TRITON_KEY"),
        TextClient(served.grpc_address) as c,
    ):
        c.unload("tiny")
    for protocol in ("grpc", "http"):
        address = served.grpc_address if protocol == "grpc" else served.http_address
        with TextClient(address, protocol) as client:
            ask_together(client, ["anyone may ask"])


def test_no_other_door_is_open(served):
    listening = {
        connection.laddr.port
        for process in psutil.Process(served.pid).children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    ports = {int(address.split(":")[1]) for address in (served.grpc_address, served.http_address)}
    assert listening == ports | {int(served.metrics_address.split(":")[1])}


def test_a_fleet_without_the_key_is_refused_before_anything_changes(served, triton_settings):
    settings = replace(triton_settings, servers=(served.grpc_address,))
    with Fleet(settings) as fleet, pytest.raises(ServerError, match=r"Set REFINERY_TRITON_KEY"):
        fleet.require_ready()
    with Fleet(replace(settings, connection=Connection(key=served.connection.key))) as fleet:
        fleet.require_ready()


def test_the_key_lies_in_a_file_of_its_user_while_the_server_runs(tmp_path, triton_settings):
    folder, path = tmp_path / "home" / "keys", tmp_path / "home" / "keys" / "8001.key"
    settings = replace(triton_settings, keys=folder, connection=Connection(key="of the fleet"))
    before = os.umask(0)
    try:
        with kept_key(folder, 8001, "secret"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert settings.connection_to("127.0.0.1:8001") == Connection(key="secret")
            for other in ("127.0.0.1:8002", "triton-1:8001", "[::1]:8001"):
                assert settings.connection_to(other).key == "of the fleet"
            with (
                pytest.raises(ServerError, match=r"Another .*refinery serve.* has gRPC port 8001"),
                kept_key(folder, 8001, "x"),
            ):
                pass
    finally:
        os.umask(before)
    assert not path.exists()
    # Of a process that was killed: who listens at the port now is not told the key.
    code = f"""
import sys, time
from pathlib import Path
from resources.settings.connection import kept_key
with kept_key(Path({str(folder)!r}), 8001, "left over"):
    print("kept", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"kept\n"
        assert held_key(folder, "localhost:8001") == "left over"
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    assert held_key(folder, "localhost:8001") is None


@contextmanager
def https(target, certificates):
    """The address of a TLS server that passes everything on to `target`, and asks clients for a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "certificate.pem", certificates / "key.pem")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    host, port = target.split(":")

    def copy(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def accept(listener):
        while True:
            try:
                raw, _ = listener.accept()
                inside = context.wrap_socket(raw, server_side=True)
            except ssl.SSLError:
                continue
            except OSError:
                return
            outside = socket.create_connection((host, int(port)))
            for pair in ((inside, outside), (outside, inside)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_servers_behind_tls_a_key_and_a_header(repository, triton_settings, certificates, tmp_path):
    """What the settings describe, on a Triton that asks for a client's certificate, a key, and a header for all."""
    variables = {
        "REFINERY_TRITON_CA": str(certificates / "ca.pem"),
        "REFINERY_TRITON_CERTIFICATE": str(certificates / "certificate.pem"),
        "REFINERY_TRITON_PRIVATE_KEY": str(certificates / "key.pem"),
        "REFINERY_TRITON_KEY": "of-the-fleet",
        "REFINERY_TRITON_HEADERS": json.dumps({"Triton-Grpc-Protocol-Tenant": "ours", "Tenant": "ours"}),
    }
    connection = read_workspace(variables).triton.connection
    assert connection.tls
    assert "of-the-fleet" not in repr(connection)
    assert "ours" not in repr(read_workspace(variables))
    options = [
        "--grpc-restricted-protocol=inference,metadata:tenant=ours",
        "--http-restricted-api=inference,metadata:tenant=ours",
    ]
    tls = ["--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true"]
    tls += [f"--grpc-server-cert={certificates / 'certificate.pem'}", f"--grpc-server-key={certificates / 'key.pem'}"]
    tls += [f"--grpc-root-cert={certificates / 'ca.pem'}"]
    server = EmbeddedServer(
        repository,
        triton_settings,
        models=["tiny"],
        log=tmp_path / "log",
        options=[*options, *tls],
        key="of-the-fleet",
    )
    # What waits until it is ready is a client as well.
    server.connection = replace(connection, key="of-the-fleet")
    with server, https(server.http_address, certificates) as address:
        for protocol, where in (("grpc", server.grpc_address), ("http", address)):
            with TextClient(where, protocol, connection) as client:
                assert client.contract("tiny") == CONTRACT
                assert ask_together(client, ["text"]).shape[0] == 1
            bare = TextClient(where, protocol, replace(connection, headers=()))
            with bare as client, pytest.raises(ServerError, match="restricted, expecting header"):
                client.contract("tiny")
            with TextClient(where, protocol, replace(connection, certificate=None, private_key=None)) as client:
                assert not client.is_live()
            with TextClient(where, protocol) as client:
                assert not client.is_live()
        settings = replace(triton_settings, servers=(server.grpc_address,), connection=connection)
        with Fleet(settings) as fleet:
            fleet.require_ready()
            fleet.retire(["tiny__r7__pipeline"])
            assert fleet.served("tiny") == [1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"REFINERY_TRITON_HEADERS": "secret"}, "REFINERY_TRITON_HEADERS is not a JSON object of headers"),
        ({"REFINERY_TRITON_HEADERS": '["secret"]'}, "REFINERY_TRITON_HEADERS is not a JSON object of headers"),
        ({"REFINERY_TRITON_HEADERS": '{"a b": "secret"}'}, "REFINERY_TRITON_HEADERS is not"),
        ({"REFINERY_TRITON_HEADERS": '{"a": "secret\\nb: c"}'}, "REFINERY_TRITON_HEADERS is not"),
        ({"REFINERY_TRITON_HEADERS": '{"a": 1}'}, "REFINERY_TRITON_HEADERS is not"),
        ({"REFINERY_TRITON_KEY": "secret\r\n"}, "REFINERY_TRITON_KEY holds characters"),
        ({"REFINERY_TRITON_TLS": "yes"}, "REFINERY_TRITON_TLS: 'yes' is neither 0 nor 1"),
        ({"REFINERY_TRITON_CA": "/nowhere/ca.pem"}, "REFINERY_TRITON_CA: /nowhere/ca.pem is not a file"),
        ({"REFINERY_TRITON_CERTIFICATE": __file__}, "belong together"),
        ({"REFINERY_TRITON_CA": __file__, "REFINERY_TRITON_TLS": "0"}, "REFINERY_TRITON_TLS is 0, but"),
    ],
)
def test_settings_that_make_no_sense(variables, message):
    with pytest.raises(CatalogError, match=message) as caught:
        read_workspace(variables)
    assert "secret" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library's half-made client
def test_a_file_for_tls_that_is_none(tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    connection = Connection(tls=True, ca=tmp_path / "ca.pem")
    with pytest.raises(ServerError, match=r"file for TLS could not be read .* Correct REFINERY_TRITON_CA"):
        TextClient("127.0.0.1:9", "http", connection)
