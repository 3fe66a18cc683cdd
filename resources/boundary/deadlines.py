"""A limit for calls that have none of their own, or one that each drip of an answer begins anew."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what the call returns, or raise what it raises; raise TimeoutError where that takes longer.

    Python cannot end a thread: the call goes on in one of its own, which ends with the process at the latest.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the call's own
            raise
        raise TimeoutError(f"there was no answer within {seconds:g} s") from None


#: A download that brings less than so many bytes a second, over so many seconds, is given up: even one of 100 MB would
#: take three hours. Asking for the list of files, before the first byte, counts too.
FLOOR_BYTES_PER_SECOND = 10_000
WINDOW_SECONDS = 60.0


class Pace:
    """The speed of one download, looked at from time to time."""

    def __init__(self, size_bytes: int = 0) -> None:
        self._since, self._before = time.monotonic(), size_bytes

    def require(self, size_bytes: int) -> None:
        """Raise TimeoutError where too little has come since the last window began. size_bytes: what is there now."""
        passed_s, came = time.monotonic() - self._since, size_bytes - self._before
        if passed_s < WINDOW_SECONDS:
            return
        if came < FLOOR_BYTES_PER_SECOND * passed_s:
            raise TimeoutError(
                f"it brought {came:,} bytes in {passed_s:.0f} s, less than {FLOOR_BYTES_PER_SECOND:,} bytes a second"
            )
        self._since, self._before = time.monotonic(), size_bytes
