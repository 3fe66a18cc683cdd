"""`refinery serve` in a thread of the test."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from resources.settings.connection import Connection, new_key
from resources.settings.triton import TritonSettings
from resources.triton.foreground import serve_foreground
from resources.triton.launch import Ports
from tests.servers import free_port


def wait_until(what: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@dataclass
class Served:
    """What serves. `said`: its lines; `connection`: with the key."""

    ports: Ports
    health_port: int
    connection: Connection
    log: Path
    said: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    def health(self) -> tuple[int, dict[str, str]]:
        """The status and the document of the health address."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/health", timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def triton(self) -> psutil.Process:
        """The process that listens on the gRPC port."""
        for process in psutil.Process().children(recursive=True):
            listening = process.net_connections("inet") if process.name() == "tritonserver" else []
            if any(one.laddr.port == self.ports.grpc for one in listening):
                return process
        raise AssertionError("no server runs")

    def stubs(self) -> list[psutil.Process]:
        """The processes of its Python models."""
        found = self.triton().children(recursive=True)
        return [one for one in found if one.status() != psutil.STATUS_ZOMBIE and "stub" in one.name()]


@contextmanager
def serving(repository: Path, settings: TritonSettings, log: Path, **options: Any) -> Iterator[Served]:
    """`serve_foreground` until the context ends. Raises what it raised."""
    served = Served(Ports.choose(None, None, None), free_port(), Connection(key=new_key()), log)
    raised: list[BaseException] = []
    end = threading.Event()

    def serve() -> None:
        try:
            serve_foreground(
                repository,
                settings,
                http_port=served.ports.http,
                grpc_port=served.ports.grpc,
                metrics_port=served.ports.metrics,
                health_port=served.health_port,
                log=log,
                key=served.connection.key,
                say=served.said.append,
                stop=end.is_set,
                **options,
            )
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        wait_until(lambda: raised or any(line.startswith("serving ") for line in served.said), 60.0)
        yield served
    finally:
        end.set()
        thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]
