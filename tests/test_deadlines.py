"""Every call of a server elsewhere ends, however slowly that answers. The servers are real ones on loopback."""

import json
import socket
import threading
import time
import traceback
from contextlib import contextmanager

import pytest

from orchestration.automation.notifications import _post
from resources.boundary import deadlines, http
from resources.boundary.addresses import Address
from resources.boundary.deadlines import Pace, within
from resources.boundary.http import get_json
from resources.checkpoints.watch.hub import hub_commit
from resources.checkpoints.watch.registry import ask_version
from resources.errors import CheckpointError, NotificationError, ServerError, StorageError, TrackingError
from resources.settings.sources import Access, SourceSettings
from resources.tracking import store
from resources.tracking.store import TrackingStore
from resources.triton import client
from resources.triton.client import TextClient

#: What the limits are set to here; a drip comes well within each, so that no time-out of a socket ends anything.
LIMIT_SECONDS, DRIP_SECONDS = 1.0, 0.1
#: Stands in the addresses, and in no error.
LOGIN = "user:canary"
HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def dripping(part):
    """The address of a server that takes any request, and drips the headers or the body of its answer for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def answer(connection):
        with connection:
            connection.recv(65536)
            try:
                # One header without an end: http.client itself stops after a hundred of them.
                begun = b"X-Drip: " if part == "headers" else b'Content-Length: 100000000\r\n\r\n{"a": "'
                connection.sendall(HEADERS + begun)
                while not stop.wait(DRIP_SECONDS):
                    connection.sendall(b"x")
            except OSError:
                pass  # whoever asked gave up

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture(autouse=True)
def short_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(http, "ANSWER_SECONDS", LIMIT_SECONDS)
    monkeypatch.setattr(store, "ANSWER_SECONDS", LIMIT_SECONDS)
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", LIMIT_SECONDS)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def look_at_hub(address, folder):
    hub_commit("tiny/bert", Access(hub_endpoint=Address(f"http://{LOGIN}@{address}"), hub_cache=folder))


def look_at_registry(address, folder):
    ask_version("models:/bert@live", SourceSettings(folder, Address(f"http://{LOGIN}@{address}")))


def tell(address, folder):
    _post(Address(f"http://{LOGIN}@{address}/hook", path=False), {"run_id": "1"})


def track(address, folder):
    tracking = TrackingStore(f"http://{LOGIN}@{address}", ui=None, folder=folder)
    with tracking.clear_errors():
        tracking.experiment("tiny")


def ask_triton(address, folder):
    with TextClient(address, "http") as triton:
        triton.contract("tiny")


@pytest.mark.parametrize("part", ["headers", pytest.param("body", marks=pytest.mark.whole)])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (look_at_hub, CheckpointError),
        (look_at_registry, CheckpointError),
        (tell, NotificationError),
        (track, TrackingError),
        (ask_triton, ServerError),
    ],
)
def test_an_answer_that_drips_ends(call, error, part, tmp_path):
    import gevent  # noqa: F401 - imported before the clock runs, as MLflow is
    import mlflow  # noqa: F401

    with dripping(part) as address:
        began = time.monotonic()
        with pytest.raises(error, match=f"{address}.*within") as caught:
            call(address, tmp_path)
        assert "canary" not in "".join(traceback.format_exception(caught.value))
        # A busy machine takes its time; a drip would go on for ever.
        assert time.monotonic() - began < 10 * LIMIT_SECONDS


def test_no_thread_is_left_of_a_look_that_ended():
    with dripping("headers") as address:
        before = threading.active_count()
        with pytest.raises(OSError, match="answer within"):
            get_json(f"http://{address}", {})
        deadline = time.monotonic() + 20
        while threading.active_count() > before + 1 and time.monotonic() < deadline:  # 1: the server's own
            time.sleep(0.05)
        assert threading.active_count() <= before + 1


def test_a_server_that_is_not_there_is_told_in_the_systems_words():
    with pytest.raises(ConnectionError, match="^Connection refused$"):
        get_json("http://127.0.0.1:1/", {})


def test_a_call_within_its_time_is_as_without_a_limit():
    assert within(10, lambda: json.loads("[1]")) == [1]
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        within(0.1, lambda: time.sleep(5))


def test_a_download_from_object_storage_that_drips_is_given_up(s3, tmp_path, monkeypatch):
    """Long before the limit of the whole, which follows its size."""
    monkeypatch.setattr(deadlines, "WINDOW_SECONDS", LIMIT_SECONDS)
    place = s3.place("ckpt/model.safetensors", tmp_path)
    place.write_bytes(bytes(100_000))
    place.download(tmp_path / "fast", 100_000)
    assert (tmp_path / "fast").stat().st_size == 100_000
    monkeypatch.setattr(s3, "drips", lambda key: key.endswith("model.safetensors"))
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"the request to read it failed: only \d+ bytes arrived in \d s, less than"):
        place.download(tmp_path / "slow", 100_000)
    assert time.monotonic() - began < 10 * LIMIT_SECONDS


def test_the_pace_of_a_download_is_looked_at_in_windows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(deadlines.time, "monotonic", lambda: now[0])
    pace = Pace(500)
    floor, window = deadlines.FLOOR_BYTES_PER_SECOND, deadlines.WINDOW_SECONDS
    now[0] = window - 1
    pace.require(500)  # nothing yet, and the window is not over
    now[0] = window
    pace.require(500 + int(floor * window))
    now[0] = 2 * window - 1
    pace.require(500 + int(floor * window))
    now[0] = 2 * window
    with pytest.raises(TimeoutError, match=r"only 7 bytes arrived in 60 s, less than 10,000 bytes a second"):
        pace.require(507 + int(floor * window))
