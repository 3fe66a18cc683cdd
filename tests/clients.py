"""Constant load on a server from a process of its own, and what became of each request.

Requests are sent when they are due, whatever became of those before, and are timed from then on: a server that stalls
is seen in all that it made wait. Their process has nothing else to do, so what publishes does not disturb the clock.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from resources.pipelines.names import TOKEN_COUNT

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 8
#: In place of a release's number, of requests that got an answer of none, and of those that failed.
NOBODY, FAILED = -1, -2
_TIMEOUT_SECONDS = 60.0
#: Engines answer a little otherwise in other company; releases differ by a thousand times as much.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Switch:
    """A pointer that was moved: when, on `time.monotonic`'s clock, and to which release, as an index into the known."""

    at: float
    release: int


@dataclass(frozen=True)
class Requests:
    """One entry a request, in the order in which they were due.

    due: on `time.monotonic`'s clock; took_ms: from then to the answer; release: whose answer it was, as an index into
    what was given as known, or NOBODY, or FAILED; errors: of those that failed.
    """

    due: np.ndarray
    took_ms: np.ndarray
    release: np.ndarray
    errors: tuple[str, ...]

    @property
    def done(self) -> np.ndarray:
        """When they were answered."""
        return self.due + self.took_ms / 1e3

    def between(self, start: float, end: float) -> np.ndarray:
        """Which were due then, as a mask."""
        return (self.due >= start) & (self.due < end)

    def first_answer(self, switch: Switch) -> float:
        """When its release answered first after the pointer was moved; infinity where it never did."""
        done = self.done[(self.release == switch.release) & (self.done >= switch.at)]
        return float(done.min()) if len(done) else float("inf")

    def out_of_turn(self, switches: Sequence[Switch]) -> int:
        """How many were answered by a release that was not pointed to yet, or that another had already followed.

        switches: in order, beginning with what served before all requests.
        """
        ends = [self.first_answer(switch) for switch in switches[1:]] + [float("inf")]
        allowed = np.zeros(len(self.due), dtype=bool)
        for switch, end in zip(switches, ends, strict=True):
            allowed |= (self.release == switch.release) & (self.done >= switch.at) & (self.due <= end)
        return int((~allowed & (self.release >= 0)).sum())


def require_answered(requests: Requests, switches: Sequence[Switch], per_second: float) -> None:
    """Fail unless every request was answered by a release that served then, all of them were sent, and each release
    of `switches` (in order, beginning with what served before all requests) answered.
    """
    assert not (requests.release == FAILED).any(), requests.errors[:5]
    assert not (requests.release == NOBODY).any(), "answers that belong to no release"
    assert requests.out_of_turn(switches) == 0, "a release answered that another had followed"
    assert all(requests.first_answer(switch) < float("inf") for switch in switches)
    seconds = requests.due[-1] - requests.due[0]
    assert len(requests.due) > 0.9 * per_second * seconds
    took = np.percentile(requests.took_ms, [50, 99])
    print(f"{len(switches) - 1} switches, {len(requests.due)} requests, p50 {took[0]:.1f} ms, p99 {took[1]:.1f} ms")


def moved(pointer: Path, release: int) -> Switch:
    """Of a pointer that has just been moved: renaming a file to its place sets the time of its last change."""
    return Switch(pointer.stat().st_ctime - time.time() + time.monotonic(), release)


class Load:
    """`CLIENTS` clients, each with a connection of its own, while the context lasts; then `requests` is there.

    texts: asked in turn, one a request; known: fp32 `[releases, texts, width]`, the right answers of each release;
    per_second: of all clients together.
    """

    def __init__(self, address: str, model: str, texts: Sequence[str], known: np.ndarray, per_second: float) -> None:
        self._asked: dict[str, Any] = {
            "address": address,
            "model": model,
            "texts": list(texts),
            "per_second": per_second,
        }
        self._known = known
        self.requests: Requests | None = None

    def __enter__(self) -> Load:
        self._folder = tempfile.TemporaryDirectory(prefix="refinery-load-")
        spec = Path(self._folder.name) / "asked.npz"
        np.savez(spec, known=self._known, **self._asked)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.clients", str(spec)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"begun\n", "the clients did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(2 * _TIMEOUT_SECONDS)
            if kind is None:
                assert status == 0, "the clients did not end well"
                with np.load(Path(self._folder.name) / "answered.npz") as found:
                    self.requests = Requests(
                        found["due"], found["took_ms"], found["release"], tuple(map(str, found["errors"]))
                    )
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._folder.cleanup()


class _Clients:
    def __init__(self, spec: Any) -> None:
        self.known, self.per_second = spec["known"], float(spec["per_second"])
        self.address, self.model = str(spec["address"]), str(spec["model"])
        self.texts = [str(text) for text in spec["texts"]]
        self.found: list[tuple[float, float, int]] = []
        self.errors: list[str] = []

    async def run(self, ended: threading.Event) -> None:
        import tritonclient.grpc.aio as api

        # By default all of one process to one address share a connection.
        clients = [
            api.InferenceServerClient(self.address, channel_args=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(CLIENTS)
        ]
        tensors = []
        for text in self.texts:
            tensor = api.InferInput("TEXT", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
            tensors.append(tensor)
        for client in clients:  # connected, before the clock runs
            await client.is_server_live()
        print("begun", flush=True)
        started, number, under_way = time.monotonic(), 0, set()
        while not ended.is_set():
            due = started + number / self.per_second
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._ask(clients[number % CLIENTS], tensors, number, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            number += 1
        await asyncio.gather(*under_way)
        for client in clients:
            await client.close()

    async def _ask(self, client: Any, tensors: Sequence[Any], number: int, due: float) -> None:
        place = number % len(tensors)
        try:
            result = await client.infer(self.model, [tensors[place]], client_timeout=_TIMEOUT_SECONDS)
            took = time.monotonic() - due
            # Beside the count of tokens, in no order.
            (name,) = {output.name for output in result.get_response().outputs} - {TOKEN_COUNT}
            answer = result.as_numpy(name)
            whose = self._whose(place, answer)
        except Exception as error:
            took, whose = time.monotonic() - due, FAILED
            self.errors.append(f"{time.monotonic():.3f}: {error}")
        self.found.append((due, 1e3 * took, whose))

    def _whose(self, place: int, answer: np.ndarray) -> int:
        known = self.known[:, place]
        if answer.shape != (1, known.shape[1]):
            return NOBODY
        distances = np.abs(known - answer).max(axis=1)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] < _TOLERANCE else NOBODY


def main(path: Path) -> None:
    """Ask until the caller closes our standard input, or ends."""
    ended = threading.Event()

    def wait() -> None:
        with suppress(OSError):
            sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    with np.load(path) as spec:
        clients = _Clients(spec)
    asyncio.run(clients.run(ended))
    found = sorted(clients.found)
    columns = [np.array([row[column] for row in found]) for column in range(3)]
    np.savez(
        path.with_name("answered.npz"), due=columns[0], took_ms=columns[1], release=columns[2], errors=clients.errors
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
