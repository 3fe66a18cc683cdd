"""Children with limits: whatever happens to one costs its own result, and none outlives its parent."""

import ctypes
import gc
import os
import signal
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from resources.errors import EngineError, IsolationError
from resources.processes import memory
from resources.processes.isolation import Limits, Worker, run_isolated

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


def hold(seconds, mark=None):
    """Native code that keeps the interpreter to itself, as some exporters and builders do."""
    if mark is not None:
        Path(mark).touch()
    ctypes.PyDLL(None).sleep(seconds)


def fill(size):
    data = bytearray(os.urandom(1024) * (size // 1024))
    time.sleep(20)
    return len(data)


#: A process of the child's own, which says which it is and then takes that much memory.
GRANDCHILD = """
import os, sys, time
from pathlib import Path
score = Path("/proc/self/oom_score_adj").read_text().strip()
Path(sys.argv[1]).write_text(f"{os.getpid()} {score}")
data = bytearray(os.urandom(1024) * (int(sys.argv[2]) // 1024))
time.sleep(60)
"""


def start_grandchild(note, size, *, end=None, session=False):
    """Start one, and wait for it; `end`: what this process does once it is there."""
    subprocess.Popen([sys.executable, "-c", GRANDCHILD, str(note), str(size)], start_new_session=session)
    while not note.exists() or " " not in note.read_text():
        time.sleep(0.02)
    if end is not None:
        end()
    time.sleep(30)


def is_gone(pid):
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


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


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


def return_unreadable():
    return Unreadable()


def answer_half():
    """Die in the middle of an answer, as when memory runs out while it is sent."""
    pipes = [item for item in gc.get_objects() if isinstance(item, Connection) and item.writable and not item.closed]
    os.write(pipes[0].fileno(), struct.pack("!i", 100) + b"half")
    os._exit(3)


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
        (kill_self, (), {}, r"ended by SIGKILL; the kernel often does this when memory runs out"),
        (leave, (), {}, r"exit code 7 and without an answer"),
        (hold, (30,), {"timeout_s": 1}, r"stopped after its limit of 1 s.*REFINERY_STEP_SECONDS"),
        (fill, (10**9,), {"memory_bytes": 700_000_000}, r"GB of memory, over its limit of 0\.70 GB"),
        (raise_unpicklable, (), {}, r"the work: Unpicklable: cannot travel"),
        (return_unpicklable, (), {}, r"the work: .*(pickle|local object)"),
        (return_unreadable, (), {}, r"the work: its answer cannot be read: ValueError: invalid literal"),
        (answer_half, (), {}, r"exit code 3 and without an answer"),
        (add, (1, lambda: 2), {}, r"the work: its arguments cannot be sent to a child process: .*lambda"),
        (sys.exit, (4,), {}, r"the work: SystemExit: 4"),
    ],
)
def test_what_can_go_wrong_is_an_isolation_error(function, args, limits, message):
    with pytest.raises(IsolationError, match=message):
        run(function, *args, **limits)


@pytest.mark.parametrize(
    ("size", "end", "session", "message"),
    [
        (10**9, None, False, r"GB of memory, over its limit of 0\.70 GB"),
        (10**9, None, True, r"GB of memory, over its limit of 0\.70 GB"),
        (10, segfault, False, "ended by SIGSEGV"),
        (10, None, False, "stopped after its limit of 5 s"),
    ],
)
def test_what_the_child_starts_counts_and_ends_with_it(tmp_path, size, end, session, message):
    limits = Limits(timeout_s=5 if "5 s" in message else 60, memory_bytes=700_000_000)
    with pytest.raises(IsolationError, match=message), Worker(Starter, limits=limits, what="the work") as worker:
        worker.call("start", tmp_path / "note", size, end, session)
    pid, score = (tmp_path / "note").read_text().split()
    assert is_gone(int(pid))
    assert score == "1000"  # the kernel takes it first
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"


class Starter:
    def start(self, note, size, end, session):
        start_grandchild(note, size, end=end, session=session)


def fork_with_memory():
    """What this process takes, and what it takes together with three that share its pages."""
    data = bytearray(os.urandom(1024) * 200_000)
    forked = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        forked.append(pid)
    own = psutil.Process().memory_info().rss
    assert len(data) < own
    assert set(forked) == set(memory.descendants(os.getpid()))
    return own, memory.tree_bytes(os.getpid(), limit=own)


def test_pages_that_processes_share_count_once():
    """A child that forks does not take its memory again."""
    (own, together), _ = run(fork_with_memory)
    assert together < own + 200_000_000


GB = 10**9
CGROUPS = {
    "version 2": ("0::/user/run", "0 0 0:1 / {top} rw - cgroup2 cgroup2 rw", {"user/run/memory.max": 4 * GB}),
    "version 2, one around it": (
        "0::/user/run",
        "0 0 0:1 / {top} rw - cgroup2 cgroup2 rw",
        {"user/run/memory.max": "max", "user/memory.max": 3 * GB, "memory.max": 5 * GB},
    ),
    "version 2, in a container": ("0::/", "0 0 0:1 / {top} rw - cgroup2 cgroup2 rw", {"memory.max": 2 * GB}),
    "version 2, seen from outside": ("0::/../../x", "0 0 0:1 / {top} rw - cgroup2 cgroup2 rw", {"memory.max": 2 * GB}),
    "version 1": (
        "4:cpu,cpuacct:/\n3:memory:/a/b",
        "0 0 0:1 / /none rw - cgroup cgroup rw,cpu,cpuacct\n0 0 0:2 / {top} rw - cgroup cgroup rw,memory",
        {"a/b/memory.limit_in_bytes": 9223372036854771712, "a/memory.limit_in_bytes": 2 * GB},
    ),
    "version 1, in a container": (
        "3:memory:/docker/1",
        "0 0 0:2 /docker/1 {top} rw - cgroup cgroup rw,memory",
        {"memory.limit_in_bytes": 3 * GB},
    ),
    "version 1, unlimited": (
        "3:memory:/",
        "0 0 0:2 / {top} rw - cgroup cgroup rw,memory",
        {"memory.limit_in_bytes": 9223372036854771712},
    ),
    "none": ("", "", {}),
    "damaged": ("0::/", "0 0 0:1 / {top} rw - cgroup2 cgroup2 rw", {"memory.max": "x"}),
}


@pytest.mark.parametrize("kind", CGROUPS)
def test_the_default_limit_is_most_of_what_the_machine_or_its_container_has(tmp_path, kind):
    own, mounts, files = CGROUPS[kind]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(own)
    (tmp_path / "proc" / "self" / "mountinfo").write_text(mounts.format(top=tmp_path / "top"))
    for name, value in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(f"{value}\n")
    limits = [value for value in files.values() if isinstance(value, int)]
    assert memory.available_bytes(tmp_path / "proc") == min(psutil.virtual_memory().total, *limits, 2**62)


def test_the_default_limit_is_that_of_the_cgroup_that_we_run_in():
    machine = psutil.virtual_memory().total
    assert Limits().memory_bytes == int(0.8 * memory.available_bytes()) <= 0.8 * machine
    group = Path("/sys/fs/cgroup/memory")
    file = group / f"refinery-test-{os.getpid()}" / "memory.limit_in_bytes"
    try:
        file.parent.mkdir()
        file.write_text(str(GB))
    except OSError:
        pytest.skip("making a cgroup needs root and version 1 of them, mounted to be written")
    code = "import os; from pathlib import Path; from resources.processes.isolation import Limits\n"
    code += f"Path({str(file.parent)!r}, 'cgroup.procs').write_text(str(os.getpid())); print(Limits().memory_bytes)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert abs(int(done.stdout) - 0.8 * GB) < 10**5
    finally:
        file.parent.rmdir()


def test_what_the_child_cannot_import_is_named(monkeypatch):
    module = ModuleType("only_here")
    exec("def work(): pass", module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(IsolationError, match="ModuleNotFoundError: No module named 'only_here'"):
        run(module.work)


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
    log = tmp_path / "logs" / "child.log"
    for _ in range(2):
        result, _ = run_isolated(print_much, limits=LIMITS, what="printing", log=log)
        assert result == 1
    text = log.read_text()
    assert text.count("x" * 100_000) == text.count("y" * 100_000) == text.count("from C") == 2
    assert capfd.readouterr() == ("", "")


def test_children_start_with_the_heavy_modules_loaded():
    heavy = ["torch", "transformers", "onnxruntime", "onnxscript"]
    assert run(loaded, *heavy)[0] == heavy


def loaded(*names):
    return [name for name in names if name in sys.modules]


# Scripts as people write them: without `if __name__ == "__main__"`. Nothing is preloaded, so that they start at once.
HEAD = """
import sys
from pathlib import Path
import psutil
from resources.processes import isolation
from resources.errors import IsolationError
from resources.processes.isolation import Limits, Worker, run_isolated
from tests.test_isolation import Held, hold
isolation.PRELOAD = ()
worker = Worker(Held, limits=Limits(timeout_s=60), what="idle")
"""
BUSY = "run_isolated(hold, 60, sys.argv[1], limits=Limits(timeout_s=120), what='busy')"
SERVER = """
server = psutil.Process(worker.pid).parent()
child = psutil.Process(worker.pid)
server.kill()
gone, alive = psutil.wait_procs([child], timeout=15)
assert not alive, alive
try:
    worker.call("add", 1)
except IsolationError as error:
    print(error)
with Worker(Held, 5, limits=Limits(timeout_s=60), what="next") as worker:
    print(worker.call("add", 1))
"""


def start_script(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(HEAD + text)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(tmp_path / "busy")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_no_child_outlives_its_parent(tmp_path, how):
    """One child is idle, the other inside native code that never lets Python run."""
    parent = start_script(tmp_path, BUSY)
    deadline = time.monotonic() + 30
    while not (tmp_path / "busy").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 4  # multiprocessing's resource tracker and server, and both children
    if how == "killed":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)
    parent.communicate(timeout=30)
    assert parent.returncode == (-signal.SIGKILL if how == "killed" else -signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def test_children_end_with_their_server_and_the_next_gets_a_new_one(tmp_path):
    output, _ = start_script(tmp_path, SERVER).communicate(timeout=60)
    assert output.splitlines() == ["idle: its process ended with exit code 255 and without an answer.", "6"]


# Ctrl-C reaches the whole group: while the server imports, and after a child is asked for but not told what to do.
INTERRUPTED = """
import os, signal, threading
from multiprocessing import forkserver
from resources.processes.isolation import Limits, run_isolated
connect = forkserver.connect_to_new_process
def interrupted(fds):
    connect(fds)
    os.killpg(0, signal.SIGINT)
try:
    %s
    run_isolated(abs, -1, limits=Limits(timeout_s=60), what="abs")
except KeyboardInterrupt:
    print("interrupted")
"""


def run_script(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "when",
    ["threading.Timer(0.5, os.killpg, (0, signal.SIGINT)).start()", "forkserver.connect_to_new_process = interrupted"],
    ids=["while the server imports", "before a child knows its work"],
)
def test_an_interrupted_start_prints_nothing(tmp_path, when):
    done = run_script(tmp_path, INTERRUPTED % when)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


ABANDONED = """
import multiprocessing.forkserver, multiprocessing.reduction, os
from resources.processes.isolation import Limits, Worker, run_isolated
send, limits = multiprocessing.reduction.sendfds, Limits(timeout_s=60)
def interrupted(client, fds):
    multiprocessing.reduction.sendfds = send
    raise KeyboardInterrupt
with Worker(int, 0, limits=limits, what="other") as other:
    multiprocessing.reduction.sendfds = interrupted
    try:
        run_isolated(abs, -1, limits=limits, what="abs")
    except KeyboardInterrupt:
        print("interrupted")
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    print(run_isolated(os.getppid, limits=limits, what="next")[0] == server, other.call("__add__", 6))
"""


def test_a_parent_that_leaves_before_it_asks_harms_no_other_child(tmp_path):
    done = run_script(tmp_path, ABANDONED)
    assert (done.stdout, done.stderr) == ("interrupted\nTrue 6\n", "")


def test_a_log_that_cannot_be_written_is_the_error(tmp_path):
    """The disk is full, say; here a folder is where the file should be."""
    (tmp_path / "step.log").mkdir()
    with pytest.raises(IsADirectoryError, match=r"step\.log"):
        run_isolated(
            os.getpid, limits=Limits(timeout_s=60, memory_bytes=10**9), what="a step", log=tmp_path / "step.log"
        )
