"""The lane: a thread that answers large requests beside the others instead of before them.

This module runs inside Triton, copied beside answering.py. Triton hands over requests together and waits for all of
them. So one long text with its windows, or one that is slow to tokenize, would keep all other requests waiting. The
lane's thread answers such requests later. It uses the engine a few rows at a time, in the gaps that the others leave.
"""

import queue
import sys
import threading
import time
from contextlib import contextmanager

import triton_python_backend_utils as pb_utils
from reading import BusyError, attempt, refusal

#: The most bytes of texts that may wait. Beyond that, large requests are turned away.
MOST_WAITING = 64 * 2**20
#: The most tokens, with padding, that a large request gives to the engine at a time. On two cores, all-MiniLM-L6-v2
#: takes 40 ms for them.
_TOKENS = 256
#: How long one Python thread may keep the others from running. Python's default is ten times as long.
_SWITCH_SECONDS = 0.0005
#: The longest time that a large request waits for a gap. Without a limit it would wait for ever on a busy server. It
#: also waits no longer than its last use of the engine took, so that it gets at least half of the engine's time. It
#: does not wait for its first turn.
_PATIENCE_SECONDS = 0.02


class Lane:
    """The thread for large requests, and the rule that decides which thread may use the engine.

    Args:
        answer: A function that takes a request's items and returns its response.
    """

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
        """Answer other requests first: within the context, the thread waits for the engine until its patience ends."""
        self._gap.clear()
        try:
            yield
        finally:
            self._gap.set()

    def put(self, sender, items):
        """Answer the request later, through its response sender.

        Raises:
            BusyError: More texts than `MOST_WAITING` bytes would wait.
        """
        size = sum(sys.getsizeof(text) for item in items for text in item.values())
        with self._count:
            if self._waiting + size > MOST_WAITING:
                raise BusyError("too many large requests wait already; try again later")
            self._waiting += size
        self._jobs.put((sender, items, size))

    @contextmanager
    def turn(self):
        """Hold the engine for one use."""
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
        """Return how many rows of a length the calling thread may give to the engine at a time."""
        return max(1, min(largest, _TOKENS // length)) if threading.current_thread() is self._thread else largest

    def close(self):
        """Answer the requests that wait, and end the thread."""
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
    """A stand-in for the lane where large requests have to be answered together with the others.

    This is the case if only one thread may use the engine, or if the engine shares resources that Triton's rate limiter
    counts.
    """

    @contextmanager
    def others(self):
        """Do nothing, because no thread competes for the engine."""
        yield

    turn = others

    def most_rows(self, length, largest):
        """Return `largest`: rows of every length may fill the engine."""
        del length
        return largest

    def close(self):
        """Do nothing, because no request waits."""
        pass
