"""The health address of `refinery serve`, which a load balancer checks before it sends requests to the server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from resources.errors import ServerError
from resources.triton.launch import LOOPBACK

PATH = "/health"
#: A whole request has to arrive within this time. Load balancers send it at once.
_REQUEST_SECONDS = 2.0
_LONGEST_REQUEST = 8192
_START_SECONDS = 10.0
#: The most open connections. Without a bound, a local process could use up the file descriptors of `refinery serve`.
_MOST_OPEN = 100


class Health:
    """An HTTP server on loopback that answers `GET /health` with 200, or with 503 and the reasons for a problem.

    It is a context manager. It runs in a thread of its own, so it answers while the rest of the process waits.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._problems: dict[str, str] = {"server": "it has not started yet"}
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._begun = threading.Event()
        self._trouble: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    @property
    def address(self) -> str:
        """The `host:port` of this server."""
        return f"{LOOPBACK}:{self._port}"

    def show(self, problems: Mapping[str, str]) -> None:
        """Answer with these problems from now on, given by model or `server`. Without any, answer with 200."""
        self._problems = dict(problems)

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait(_START_SECONDS)
        if self._trouble is not None:
            self._thread.join()
            raise ServerError(
                f"Port {self._port} of {LOOPBACK} cannot be used: {self._trouble.strerror}. Choose another with "
                "--health-port, or stop what listens there."
            ) from self._trouble
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            start = asyncio.start_server(self._answer, LOOPBACK, self._port, limit=_LONGEST_REQUEST)
            server = self._loop.run_until_complete(start)
        except OSError as error:
            self._trouble = error
            self._loop.close()
            self._begun.set()
            return
        self._begun.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= _MOST_OPEN:
            writer.close()
            return
        self._open += 1
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(_REQUEST_SECONDS):
                    request = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._reply(request))
                    await writer.drain()
        finally:
            self._open -= 1
            writer.close()

    def _reply(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        problems = self._problems
        if path != PATH.encode():
            status, said = "404 Not Found", {"error": f"ask {PATH}"}
        elif method not in (b"GET", b"HEAD"):
            status, said = "405 Method Not Allowed", {"error": "use GET"}
        elif problems:
            status, said = "503 Service Unavailable", {"status": "unavailable", **problems}
        else:
            status, said = "200 OK", {"status": "ok"}
        body = json.dumps(said).encode()
        head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        head += ["Cache-Control: no-store", "Connection: close", "", ""]
        return "\r\n".join(head).encode() + (b"" if method == b"HEAD" else body)
