"""A limit for calls that have none of their own, or one that each drip of an answer begins anew."""

from __future__ import annotations

import contextvars
import threading
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
