"""Runs inside Triton, copied beside answering.py: large requests are answered beside the others, not before them.

Triton hands over requests together and waits for all of them. So one long text with its windows, or one that is slow to
tokenize, would keep everybody waiting. Such requests are answered later, by a thread of their own, which uses the
engine a few rows at a time and in the gaps that the others leave.
"""

import queue
import sys
import threading
import time
from contextlib import contextmanager

import triton_python_backend_utils as pb_utils
from reading import BusyError, attempt, refusal

#: Bytes of texts that may wait: beyond that, large requests are turned away.
MOST_WAITING = 64 * 2**20
#: Tokens, with padding, that a large request gives to the engine at a time. On two cores all-MiniLM-L6-v2 takes 40 ms.
_TOKENS = 256
#: For how long a thread of Python may keep the others from running, of which the default is ten times as much.
_SWITCH_SECONDS = 0.0005
#: How long a large request waits for a gap. Without a limit it would wait for ever on a busy server. It waits no longer
#: than it used the engine the last time, so that it gets at least half of it; for its first turn it does not wait.
_PATIENCE_SECONDS = 0.02


class Lane:
    """The thread, and whose turn it is at the engine. answer: from a request's items to its response."""

    def __init__(self, answer):
        self._answer = answer
        self._engine, self._gap, self._used_seconds = threading.Lock(), threading.Event(), 0.0
        self._gap.set()
        self._jobs, self._waiting, self._count = queue.SimpleQueue(), 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()

    @contextmanager
    def others(self):
        """While requests are answered at once: the thread leaves the engine to them."""
        self._gap.clear()
        try:
            yield
        finally:
            self._gap.set()

    def put(self, sender, items):
        """Answer the request later, through its response sender. Raises BusyError."""
        size = sum(sys.getsizeof(text) for item in items for text in item.values())
        with self._count:
            if self._waiting + size > MOST_WAITING:
                raise BusyError("too many large requests wait already; try again later")
            self._waiting += size
        self._jobs.put((sender, items, size))

    @contextmanager
    def turn(self):
        """One use of the engine."""
        if threading.current_thread() is not self._thread:
            with self._engine:
                yield
            return
        self._gap.wait(min(_PATIENCE_SECONDS, self._used_seconds))
        with self._engine:
            begun = time.monotonic()
            yield
            self._used_seconds = time.monotonic() - begun

    def most_rows(self, length, largest):
        """How many rows of a length the engine may be given at a time."""
        return max(1, min(largest, _TOKENS // length)) if threading.current_thread() is self._thread else largest

    def close(self):
        """Answer what waits, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self):
        while (job := self._jobs.get()) is not None:
            sender, items, size = job
            found = attempt(self._answer, items)
            response = refusal(found) if isinstance(found, BaseException) else found
            attempt(sender.send, response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            with self._count:
                self._waiting -= size
            del job, sender, items, found, response


class NoLane:
    """Where the engine is of one thread, or shares what Triton's rate limiter counts: all are answered at once."""

    @contextmanager
    def others(self):
        yield

    turn = others

    def most_rows(self, length, largest):
        del length
        return largest

    def close(self):
        pass
