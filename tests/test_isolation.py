"""Children with limits: whatever happens to one costs its own result, and none outlives its parent."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from resources.errors import EngineError, IsolationError
from resources.isolation import Limits, Worker, run_isolated

LIMITS = Limits(timeout_s=60, memory_bytes=4 * 10**9)


class Held:
    """What a worker holds in these tests."""

    def __init__(self, start=0):
        self.total = start

    def add(self, number):
        self.total += number
        return self.total

    def process(self):
        return os.getpid()


def run(function, *args, **limits):
    return run_isolated(function, *args, limits=Limits(**{**LIMITS.__dict__, **limits}), what="the work")


def add(first, second):
    return first + second


def segfault():
    ctypes.string_at(0)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(7)


def sleep(seconds):
    time.sleep(seconds)


def fill(size):
    data = bytearray(os.urandom(1024) * (size // 1024))
    time.sleep(20)
    return len(data)


def refuse():
    raise EngineError("m: the engine is wrong")


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("cannot travel")
        self.handle = lambda: None


def raise_unpicklable():
    raise Unpicklable


def print_much():
    print("x" * 100_000)
    print("y" * 100_000, file=sys.stderr)
    os.write(1, b"from C")
    return 1


def return_unpicklable():
    return lambda: None


def test_result_and_peak_memory():
    result, peak = run(add, 2, 3)
    assert result == 5
    assert peak > 10_000_000


def test_a_worker_keeps_its_object_between_calls_in_a_process_of_its_own():
    with Worker(Held, 10, limits=LIMITS, what="holding") as worker:
        assert worker.call("add", 5) == 15
        assert worker.call("add", 5) == 20
        assert worker.call("process") == worker.pid != os.getpid()
        pid = worker.pid
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("function", "args", "limits", "message"),
    [
        (segfault, (), {}, r"the work: its process was ended by SIGSEGV"),
        (kill_self, (), {}, r"ended by SIGKILL; often the kernel's answer to too little memory"),
        (leave, (), {}, r"exit code 7 and without an answer"),
        (sleep, (30,), {"timeout_s": 1}, r"stopped after its limit of 1 s.*REFINERY_STEP_SECONDS"),
        (fill, (10**9,), {"memory_bytes": 700_000_000}, r"GB of memory, over its limit of 0\.70 GB"),
        (raise_unpicklable, (), {}, r"the work: Unpicklable: cannot travel"),
        (return_unpicklable, (), {}, r"the work: .*(pickle|local object)"),
    ],
)
def test_what_can_go_wrong_is_an_isolation_error(function, args, limits, message):
    with pytest.raises(IsolationError, match=message):
        run(function, *args, **limits)


def test_our_own_errors_travel_as_they_are():
    with pytest.raises(EngineError, match="^m: the engine is wrong$") as caught:
        run(refuse)
    assert not isinstance(caught.value, IsolationError)


def test_a_worker_that_failed_once_goes_on():
    with Worker(Held, limits=LIMITS, what="holding") as worker:
        with pytest.raises(IsolationError, match="TypeError"):
            worker.call("add", "text")
        assert worker.call("add", 1) == 1


def test_output_goes_to_the_log_and_not_to_us(tmp_path, capfd):
    result, _ = run_isolated(print_much, limits=LIMITS, what="printing", log=tmp_path / "child.log")
    assert result == 1
    text = (tmp_path / "child.log").read_text()
    assert text.count("x") >= 100_000
    assert "from C" in text
    assert capfd.readouterr().out == ""


def test_children_start_from_a_warm_server():
    run(add, 1, 1)
    seconds, _ = run(import_time)
    # Importing torch takes seconds; a forked child has it already.
    assert seconds < 0.5


def import_time():
    started = time.perf_counter()
    import torch

    assert torch.__name__ == "torch"
    return time.perf_counter() - started


ORPHAN = """
import sys, time
from resources.isolation import Limits, Worker
from tests.test_isolation import Held, sleep
if __name__ == "__main__":
    worker = Worker(Held, limits=Limits(timeout_s=60), what="orphan")
    print(worker.pid, flush=True)
    worker.call("add", 1)
    from resources.isolation import run_isolated
    run_isolated(sleep, 60, limits=Limits(timeout_s=120), what="sleeping")
"""


def test_no_child_outlives_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    child = int(parent.stdout.readline())
    family = [psutil.Process(child)]
    deadline = time.monotonic() + 20
    while len(family) < 4 and time.monotonic() < deadline:  # the server, its helper, and both children
        family = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(0.1)
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    assert len(gone) >= 3
