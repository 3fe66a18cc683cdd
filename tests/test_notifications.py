"""A run that fails is told of: in a log, and to a webhook."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import dagster as dg
import pytest

from orchestration.automation.notifications import failure_sensor
from orchestration.definitions import make_definitions
from orchestration.settings import webhook_of
from resources.boundary.addresses import Address
from resources.errors import CatalogError, NotificationError, ReleaseError


@dg.op
def publishing():
    raise ReleaseError("tiny: release 4 could not be proven: no answer")


@dg.job
def optimize():
    publishing()


@pytest.fixture
def failed():
    """A run-failure sensor's context for a real run that failed."""
    with dg.DagsterInstance.ephemeral() as instance:
        result = optimize.execute_in_process(
            instance=instance, raise_on_error=False, tags={"dagster/partition": "tiny"}
        )
        yield dg.build_run_status_sensor_context(
            sensor_name="failed_runs",
            dagster_instance=instance,
            dagster_run=result.dagster_run,
            dagster_event=result.get_run_failure_event(),
        ).for_run_failure()


@pytest.fixture
def webhook():
    """A server on loopback that plays a chat's webhook, and what it was sent."""
    sent = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(503 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


def test_the_webhook_is_told_model_step_reason_and_link(failed, webhook):
    address, sent = webhook
    failure_sensor(Address(f"{address}/hook", path=False), "http://dagster:3000/")(failed)
    ((kind, body),) = sent
    said = json.loads(body)
    run = failed.dagster_run.run_id
    assert kind == "application/json"
    assert said["model"] == "tiny"
    assert "release 4 could not be proven" in said["steps"]["publishing"]
    assert said["url"] == f"http://dagster:3000/runs/{run}"
    assert said["text"].startswith(f"optimize failed for tiny (run {run[:8]}): publishing: ")
    assert said["text"].endswith(said["url"])


def test_a_webhook_that_does_not_take_it_is_named_without_its_secret(failed, webhook):
    address, _ = webhook
    with pytest.raises(NotificationError, match=r"127\.0\.0\.1:\d+ did not accept it \(HTTP Error 503") as error:
        failure_sensor(Address(f"{address}/broken", path=False), None)(failed)
    assert "broken" not in str(error.value)
    failure_sensor(None, None)(failed)


def test_a_webhook_is_a_web_address():
    assert webhook_of({}) is None
    assert webhook_of({"REFINERY_WEBHOOK": "https://chat/x"}).reveal() == "https://chat/x"
    with pytest.raises(CatalogError, match="REFINERY_WEBHOOK is not an address"):
        webhook_of({"REFINERY_WEBHOOK": "file:///etc/passwd"})


def test_definitions_that_are_given_no_webhook_have_none(workspace, monkeypatch):
    """Whatever the environment says: only what Dagster loads is made of that."""
    monkeypatch.setenv("REFINERY_WEBHOOK", "file:///etc/passwd")
    assert make_definitions(workspace).get_sensor_def("failed_runs") is not None
