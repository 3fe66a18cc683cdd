"""Kills of a served model's process under load, and how soon the next good answer comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from resources.errors import ServerError
from resources.settings.triton import TritonSettings
from resources.triton.client import TextClient
from tests.foreground import serving, wait_until
from tests.releases import CONTRACT


class Clients:
    """So many clients that ask all the time, while the context lasts. `answers`: when each good answer came."""

    def __init__(self, address: str, model: str, texts: Sequence[str], count: int) -> None:
        self._address, self._model, self._texts = address, model, texts
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        self.answers: list[float] = []

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def after(self, moment: float) -> list[float]:
        """When good answers came to requests that were asked after the moment."""
        return [answer for answer in self.answers[-50:] if answer > moment]

    def _ask(self, number: int) -> None:
        while not self._end.is_set():
            with suppress(ServerError), TextClient(self._address) as client:
                while not self._end.is_set():
                    asked = time.monotonic()
                    client.ask(self._model, CONTRACT, [{"TEXT": self._texts[number % len(self._texts)]}])
                    self.answers.append(asked)
                    number += 1
            time.sleep(0.05)


def kill_and_measure(
    repository: Path, model: str, settings: TritonSettings, log: Path, *, texts: Sequence[str], kills: int, clients: int
) -> list[float]:
    """Seconds from each kill of the model's processes to the first good answer that was asked for after it."""
    took = []
    with serving(repository, settings, log) as served, Clients(served.address, model, texts, clients) as asking:
        wait_until(lambda: asking.answers)
        for number in range(kills):
            time.sleep(1.0 + number % 7 / 7)  # at any moment of the guard's rounds
            wait_until(lambda: served.health()[0] == 200, 60.0)
            stubs, killed = served.stubs(), time.monotonic()
            for stub in stubs:
                stub.kill()
            wait_until(partial(asking.after, killed + 0.1), 60.0)  # not an answer that had left before
            took.append(time.monotonic() - killed)
            print(f"kill {number + 1}: {took[-1]:.2f} s; {served.said[-1]}", flush=True)
    return took
