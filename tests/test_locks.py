"""File locks between processes: shared by builders, held alone by a benchmark, and never left behind by the dead."""

import os
import pwd
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event, Thread

import pytest

from resources.errors import LockError
from resources.machine import lock
from resources.machine.lock import benchmarking, building
from resources.storage import locks
from resources.storage.locks import file_lock, holders

HOLDER = """
import sys, time
from pathlib import Path
from resources.storage.locks import file_lock
with file_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "a.lock"


@pytest.fixture
def hold(path):
    """Hold the lock in a process of its own, which is killed at the end if not before."""
    started = []

    def start(how):
        command = [sys.executable, "-c", HOLDER, str(path), how]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def is_free(path, how):
    try:
        with file_lock(path, shared=how == "shared", timeout_s=0):
            return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("held", "wanted", "free"),
    [
        ("alone", "alone", False),
        ("alone", "shared", False),
        ("shared", "alone", False),
        ("shared", "shared", True),
    ],
)
def test_many_may_share_or_one_has_it_alone(path, hold, held, wanted, free):
    holder = hold(held)
    assert is_free(path, wanted) is free
    holder.kill()
    holder.wait()
    assert is_free(path, "alone")


def test_free_again_after_an_error(path):
    with pytest.raises(ValueError, match="inside"), file_lock(path):
        raise ValueError("inside")
    assert is_free(path, "alone")


def test_waiting_is_announced_once_and_ends(path, hold):
    holder = hold("alone")
    said = []
    lock = file_lock(path, timeout_s=0.3, waiting=said.append)
    with pytest.raises(TimeoutError, match=rf"a\.lock is held by process {holder.pid} \(python"), lock:
        pass
    assert said == [f"process {holder.pid} (python a.lock alone) of {pwd.getpwuid(os.getuid()).pw_name}"]


def test_all_who_share_a_lock_are_named_without_their_secrets(path, hold):
    first, second = hold("shared"), hold("shared")
    assert {int(pid) for pid in re.findall(r"process (\d+) \(", holders(path))} == {first.pid, second.pid}
    secret = [sys.executable, "-c", HOLDER.replace("sys.argv[2]", "'alone'"), str(path), "--password", "KEY=hidden"]
    for process in (first, second):
        process.kill()
        process.wait()
    with subprocess.Popen([*secret, "s3://user:hidden@host"], stdout=subprocess.PIPE, text=True) as last:
        assert last.stdout.readline() == "held\n"
        assert f"process {last.pid} (" in holders(path)
        assert "hidden" not in holders(path)
        last.kill()
    assert holders(path) == "another process"


def test_who_waits_long_is_told_for_whom(path, hold, caplog, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.1)
    holder = hold("alone")
    with pytest.raises(TimeoutError), file_lock(path, timeout_s=0.3):
        pass
    (said,) = caplog.messages
    assert said.startswith(f"waiting for {path}, which is held by process {holder.pid} (")


def test_free_locks_announce_nothing(path):
    said = []
    with file_lock(path, waiting=said.append):
        pass
    assert said == []


def test_a_lock_file_that_was_tidied_away_does_not_let_two_in(path):
    waits, has_it = Event(), Event()

    def wait_for_it():
        with file_lock(path, timeout_s=20, waiting=lambda who: waits.set()):
            has_it.set()

    first = file_lock(path)
    first.__enter__()
    waiter = Thread(target=wait_for_it)
    waiter.start()
    assert waits.wait(10)
    path.unlink()
    with file_lock(path):
        first.__exit__(None, None, None)
        assert not has_it.wait(0.5)
    assert has_it.wait(10)
    waiter.join()


def test_every_user_may_take_it(path):
    previous = os.umask(0o077)
    try:
        with file_lock(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
    finally:
        os.umask(previous)


def test_a_link_in_its_place_is_not_followed(path, tmp_path):
    path.parent.mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"a\.lock"), file_lock(path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_builds_run_together_and_benchmarks_alone(path, monkeypatch):
    monkeypatch.setattr(lock, "MACHINE_LOCK", path)
    with building():
        assert is_free(path, "shared")
        assert not is_free(path, "alone")
    with benchmarking():
        assert not is_free(path, "shared")


def test_a_benchmark_that_waits_lets_no_further_build_begin(path, monkeypatch):
    monkeypatch.setattr(lock, "MACHINE_LOCK", path)
    order = []

    def take(how, name):
        with how():
            order.append(name)

    first = Thread(target=take, args=(benchmarking, "benchmark"))
    second = Thread(target=take, args=(building, "build"))
    with building():
        first.start()
        for _ in range(1000):
            if not is_free(path.with_suffix(".gate"), "shared"):  # it waits
                break
            first.join(0.01)
        second.start()
        second.join(0.3)
        assert order == []
    first.join(10)
    second.join(10)
    assert order == ["benchmark", "build"]


def closed(path):
    """As another user's file of mode 0600 is."""
    path.touch()
    path.chmod(0)


#: What another user may put into the place of the machine's lock or its gate, whose folder everybody may write in.
SPOILED = {
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a link to a lock": lambda path: [path.with_name("other.lock").touch(), path.symlink_to("other.lock")],
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a closed file": closed,
}


@pytest.fixture
def machine(monkeypatch):
    """The machine's lock, in a folder for everybody, and this user's own. Root opens any file, so it is nobody here.

    The folders of pytest are closed to nobody, so these lie beside them.
    """
    with tempfile.TemporaryDirectory(prefix="refinery-locks-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        for part in ("tmp", "home"):
            (folder / part).mkdir()
            (folder / part).chmod(0o777)
        monkeypatch.setattr(lock, "MACHINE_LOCK", folder / "tmp" / "machine.lock")
        monkeypatch.setattr(lock, "_own_lock", lambda: folder / "home" / "own" / "machine.lock")
        monkeypatch.setattr(lock, "_TOLD", set())
        yield folder / "tmp" / "machine.lock"


@pytest.mark.parametrize("name", ["machine.lock", "machine.gate"])
@pytest.mark.parametrize("spoil", SPOILED)
def test_what_another_user_puts_into_the_place_of_the_machines_lock_stops_nobody(machine, caplog, spoil, name):
    SPOILED[spoil](machine.with_name(name))
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        with building():
            assert is_free(lock._own_lock(), "shared")
            assert not is_free(lock._own_lock(), "alone")
        with benchmarking():
            assert not is_free(lock._own_lock(), "shared")
    finally:
        os.seteuid(os.getuid())
    (said,) = caplog.messages  # once
    assert said.startswith(f"{machine.with_name(name)} cannot be used as a lock (")
    assert "Have it removed" in said
    assert not (machine.parent / "elsewhere").exists()


def test_a_lock_of_another_user_that_may_only_be_read_is_as_good(machine):
    machine.touch(mode=0o644)
    machine.with_suffix(".gate").touch(mode=0o644)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        with benchmarking():
            assert not is_free(machine, "shared")
    finally:
        os.seteuid(os.getuid())


def test_where_there_can_be_no_lock_at_all_the_error_is_ours(machine, monkeypatch):
    machine.mkdir()
    (machine.parents[1] / "file").touch()
    monkeypatch.setattr(lock, "_own_lock", lambda: machine.parents[1] / "file" / "machine.lock")
    with pytest.raises(LockError, match="cannot be held: .*Check that its folder can be written"), building():
        pass
