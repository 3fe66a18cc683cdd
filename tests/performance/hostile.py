"""What hostile texts cost a server and those who ask it beside them.

Releases of every task, with engines that cost nothing, so that all that is measured is the reading of texts; each is
asked with texts of 1, 10 and 100 MB, by a process of its own. The goal for its neighbours is
p99 <= 2 * max(quiet, least): `quiet` is their p99 while nothing hostile is sent, and `least` their p99 while the same
texts are sent to a model that only refuses them for their length. Prints a table, and what misses the goals. Needs a
quiet machine:

    python -m tests.performance.hostile [--megabytes 1,10,100] [--tasks embedding,fill-mask]

The server is stopped where its Python models take more than 4 GB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from resources.errors import ServerError
from resources.settings.triton import TritonSettings
from resources.tasks import TASKS
from resources.triton.client import Contract, TextClient
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.releases import make_task_plan, unasked

KINDS = {
    "words": "All work and no play makes a dull text. ",
    "one word": "a",
    "a.": "a.",
    "marks": "e" + "\u0301" * 999,
    "emoji": "🙂",
}
MOST_MEMORY = 4 * 10**9
SECONDS, GROWTH = 1.0, 256 * 10**6
REFUSING = "refusing"
_NEIGHBOURS = 4
#: Of the neighbours alone, and beside each kind of text; between two requests of a client.
_QUIET_SECONDS, _HOSTILE_SECONDS, _PAUSE_SECONDS = 5.0, 2.0, 0.02
#: The least that a Python model can do: one that refuses a text for its length alone.
_MODEL = """
import numpy
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        if len(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()[0][0]) > 1000:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("no", pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor("values", numpy.zeros((1, 1), numpy.float32))])
"""
_CONFIG = """
name: "refusing" backend: "python" max_batch_size: 8
input [{name: "TEXT" data_type: TYPE_STRING dims: [1]}]
output [{name: "values" data_type: TYPE_FP32 dims: [1]}]
instance_group [{count: 1 kind: KIND_CPU}]
"""


@dataclass
class Memory:
    """The resident memory of a server's processes, looked at all the time: the most of each since `forget`."""

    server: EmbeddedServer
    most: dict[int, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        self.most = {}

    def now(self) -> dict[int, int]:
        """Of each Python model's process, in bytes."""
        found = {}
        for process in psutil.Process(self.server.pid).children(recursive=True):
            try:
                if "stub" in process.name():
                    found[process.pid] = process.memory_info().rss - process.memory_info().shared
            except psutil.Error:
                continue
        return found

    def processor_seconds(self) -> float:
        """What the server and its Python models have computed since they began."""
        processes = psutil.Process(self.server.pid).children(recursive=True)
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def watch(self) -> None:
        while not self.stop.wait(0.01):
            for pid, size in self.now().items():
                self.most[pid] = max(size, self.most.get(pid, 0))
                if size > MOST_MEMORY:
                    print("a Python model took more than 4 GB; stopping the server", flush=True)
                    psutil.Process(pid).kill()
                    return


@contextmanager
def watched(server: EmbeddedServer) -> Iterator[Memory]:
    memory = Memory(server)
    thread = threading.Thread(target=memory.watch)
    thread.start()
    try:
        yield memory
    finally:
        memory.stop.set()
        thread.join()


class Neighbours:
    """Clients that ask short questions all the time; the latencies of those asked since `forget`, in ms."""

    def __init__(self, address: str, model: str, contract: Contract) -> None:
        self._address, self._model, self._contract = address, model, contract
        self._stop, self.took, self.failed = threading.Event(), list[float](), list[str]()
        self._threads = [threading.Thread(target=self._ask) for _ in range(_NEIGHBOURS)]

    def __enter__(self) -> Neighbours:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def p99(self, seconds: float = 0.0) -> float:
        """Of what was asked since `forget`, after so many seconds more."""
        time.sleep(seconds)
        return float(np.percentile(self.took, 99)) if self.took else float("nan")

    def forget(self) -> None:
        self.took = []

    def _ask(self) -> None:
        with TextClient(self._address) as client:
            while not self._stop.is_set():
                begun = time.monotonic()
                try:
                    client.ask(self._model, self._contract, [item_of(self._model, "a short text")])
                except ServerError as error:
                    self.failed.append(str(error))
                self.took.append((time.monotonic() - begun) * 1e3)
                self._stop.wait(_PAUSE_SECONDS)


def item_of(task: str, text: str) -> dict[str, str]:
    """A request of that task about the text."""
    if task == REFUSING:
        return {"TEXT": text}
    if task == "fill-mask":
        return {"TEXT": f"{text} [MASK]"}
    if task == "zero-shot-classification":
        return {"TEXT": text, "LABELS": '["one", "another"]'}
    if task == "question-answering":
        return {"QUESTION": "Where does Sarah live?", "CONTEXT": text}
    return {"QUERY": "a query", "TEXT": text} if task == "reranking" else {"TEXT": text}


def ask(client: TextClient, model: str, contract: Contract, text: str) -> tuple[float, str]:
    """Seconds that it took, and what became of it."""
    item = item_of(model, text)
    begun = time.monotonic()
    try:
        client.ask(model, contract, [item])
        said = "answered"
    except ServerError as error:
        status = getattr(error.__cause__, "status", lambda: "")()
        said = "refused" if status in ("StatusCode.INVALID_ARGUMENT", "400") else f"FAILED: {error}"
    return time.monotonic() - begun, said


def attack(address: str, model: str, contract: Contract, unit: str, size: int) -> tuple[float, str]:
    """Ask for a text of so many bytes again and again. Returns the worst seconds, and what became of the last."""
    text, took = unit * (size // len(unit.encode())), list[float]()
    with TextClient(address) as client:
        end = time.monotonic() + _HOSTILE_SECONDS
        while not took or time.monotonic() < end:
            seconds, said = ask(client, model, contract, text)
            took.append(seconds)
            time.sleep(0.2)
    return max(took), said


def measure(server: EmbeddedServer, tasks: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """What misses the goals; prints the rest."""
    missed = []
    attacker = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with attacker, watched(server) as memory, TextClient(server.grpc_address) as client:
        refusing = Contract(("TEXT",), "values", structured=False)
        attacker.submit(attack, server.grpc_address, REFUSING, refusing, "a", 1).result()
        floors = {}
        with Neighbours(server.grpc_address, REFUSING, refusing) as neighbours:
            for size in sizes:
                neighbours.forget()
                asked = server.grpc_address, REFUSING, refusing, "a", size * 10**6
                seconds, said = attacker.submit(attack, *asked).result()
                floors[size] = seconds, neighbours.p99()
                if said != "refused":
                    missed.append(f"{REFUSING}, {size} MB: {said}, so what it cost is no measure for the others")
                print(
                    f"{size:3} MB refused for their length: {seconds:.3f} s, neighbours' p99 {floors[size][1]:.1f} ms"
                )
            missed += [f"{REFUSING}: a neighbour failed: {error}" for error in neighbours.failed[:3]]
        for task in tasks:
            contract = client.contract(task)
            with Neighbours(server.grpc_address, task, contract) as neighbours:
                neighbours.p99(2.0)
                neighbours.forget()
                quiet = neighbours.p99(_QUIET_SECONDS)
                print(f"{task}: quiet p99 {quiet:.1f} ms")
                for size in sizes:
                    base, floor = floors[size]
                    for kind, unit in KINDS.items():
                        before, most = memory.now(), dict[int, int]()
                        memory.forget()
                        neighbours.forget()
                        asked = server.grpc_address, task, contract, unit, size * 10**6
                        seconds, said = attacker.submit(attack, *asked).result()
                        seconds -= base if size >= 100 else 0
                        most = {pid: most - before.get(pid, 0) for pid, most in memory.most.items()}
                        growth, p99 = max(most.values(), default=0), neighbours.p99()
                        line = (
                            f"  {size:3} MB of {kind:9} {said[:60]:9} worst {seconds:6.3f} s, the model grew "
                            f"by {growth / 1e6:6.1f} MB, neighbours' p99 {p99:6.1f} ms ({p99 / quiet:.2f} x)"
                        )
                        wrong = [
                            what
                            for what, is_missed in (
                                ("time", seconds > SECONDS),
                                ("memory", growth > GROWTH + size * 10**6),
                                ("neighbours", not p99 <= 2 * max(quiet, floor) and size < 100),
                                ("failed", said.startswith("FAILED")),
                            )
                            if is_missed
                        ]
                        print(line + (f"  MISSED: {', '.join(wrong)}" if wrong else ""), flush=True)
                        missed += [f"{task}, {size} MB of {kind}: {what}" for what in wrong]
                missed += [f"{task}: a neighbour failed: {error}" for error in neighbours.failed[:3]]
    return missed


def main() -> None:
    """Make the releases, serve them, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="1,10,100")
    parser.add_argument("--tasks", default=",".join(sorted(TASKS)))
    arguments = parser.parse_args()
    tasks, sizes = arguments.tasks.split(","), [int(size) for size in arguments.megabytes.split(",")]
    settings = TritonSettings(environment=Path(sys.prefix) / "triton")
    with tempfile.TemporaryDirectory(prefix="refinery-hostile-") as name:
        folder = Path(name)
        for task in tasks:
            publish(make_task_plan(folder / task, task), folder / "cpu", Steps(prove=unasked))
        refusing = folder / "cpu" / REFUSING
        (refusing / "1").mkdir(parents=True)
        (refusing / "1" / "model.py").write_text(_MODEL)
        (refusing / "config.pbtxt").write_text(_CONFIG)
        with EmbeddedServer(folder / "cpu", settings, models=[*tasks, REFUSING], log=folder / "log") as server:
            missed = measure(server, tasks, sizes)
    print(json.dumps({"missed": missed}, indent=1))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
