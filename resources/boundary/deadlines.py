"""Time limits for calls that have none, or whose limit starts anew with each piece of an answer."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call the function with a time limit, and return what it returns.

    Python cannot end a thread. The call has a thread of its own and goes on there after the limit, at most until the
    process ends.

    Raises:
        TimeoutError: The call takes longer than the limit. Errors of the call itself are raised as they are.
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
        if future.done():  # the call itself raised it
            raise
        raise TimeoutError(f"there was no answer within {seconds:g} s") from None


#: A download that brings fewer bytes a second than this, over one window, is given up: even one of 100 MB would take
#: three hours. The request for the list of files, before the first byte, counts too.
FLOOR_BYTES_PER_SECOND = 10_000
WINDOW_SECONDS = 60.0


class Pace:
    """The speed of one download, checked from time to time.

    Args:
        size_bytes: The bytes that are there before the download begins.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self._since, self._before = time.monotonic(), size_bytes

    def require(self, size_bytes: int) -> None:
        """Raise TimeoutError if too few bytes have arrived since the current window began.

        Args:
            size_bytes: The bytes that are there now.
        """
        passed_s, came = time.monotonic() - self._since, size_bytes - self._before
        if passed_s < WINDOW_SECONDS:
            return
        if came < FLOOR_BYTES_PER_SECOND * passed_s:
            raise TimeoutError(
                f"only {came:,} bytes arrived in {passed_s:.0f} s, less than {FLOOR_BYTES_PER_SECOND:,} bytes a second"
            )
        self._since, self._before = time.monotonic(), size_bytes
