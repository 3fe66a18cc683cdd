"""The load of the soak: clients over gRPC and HTTP in a process of their own, paced, and bounded in number.

Every request carries one of the project's sample texts, so lengths are mixed. Each answer is compared with the first
one to the same text: a wrong answer counts as a failed request. Requests fall due at a constant rate. A client that is
free takes the next request that is due, so a server that stalls is asked less meanwhile, and afterwards what is still
due is made up for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import numpy as np

from resources.benchmark.statistics import percentile
from resources.tasks.samples import sample_texts
from resources.triton.load import shuffled_rounds

TIMEOUT_SECONDS = 60.0
#: The same text alone and in company: int8 engines answered with cosines down to .99.
SAME = 0.97
#: What is due for longer than this is left out, and counted.
LATEST_SECONDS = 30.0

#: One request, by the number of its text: the answer, fp32 `[width]`.
Ask = Callable[[int], Awaitable[np.ndarray]]


@dataclass
class Window:
    """What became of the requests since the last report."""

    latencies_ms: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    left_out: int = 0
    errors: list[str] = field(default_factory=list)

    def report(self, seconds: float) -> dict[str, object]:
        """The window as one JSON document."""
        ordered = sorted(self.latencies_ms)
        return {
            "answered": len(ordered),
            "per_s": round(len(ordered) / seconds, 2),
            "failed": self.failed,
            "wrong": self.wrong,
            "left_out": self.left_out,
            "p50_ms": round(percentile(ordered, 0.5), 1) if ordered else None,
            "p99_ms": round(percentile(ordered, 0.99), 1) if ordered else None,
            "errors": self.errors[:3],
        }


class Clients:
    """`count` clients, every second of them over HTTP. An asynchronous context manager."""

    def __init__(self, grpc: str, http: str, model: str, output: str, count: int) -> None:
        self._grpc, self._url, self._model, self._output = grpc, f"http://{http}/v2/models/{model}/infer", model, output
        self._texts = sample_texts()
        self._count, self._stack = count, AsyncExitStack()
        self.asks: list[Ask] = []
        self.window = Window()
        self._known: dict[int, np.ndarray] = {}

    async def __aenter__(self) -> Clients:
        import aiohttp
        import tritonclient.grpc.aio as api

        session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            )
        )
        for number in range(self._count):
            if number % 2:
                self.asks.append(self._over_http(session))
            else:
                # By default all clients of one process to one address share a connection.
                client = api.InferenceServerClient(self._grpc, channel_args=[("grpc.use_local_subchannel_pool", 1)])
                self._stack.push_async_callback(client.close)
                self.asks.append(self._over_grpc(client))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    def _over_http(self, session: object) -> Ask:
        bodies = [
            json.dumps({"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}).encode()
            for text in self._texts
        ]

        async def ask(number: int) -> np.ndarray:
            async with session.post(self._url, data=bodies[number]) as response:  # type: ignore[attr-defined]
                body = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {body[:200]!r}")
            return np.array(json.loads(body)["outputs"][0]["data"], dtype=np.float32)

        return ask

    def _over_grpc(self, client: object) -> Ask:
        import tritonclient.grpc as api

        tensors = []
        for text in self._texts:
            tensor = api.InferInput("TEXT", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
            tensors.append(tensor)

        async def ask(number: int) -> np.ndarray:
            result = await client.infer(  # type: ignore[attr-defined]
                self._model, [tensors[number]], client_timeout=TIMEOUT_SECONDS
            )
            answer: np.ndarray = result.as_numpy(self._output)[0]
            return answer

        return ask

    async def attempt(self, ask: Ask, number: int, due: float | None) -> None:
        """Ask, and note what became of it. due: when it was, on `time.monotonic`'s clock; None: now."""
        began = time.monotonic() if due is None else due
        try:
            answer = await ask(number)
        except Exception as error:  # of gRPC, the client, or a connection
            self.window.failed += 1
            self.window.errors.append(f"{type(error).__name__}: {str(error)[:300]}")
            await asyncio.sleep(0.05)  # a server that is gone refuses at once
            return
        self.window.latencies_ms.append(1e3 * (time.monotonic() - began))
        known = self._known.setdefault(number, answer)
        lengths = float(np.linalg.norm(answer) * np.linalg.norm(known))
        if answer.shape != known.shape or not float(answer @ known) >= SAME * lengths > 0:
            self.window.wrong += 1
            self.window.errors.append(f"another answer to {self._texts[number][:60]!r} than before")

    async def closed(self, seconds: float) -> float:
        """Answers a second of all clients, each of which asks again when it has its answer."""
        numbers, end = shuffled_rounds(len(self._texts), 0), time.monotonic() + seconds

        async def client(ask: Ask) -> None:
            while time.monotonic() < end:
                await self.attempt(ask, next(numbers), None)

        before = len(self.window.latencies_ms)
        await asyncio.gather(*map(client, self.asks))
        return (len(self.window.latencies_ms) - before) / seconds

    async def paced(self, per_second: float, ended: threading.Event) -> None:
        """Ask `per_second` requests a second until `ended` is set."""
        numbers, begun, count = shuffled_rounds(len(self._texts), 1), time.monotonic(), 0

        async def client(ask: Ask) -> None:
            nonlocal count
            while not ended.is_set():
                due = begun + count / per_second
                count += 1
                now = time.monotonic()
                if now - due > LATEST_SECONDS:
                    self.window.left_out += 1
                    await asyncio.sleep(0)
                    continue
                await asyncio.sleep(max(0.0, due - now))
                await self.attempt(ask, next(numbers), due)

        await asyncio.gather(*map(client, self.asks))


def say(kind: str, **values: object) -> None:
    """One line for the process that started this one."""
    print(json.dumps({"kind": kind, **values}), flush=True)


async def run(given: argparse.Namespace, ended: threading.Event) -> None:
    """Find what the server can do, then ask a share of it, and report every few seconds."""
    async with Clients(given.grpc, given.http, given.model, given.output, given.clients) as clients:
        await clients.closed(given.calibrate / 4)  # warm
        rate = given.rate or given.share * await clients.closed(given.calibrate)
        found, clients.window = clients.window.report(given.calibrate), Window()
        say("calibrated", rate_per_s=round(rate, 2), share=given.share, **found)
        load = asyncio.create_task(clients.paced(rate, ended))
        while not load.done():
            began = time.monotonic()
            await asyncio.wait([load], timeout=given.report)
            window, clients.window = clients.window, Window()
            say("load", **window.report(time.monotonic() - began))
        await load


def main() -> int:
    """Ask until the caller closes our standard input, or ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("grpc", "http", "model", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; default: the share of the capacity")
    parser.add_argument("--calibrate", type=float, default=20.0, help="seconds")
    parser.add_argument("--report", type=float, default=10.0, help="seconds")
    given = parser.parse_args()
    ended = threading.Event()

    def wait() -> None:
        with suppress(OSError):
            sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    with suppress(BrokenPipeError):  # nobody waits for what is left to say
        asyncio.run(run(given, ended))
    return 0


if __name__ == "__main__":
    sys.exit(main())
