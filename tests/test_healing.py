"""`refinery serve` when something breaks: processes are killed, models are unloaded, the server dies."""

import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from resources.errors import ServerError
from resources.triton import foreground, guard, health, supervise
from resources.triton.client import TextClient
from resources.triton.health import Health
from resources.triton.launch import new_prefix
from resources.triton.layout import CONFIG
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from resources.triton.stubs import Stubs, signal_text
from tests.checkpoints import MINILM_PACKAGE
from tests.conftest import entry_for
from tests.foreground import serving, wait_until
from tests.healing import kill_and_measure
from tests.pipeline import add_entry, run_job
from tests.releases import answers_of, ask_together, make_plan, make_task_plan, query_texts, unasked

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["How long should I boil the eggs?", "Eggs."]
#: What is promised on a machine that has little else to do, and what tests that run beside others allow.
BACK_SECONDS = 10.0
BUSY_BACK_SECONDS = 3 * BACK_SECONDS
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
#: Put at the end of a release's model.py. While the file FLAG is there, every execution takes three seconds.
SLOW = """
import os

_execute = TritonPythonModel.execute


def _slow(self, requests):
    if os.path.exists(FLAG):
        time.sleep(3)
    return _execute(self, requests)


TritonPythonModel.execute = _slow
"""


#: The same, of a process that did not react for a while: Triton says so once, and every answer after that comes one
#: request too late.
LATE = """
import os

_execute, _late = TritonPythonModel.execute, []


def _one_too_late(self, requests):
    responses = _execute(self, requests)
    if not _late and not os.path.exists(FLAG):
        return responses
    _late.extend(responses)
    if os.path.exists(FLAG):
        os.remove(FLAG)
        raise RuntimeError("it did not react")
    return [_late.pop(0) for _ in requests]


TritonPythonModel.execute = _one_too_late
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(tmp_path_factory.mktemp("plan"), seed=0)


@pytest.fixture(scope="module")
def repository(tmp_path_factory, plan):
    """A repository with a release. Not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "cpu"
    publish(plan, folder, Steps(prove=unasked))
    return folder


def extend(repository, code, flag, model="tiny"):
    """Add code to the model.py of a model's first release. FLAG in it is the path of a file."""
    file = repository / f"{model}__r1__pipeline" / "1" / "model.py"
    file.write_text(file.read_text() + code.replace("FLAG", repr(str(flag))))


def answered(address, plan):
    """Return whether the model answers, and rightly."""
    with suppress(ServerError):
        return np.allclose(query_texts(address, "tiny", TEXTS), answers_of(plan, TEXTS), rtol=0, atol=1e-6)
    return False


def back_after(served, plan, begun):
    """Seconds until the next right answer."""
    wait_until(lambda: answered(served.address, plan), 2 * BUSY_BACK_SECONDS)
    return time.monotonic() - begun


def segments(prefix="refinery-"):
    return {path for path in SHARED_MEMORY.iterdir() if path.name.startswith(prefix)}


def prefix_of(server):
    (option,) = [part for part in server.cmdline() if "shm-region-prefix-name=" in part]
    return option.split("=")[-1]


@pytest.fixture(scope="module")
def served(repository, triton_settings, tmp_path_factory):
    """`refinery serve` on that repository, whose download of a release takes as long as these tests."""
    downloading, enough = threading.Event(), threading.Event()

    def refresh():
        downloading.set()
        enough.wait(300)

    with serving(repository, triton_settings, tmp_path_factory.mktemp("serve") / "log", refresh=refresh) as found:
        assert downloading.wait(30)
        yield found
        enough.set()


def test_a_killed_process_of_a_model_is_replaced(served, plan):
    assert served.health() == (200, {"status": "ok"})
    for _ in range(2):
        seen, end = set(), threading.Event()

        def watch(seen=seen, end=end):
            while not end.is_set():
                seen.add(served.health()[0])

        watching = threading.Thread(target=watch)
        watching.start()
        said = len(served.said)
        begun = time.monotonic()
        (stub,) = served.stubs()
        stub.kill()
        wait_until(lambda said=said: len(served.said) > said)
        assert back_after(served, plan, begun) < BUSY_BACK_SECONDS
        end.set()
        watching.join()
        assert seen == {200, 503}
        (line,) = served.said[said:]
        assert "tiny: the process of tiny__r1__pipeline ended by signal 9 (SIGKILL); loaded again within" in line
        wait_until(lambda: served.health()[0] == 200)
    # One segment, and the supervisor's lock: the killed ones left nothing that others could read.
    assert len(segments(prefix_of(served.triton()))) == 2


@pytest.mark.parametrize("name", ["tiny", "tiny__r1__pipeline"])
def test_what_somebody_unloads_is_loaded_again(served, plan, name):
    said, begun = len(served.said), time.monotonic()
    with TextClient(served.address, connection=served.connection) as client:
        client.unload(name)
    wait_until(lambda: len(served.said) > said)
    assert back_after(served, plan, begun) < BUSY_BACK_SECONDS
    assert "loaded again within" in served.said[-1]
    wait_until(lambda: served.health()[0] == 200)


def nested(port):
    """200,000 nested brackets, which Triton 2.51 does not survive."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, suppress(OSError):
        body = b'{"inputs":' + b"[" * 200_000
        connection.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.recv(1024)


def chunked(port):
    """600,000 chunks of one byte."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, suppress(OSError):
        connection.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(60):
            connection.sendall(b"1\r\n \r\n" * 10_000)
        connection.sendall(b"0\r\n\r\n")
        connection.recv(1024)


def form(port):
    """5 MB that call themselves a form, as everything does that curl sends without saying otherwise."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection, suppress(OSError):
        text = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["ab " * 1_700_000]}
        with suppress(http.client.HTTPException):
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/v2/models/tiny/infer", json.dumps({"inputs": [text]}), kind)
            connection.getresponse()


def claimed(port):
    """A shape of more numbers than a vector can have, in 102 bytes."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection, suppress(OSError):
        tensor = {"name": "TEXT", "shape": [2**63 - 1, 1], "datatype": "INT32", "data": [1]}
        with suppress(http.client.HTTPException):
            connection.request("POST", "/v2/models/tiny/infer", json.dumps({"inputs": [tensor]}))
            connection.getresponse()


SEGMENTATION, ABORT = "11 (SIGSEGV)", "6 (SIGABRT)"
OTHERS = ((chunked, SEGMENTATION), (form, SEGMENTATION), (claimed, ABORT))


@pytest.mark.parametrize(
    ("attack", "signal"), [(nested, SEGMENTATION), *(pytest.param(*other, marks=pytest.mark.whole) for other in OTHERS)]
)
def test_a_request_that_kills_the_server_costs_seconds(served, plan, attack, signal):
    before, prefix, said = served.triton(), prefix_of(served.triton()), len(served.said)
    started = served.log.read_text(errors="replace").count("Started HTTPService")
    attack(served.ports.http)
    wait_until(lambda: not before.is_running())
    begun = time.monotonic()
    assert back_after(served, plan, begun) < BUSY_BACK_SECONDS
    line = f"the embedded Triton ended by signal {signal}; the embedded Triton is started again"
    assert line in served.said[said:]
    # The log keeps what the server before it said.
    assert served.log.read_text(errors="replace").count("Started HTTPService") == started + 1
    # The same ports, and the same key.
    with TextClient(served.address, connection=served.connection) as client:
        assert "tiny" in client.ready_models()
    wait_until(lambda: served.health()[0] == 200)
    assert not segments(prefix)


def test_a_process_whose_answers_come_too_late_is_replaced(triton_settings, tmp_path):
    """Also that of a model which refuses the guard's question: then somebody else's answer comes in place of that."""
    task, item = "zero-shot-classification", {"TEXT": "Eggs.", "LABELS": '["food", "sport"]'}
    publish(make_task_plan(tmp_path, task), tmp_path / "cpu", Steps(prove=unasked))
    extend(tmp_path / "cpu", LATE, tmp_path / "late", task)
    with serving(tmp_path / "cpu", triton_settings, tmp_path / "log") as served, TextClient(served.address) as client:
        contract, said = client.contract(task), len(served.said)
        right = client.ask(task, contract, [item])
        (tmp_path / "late").touch()
        with pytest.raises(ServerError, match="it did not react"):
            client.ask(task, contract, [item])
        wait_until(lambda: len(served.said) > said)
        assert f"{task}: it gave answers that belong to other requests, so its process was ended" in served.said[-1]
        assert client.ask(task, contract, [item]) == right


@pytest.mark.whole
def test_a_process_that_did_not_react_is_replaced(repository, plan, triton_settings, tmp_path):
    """Triton gives the next request the answer that came too late, so the process must not go on."""
    with serving(repository, triton_settings, tmp_path / "log") as served:
        (stub,) = served.stubs()
        stub.suspend()
        assert not answered(served.address, plan)
        stub.resume()
        begun, said = time.monotonic(), len(served.said)
        wait_until(lambda: len(served.said) > said)
        assert re.search(
            r"tiny: (it gave answers|Triton says|the process of .* ended by).*; loaded again within", served.said[-1]
        )
        assert answered(served.address, plan)
        assert time.monotonic() - begun < BUSY_BACK_SECONDS


@pytest.mark.whole
def test_requests_that_are_slow_or_refused_repair_nothing(repository, plan, triton_settings, tmp_path):
    slow = shutil.copytree(repository, tmp_path / "models" / "cpu")
    extend(slow, SLOW, tmp_path / "slow")
    with serving(slow, triton_settings, tmp_path / "log") as served, TextClient(served.address) as client:
        said, stubs = list(served.said), served.stubs()
        (tmp_path / "slow").touch()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: ask_together(client, [text]), TEXTS * 2))
            refused = pool.submit(ask_together, client, [b"\xff"])
            with pytest.raises(ServerError, match="UTF-8"):
                refused.result()
        time.sleep(3)
        assert len(answers) == 4
        assert (served.said, served.stubs()) == (said, stubs)
        assert served.health()[0] == 200


@pytest.mark.whole
def test_after_many_repairs_the_server_is_started_again(repository, plan, triton_settings, tmp_path, monkeypatch):
    """Triton keeps what belonged to a killed process, which would fill the shared memory of a container."""
    monkeypatch.setattr(guard, "MOST_REPAIRS", 1)
    with serving(repository, triton_settings, tmp_path / "log") as served:
        server = served.triton()
        for _ in range(2):
            begun, said = time.monotonic(), len(served.said)
            served.stubs()[0].kill()
            wait_until(lambda said=said: len(served.said) > said)
            back_after(served, plan, begun)
        assert "and 1 repairs have left memory behind; the embedded Triton is started again" in served.said[-3]
        assert served.triton() != server
        assert time.monotonic() - begun < BUSY_BACK_SECONDS


@pytest.mark.whole
def test_a_model_is_repaired_in_poll_mode_too(repository, plan, triton_settings, tmp_path):
    with serving(repository, triton_settings, tmp_path / "log", control="poll") as served:
        begun = time.monotonic()
        served.stubs()[0].kill()
        wait_until(lambda: any("started again" in line for line in served.said))
        assert back_after(served, plan, begun) < BUSY_BACK_SECONDS


@pytest.mark.whole
def test_in_poll_mode_a_new_server_does_not_wait_for_models_that_have_gone(repository, plan, triton_settings, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "models" / "cpu")
    publish(make_plan(tmp_path / "plan", model="other"), folder, Steps(prove=unasked))
    with serving(folder, triton_settings, tmp_path / "log", control="poll") as served:
        for path in (folder / "other", folder / "other__r1__pipeline"):
            path.rename(tmp_path / path.name)
        begun = time.monotonic()
        served.triton().kill()
        assert back_after(served, plan, begun) < BUSY_BACK_SECONDS
        wait_until(lambda: served.health()[0] == 200)


@pytest.mark.whole
def test_a_server_that_cannot_start_again_is_given_up(repository, triton_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(foreground, "PAUSES_SECONDS", (0.0, 0.2))
    monkeypatch.setattr(foreground, "MOST_ATTEMPTS", 3)
    broken = repository.parent / "broken"
    shutil.copytree(repository, broken)
    with (
        pytest.raises(ServerError, match="No model of .* could be loaded"),
        serving(broken, triton_settings, tmp_path / "log") as served,
    ):
        (broken / "tiny" / CONFIG).rename(broken / "kept")
        (broken / "tiny" / CONFIG).write_text((broken / "kept").read_text().replace("__r1__", "__r7__"))
        served.triton().kill()
        wait_until(lambda: sum("could not be started again" in line for line in served.said) == 2)
        status, problems = served.health()
        assert (status, problems["server"]) == (503, "the embedded Triton ended by signal 9 (SIGKILL)")


def test_shared_memory_is_closed_to_others_before_the_first_request(repository, plan, triton_settings, tmp_path):
    """Also that of a model which is loaded later, and nothing is left of any, however the server ends."""
    with EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "log") as server:
        (triton,) = [one for one in psutil.Process(server.pid).children() if one.name() == "tritonserver"]
        prefix = prefix_of(triton)
        for loaded_later in (False, True):
            if loaded_later:
                with server.client() as client:
                    client.unload("tiny__r1__pipeline")
                    wait_until(lambda: not any("stub" in one.name() for one in triton.children()))
                    client.load("tiny__r1__pipeline")
                    client.load("tiny")
            assert len(segments(prefix)) == 2
            assert {stat.S_IMODE(path.stat().st_mode) for path in segments(prefix)} == {0o600}
        triton.kill()
        wait_until(server.ended)
        assert not segments(prefix)


def test_what_a_killed_supervisor_leaves_goes_with_the_next_start(repository, triton_settings, tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from resources.triton.server import EmbeddedServer
from resources.triton.stubs import Stubs, signal_text
from resources.settings.triton import TritonSettings
settings = TritonSettings(environment=Path({str(triton_settings.environment)!r}))
with EmbeddedServer(Path({str(repository)!r}), settings, models=["tiny"], log=Path({str(tmp_path / "log")!r})) as s:
    print(s.pid, flush=True)
    time.sleep(120)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        supervisor = psutil.Process(int(caller.stdout.readline()))
        family = supervisor.children(recursive=True)
        prefix = prefix_of(next(one for one in family if one.name() == "tritonserver"))
        for process in (supervisor, *family):
            process.kill()
        caller.kill()
    psutil.wait_procs(family, 30)  # a server of another test may already have removed what they left
    # Of another user's making: not ours to remove, and no way to change a file through it.
    victim = tmp_path / "victim"
    victim.write_text("")
    victim.chmod(0o644)
    with EmbeddedServer(repository, triton_settings, models=[], log=tmp_path / "log") as server:
        assert not segments(prefix)
        (triton,) = [one for one in psutil.Process(server.pid).children() if one.name() == "tritonserver"]
        link = SHARED_MEMORY / f"{prefix_of(triton)}-link"
        link.symlink_to(victim)
        (SHARED_MEMORY / f"{prefix_of(triton)}-file").write_text("")
        wait_until(lambda: stat.S_IMODE((SHARED_MEMORY / f"{prefix_of(triton)}-file").stat().st_mode) == 0o600)
        assert stat.S_IMODE(victim.stat().st_mode) == 0o644


def test_the_health_address(unused_port):
    def ask(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", unused_port, timeout=5)
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    with Health(unused_port) as served:
        assert ask("GET", "/health")[0] == 503
        served.show({"tiny": "its process ended"})
        assert ask("GET", "/health") == (503, b'{"status": "unavailable", "tiny": "its process ended"}')
        served.show({})
        assert ask("GET", "/health?from=balancer") == (200, b'{"status": "ok"}')
        assert ask("HEAD", "/health") == (200, b"")
        assert ask("POST", "/health")[0] == 405
        assert ask("GET", "/")[0] == 404
        # Whoever sends a byte now and then is not listened to for ever, and does not keep others waiting.
        with socket.create_connection(("127.0.0.1", unused_port)) as slow:
            begun = time.monotonic()
            with suppress(OSError):
                while time.monotonic() - begun < 60:
                    slow.sendall(b"G")
                    assert ask("GET", "/health")[0] == 200
                    time.sleep(0.3)
            assert time.monotonic() - begun < 30
        with pytest.raises(ServerError, match=f"Port {unused_port} .* --health-port"), Health(unused_port):
            pass


def test_the_health_address_has_few_connections_at_a_time(unused_port, monkeypatch):
    monkeypatch.setattr(health, "_MOST_OPEN", 3)
    monkeypatch.setattr(health, "_REQUEST_SECONDS", 60.0)
    with Health(unused_port), ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", unused_port), timeout=30)) for _ in range(5)]
        assert [one.recv(1) for one in held[3:]] == [b"", b""]
        held[0].sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert held[0].recv(1024).startswith(b"HTTP/1.1 503 ")


def test_shared_memory_is_closed_to_others_where_the_kernel_watches_nothing_more(monkeypatch):
    """The user's inotify watches are used up, by an editor say."""
    prefix = new_prefix()
    kernel = ctypes.CDLL(None)
    monkeypatch.setattr(supervise.ctypes, "CDLL", lambda name: kernel)
    monkeypatch.setattr(kernel, "inotify_add_watch", lambda *arguments: -1)
    found = supervise.Segments(prefix)
    threading.Thread(target=found.close_on, daemon=True).start()
    try:
        path = SHARED_MEMORY / f"{prefix}-file"
        path.write_text("")
        wait_until(lambda: stat.S_IMODE(path.stat().st_mode) == 0o600)
    finally:
        supervise.remove_segments(prefix)


def start_stub(folder):
    """A process that looks like that of a model m."""
    model = folder / "m" / "1" / "model.py"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_text("import time\ntime.sleep(60)\n")
    command = [str(folder / "triton_python_backend_stub"), str(model), "no region"]
    return subprocess.Popen(command, executable=sys.executable)


def test_a_death_is_not_forgotten_and_an_end_in_good_order_is_none(tmp_path):
    stubs = Stubs(os.getpid())
    with start_stub(tmp_path) as died:
        stubs.search()
        died.kill()
        wait_until(lambda: psutil.Process(died.pid).status() == psutil.STATUS_ZOMBIE)
        stubs.search()  # as after the repair of another model
        assert stubs.lost() == {"m": "ended by signal 9 (SIGKILL)"}
        assert stubs.lost() == {}
    with start_stub(tmp_path) as before, start_stub(tmp_path) as after:
        stubs.search()
        before.kill()
        before.wait()  # as Triton does when it unloads a model, also where it loads that again meanwhile
        assert stubs.lost() == {}
        after.kill()
        wait_until(lambda: psutil.Process(after.pid).status() == psutil.STATUS_ZOMBIE)
        assert stubs.lost() == {"m": "ended by signal 9 (SIGKILL)"}


@pytest.mark.whole
def test_fifty_kills_under_load(workspace, triton_settings, tmp_path):
    """all-MiniLM-L6-v2 under 8 clients: each time the first good answer comes within 10 s."""
    ready = replace(workspace, triton=triton_settings)
    add_entry(ready, entry_for(MINILM_PACKAGE, shapes=["1x16"], engines=["onnxruntime_fp32"], max_batch_size=32))
    assert run_job(ready, "tiny").success
    took = kill_and_measure(
        ready.repository("cpu"), "tiny", triton_settings, tmp_path / "log", texts=TEXTS, kills=50, clients=8
    )
    print(f"back after {np.median(took):.1f} s, at most {max(took):.1f} s")
    assert max(took) < BACK_SECONDS


def test_signals_have_names():
    assert signal_text(signal.SIGSEGV) == "signal 11 (SIGSEGV)"
    assert signal_text(99) == "signal 99"
