"""File locks between processes: shared by builders, held alone by a benchmark, and never left behind by the dead."""

import os
import stat
import subprocess
import sys
from threading import Event, Thread

import pytest

from resources import locks
from resources.locks import benchmarking, building, file_lock

HOLDER = """
import sys, time
from pathlib import Path
from resources.locks import file_lock
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
    hold("alone")
    said = []
    lock = file_lock(path, timeout_s=0.3, waiting=lambda: said.append("waiting"))
    with pytest.raises(TimeoutError, match=r"a\.lock is held by another process"), lock:
        pass
    assert said == ["waiting"]


def test_free_locks_announce_nothing(path):
    said = []
    with file_lock(path, waiting=lambda: said.append("waiting")):
        pass
    assert said == []


def test_a_lock_file_that_was_tidied_away_does_not_let_two_in(path):
    waits, has_it = Event(), Event()

    def wait_for_it():
        with file_lock(path, timeout_s=20, waiting=waits.set):
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
    monkeypatch.setattr(locks, "MACHINE_LOCK", path)
    with building():
        assert is_free(path, "shared")
        assert not is_free(path, "alone")
    with benchmarking():
        assert not is_free(path, "shared")


def test_a_benchmark_that_waits_lets_no_further_build_begin(path, monkeypatch):
    monkeypatch.setattr(locks, "MACHINE_LOCK", path)
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
