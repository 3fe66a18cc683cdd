"""Requests that are broken, hostile or too large, to a real server: refused as the client's error, each for itself."""

import http.client
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

import numpy as np
import pytest

from resources.catalog.entries import LimitSettings
from resources.errors import ServerError
from resources.pipelines.limits import RequestLimits
from resources.tasks import TASKS
from resources.triton.client import TextClient
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.mutations import Mutations
from tests.performance.hostile import KINDS, ask, watched
from tests.releases import CONTRACT, answers_of, make_plan, make_task_plan, unasked

UNASKED = Steps(prove=unasked)
LIMITS = LimitSettings(text_bytes=200_000, request_bytes=500_000, engine_rows=6)
TEXTS = ("a short text", "word " * 40, "naïve 🙂")
#: Put at the end of a release's model.py: its tokenizer takes as long for a long text as there is the file HOLD.
SLOW = """
import os
import time

_opened = TritonPythonModel.initialize


def _initialize(self, args):
    _opened(self, args)
    prepare = self._pipeline.prepare

    def slow(item):
        end = time.monotonic() + 60
        while len(item["TEXT"]) > 100_000 and os.path.exists(HOLD) and time.monotonic() < end:
            time.sleep(0.05)
        return prepare(item)

    self._pipeline.prepare = slow


TritonPythonModel.initialize = _initialize
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return replace(make_plan(tmp_path_factory.mktemp("requests")), limits=LIMITS)


@pytest.fixture(scope="module")
def server(plan, triton_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    publish(plan, folder / "cpu", UNASKED)
    with EmbeddedServer(folder / "cpu", triton_settings, models=["tiny"], log=folder / "triton.log") as running:
        yield running


def post(server, body, headers=(), path="/v2/models/tiny/infer"):
    """Status and body of the answer."""
    connection = http.client.HTTPConnection(server.http_address, timeout=30)
    try:
        connection.request("POST", path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def asked(texts):
    return json.dumps({"inputs": [{"name": "TEXT", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}]})


def status_of(client, texts):
    """The status code that gRPC says."""
    with pytest.raises(Exception) as caught:
        client.ask("tiny", CONTRACT, [{"TEXT": text} for text in texts])
    return caught.value.__cause__.status(), str(caught.value)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([b"\xff\xfe"], "not valid UTF-8"),
        (["a" * 200_001], "a text of 200001 bytes; this model takes at most 200000"),
        (["a" * 199_999] * 3, "holds 599997 bytes of texts; this model takes at most 500000"),
        (["x"] * 7, "needs 7 rows of the engine or more"),
        ([" " * 150_000], "send a shorter text"),
    ],
)
def test_what_a_client_does_wrong_is_its_own_error(server, texts, said):
    with TextClient(server.grpc_address) as client:
        code, message = status_of(client, texts)
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert said in message
    if isinstance(texts[0], str):
        status, body = post(server, asked(texts))
        assert (status, said in body.decode()) == (400, True)


def test_text_that_is_no_utf8_is_refused_over_http_too(server):
    header = json.dumps(
        {
            "inputs": [
                {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
            ]
        }
    ).encode()
    raw = b"\x02\0\0\0\xff\xfe"
    status, body = post(server, header + raw, {"Inference-Header-Content-Length": str(len(header))})
    assert (status, b"not valid UTF-8" in body) == (400, True)


def test_within_the_limits_large_requests_are_answered_as_ever(server, plan):
    texts = ["All work and no play makes a dull text. " * 4900, "a." * 90_000, "short"]
    with TextClient(server.grpc_address) as client:
        found = client.ask("tiny", CONTRACT, [{"TEXT": text} for text in texts])
    np.testing.assert_allclose(found, answers_of(plan, texts), rtol=0, atol=1e-6)


def test_others_do_not_wait_for_a_large_request(plan, triton_settings, tmp_path):
    publish(plan, tmp_path / "cpu", UNASKED)
    model, hold = tmp_path / "cpu" / "tiny__r1__pipeline" / "1" / "model.py", tmp_path / "hold"
    model.write_text(model.read_text() + SLOW.replace("HOLD", repr(str(hold))))
    long = "All work and no play makes a dull text. " * 4900
    with (
        EmbeddedServer(tmp_path / "cpu", triton_settings, models=["tiny"], log=tmp_path / "log") as server,
        TextClient(server.grpc_address) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        hold.touch()
        large = [pool.submit(client.ask, "tiny", CONTRACT, [{"TEXT": long}]) for _ in range(2)]
        time.sleep(0.1)
        for _ in range(20):
            client.ask("tiny", CONTRACT, [{"TEXT": "short"}])
        assert not any(one.done() for one in large)
        hold.unlink()
        for one in large:
            np.testing.assert_allclose(one.result()[0], answers_of(plan, [long])[0], rtol=0, atol=1e-6)
        # The server ends, and answers first what still waits.
        hold.touch()
        last = pool.submit(client.ask, "tiny", CONTRACT, [{"TEXT": long}])
        time.sleep(0.5)
        hold.unlink()
        server.__exit__()
        assert len(last.result()) == 1


def ask_hostile(triton_settings, folder, tasks, megabytes):
    """Every hostile text to every task: answered or refused, in time and memory that do not follow its size."""
    plans = {task: make_task_plan(folder / task, task) for task in tasks}
    for plan in plans.values():
        publish(plan, folder / "cpu", UNASKED)
    with (
        EmbeddedServer(folder / "cpu", triton_settings, models=tasks, log=folder / "log") as server,
        TextClient(server.grpc_address) as client,
        watched(server) as memory,
    ):
        for task in tasks:
            contract = client.contract(task)
            ask(client, task, contract, "warm")
            for item in TASKS[task].refused_items(plans[task].checkpoint.settings):
                with pytest.raises(ServerError) as caught:
                    client.ask(task, contract, [item])
                assert caught.value.__cause__.status() == "StatusCode.INVALID_ARGUMENT", item
            for kind, unit in KINDS.items():
                text, before = unit * (megabytes * 10**6 // len(unit.encode())), memory.now()
                memory.forget()
                begun = memory.processor_seconds()
                _, said = ask(client, task, contract, text)
                computed = memory.processor_seconds() - begun
                assert said in ("answered", "refused"), said
                assert said == "answered" or megabytes > 1 or kind not in ("words", "a."), (task, kind)
                # What it takes on a quiet machine tests.performance.hostile measures.
                assert computed < 2, (task, kind)
                grown = max((size - before.get(pid, 0) for pid, size in memory.most.items()), default=0)
                assert grown < 256 * 10**6 + len(text.encode()), (task, kind)


def test_hostile_texts_take_no_time_and_no_memory(triton_settings, tmp_path):
    ask_hostile(
        triton_settings, tmp_path, ["embedding", "token-classification", "fill-mask", "zero-shot-classification"], 1
    )


@pytest.mark.whole
@pytest.mark.parametrize("megabytes", [1, 10, 100])
def test_hostile_texts_take_no_time_and_no_memory_in_any_task(triton_settings, tmp_path, megabytes):
    ask_hostile(triton_settings, tmp_path, sorted(TASKS), megabytes)


def test_the_catalog_and_the_release_have_the_same_limits():
    assert LimitSettings().model_dump() == asdict(RequestLimits())


@contextmanager
def valid_requests(server, plan):
    """Right requests over both protocols while the context lasts. Raises where one failed, or was answered wrongly."""
    expected, stop = answers_of(plan, TEXTS), threading.Event()

    def keep_asking(protocol):
        address, done = server.grpc_address if protocol == "grpc" else server.http_address, 0
        with TextClient(address, protocol) as client:
            while not stop.is_set():
                found = client.ask("tiny", CONTRACT, [{"TEXT": text} for text in TEXTS])
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
                done += 1
                stop.wait(0.03)
        return done

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, protocol) for protocol in ("grpc", "http")]
        try:
            yield
        finally:
            stop.set()
        assert all(one.result() > 10 for one in asking)


def send_mutated(server, plan, seed, count):
    """How often each outcome came, of as many broken requests over HTTP and gRPC together."""
    import grpc

    mutations = Mutations(seed, {"tiny": ("TEXT",), "tiny__r1__pipeline": ("TEXT",)})
    outcomes = Counter()
    connection = http.client.HTTPConnection(server.http_address, timeout=20)
    with valid_requests(server, plan), grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for number in range(count):
            if number % 2:
                try:
                    call(mutations.grpc(), timeout=20)
                    outcomes["grpc OK"] += 1
                except grpc.RpcError as error:
                    outcomes[f"grpc {error.code().name}"] += 1
                    if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
                        outcomes[f"grpc said: {error.details()[:150]}"] += 1
                continue
            request = mutations.http()
            try:
                connection.request("POST", request.path, request.body, dict(request.headers))
                answer = connection.getresponse()
                outcomes[f"http {answer.status}"] += 1
                body = answer.read()
                if answer.status >= 500:
                    outcomes[f"http said: {body[:150]!r}"] += 1
            except (http.client.HTTPException, OSError) as error:
                outcomes[f"http {type(error).__name__}"] += 1
                connection.close()
                with suppress(OSError):
                    connection.connect()
    connection.close()
    assert not server.ended()
    return outcomes


def require_refused(outcomes, count):
    """Every broken request was answered, or refused as the client's error.

    But for JSON that Triton itself cannot read: it calls that its own error.
    """
    allowed = {"http 200", "http 400", "http 404", "grpc OK", "grpc INVALID_ARGUMENT", "grpc NOT_FOUND"}
    others = {name: times for name, times in outcomes.items() if name not in allowed}
    assert not [name for name in others if "ensemble" in name or "rror: " in name], others
    assert outcomes["http 400"] + outcomes["grpc INVALID_ARGUMENT"] > count // 4


def test_mutated_requests_fail_alone(server, plan):
    require_refused(send_mutated(server, plan, seed=0, count=2000), 2000)


@pytest.mark.whole
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_many_mutated_requests_fail_alone(server, plan, seed):
    require_refused(send_mutated(server, plan, seed, count=5000), 5000)
