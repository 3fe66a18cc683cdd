"""Servers of other projects, started for tests on loopback: Debian's Postgres and Redis."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Set in CI: a server that is not installed is an error there.
REQUIRED = "REFINERY_REQUIRE_SERVERS"
_START_SECONDS = 30.0
_MLFLOW_START_SECONDS = 120.0


def missing(what: str, package: str) -> None:
    """Skip the test, or fail it where servers are required."""
    message = f"{what} is not installed: apt-get install {package}"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{message} ({REQUIRED} is set)")
    pytest.skip(message)


@contextmanager
def postgres() -> Iterator[str]:
    """An empty database in a folder of its own; its URL, with a password that is asked for."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        missing("Postgres", "postgresql")
    binaries, port, password = found[-1].parent, free_port(), secrets.token_hex(8)
    # Not below pytest's own folder, which other users may not enter: Postgres refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="refinery-postgres-"))
    try:
        (folder / "password").write_text(password)
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
            as_user = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        data = str(folder / "data")
        make = [str(binaries / "initdb"), "-D", data, "-U", "dagster", "-A", "scram-sha-256", "-N", "-E", "UTF8"]
        subprocess.run(
            _prefixed([*make, f"--pwfile={folder / 'password'}"], as_user),
            cwd=folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            check=True,
            capture_output=True,
        )
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(folder), "-p", str(port)]
        # SIGINT is its fast shutdown; SIGTERM waits for clients.
        with _running(_prefixed([str(binaries / "postgres"), "-D", data, *options], as_user), port, folder, "INT"):
            yield f"postgresql+psycopg2://dagster:{password}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis() -> Iterator[str]:
    """An empty Redis that keeps nothing on disk; its URL without a database's number."""
    program = shutil.which("redis-server")
    if program is None:
        missing("Redis", "redis-server")
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="refinery-redis-"))
    try:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        with _running(_prefixed([str(program), *options], []), port, folder, "TERM"):
            yield f"redis://127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """One of loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _prefixed(command: Sequence[str], as_user: Sequence[str]) -> list[str]:
    """So that it ends with this process, whatever becomes of that."""
    return [str(shutil.which("setpriv")), *as_user, "--pdeathsig", "QUIT", *command]


@contextmanager
def _running(command: Sequence[str], port: int, folder: Path, stop: str) -> Iterator[None]:
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.Signals[f"SIG{stop}"])
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def mlflow(backend: str, folder: Path) -> Iterator[str]:
    """An MLflow server as people start it, with that store and its artifacts in a folder; its URL."""
    port, program = free_port(), Path(sys.executable).with_name("mlflow")
    command = [str(program), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")]
    log = folder / "mlflow.log"
    with log.open("wb") as stream:
        # In a session of its own: it starts others, and all of them have to end.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _MLFLOW_START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):  # noqa: S310 - loopback
                    break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
