"""A pool of threads that look at many sources at once, until a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

from resources.checkpoints.watch.probe import Seen
from resources.errors import CheckpointError, RefineryError, first_line

#: The number of threads. There may be many, because a look spends most of its time waiting for a server.
WORKERS = 16
#: A look that takes longer than this is reported as unanswered. It continues all the same.
LATE_SECONDS = 30.0

#: A model's name and its source.
Key = tuple[str, str]
LookResult = Seen | CheckpointError


class Looks:
    """The looks of this process, including those that are still under way.

    A thread that hangs, for example in a network file system that is away, cannot be ended. No second thread looks at
    its source, and the other sources do not wait for it.
    """

    def __init__(self) -> None:
        self._under_way: dict[Key, float] = {}
        self._ended: queue.SimpleQueue[tuple[Key, LookResult]] = queue.SimpleQueue()

    def take(self, jobs: Mapping[Key, Callable[[], Seen]], deadline: float) -> dict[Key, LookResult]:
        """Run the jobs in their order until the deadline, and return the results that are there by then.

        A look that did not end in an earlier call has its result in the call after its end. If it has been under way
        for longer than LATE_SECONDS, its result is an error. A job that has not begun has no result.

        Args:
            jobs: The looks, by the model's name and its source.
            deadline: A time of time.monotonic.
        """
        found: dict[Key, LookResult] = {}
        while self._collect(found, block_s=0.0):
            pass
        for key, began in [*self._under_way.items()]:
            late_s = time.monotonic() - began
            if key in jobs and late_s > LATE_SECONDS:
                found[key] = CheckpointError(
                    "source: it does not answer and reports no error. Check that its server or its disk is available."
                )
        todo: queue.SimpleQueue[tuple[Key, Callable[[], Seen]]] = queue.SimpleQueue()
        wanted = {key for key in jobs if key not in found and key not in self._under_way}
        for key, job in jobs.items():
            if key in wanted:
                todo.put((key, job))
        for _ in range(min(WORKERS, len(wanted))):
            threading.Thread(target=self._work, args=(todo, deadline), daemon=True).start()
        while not wanted <= found.keys() and (left_s := deadline - time.monotonic()) > 0:
            self._collect(found, block_s=left_s)
        return {key: outcome for key, outcome in found.items() if key in jobs}

    def _work(self, todo: queue.SimpleQueue[tuple[Key, Callable[[], Seen]]], deadline: float) -> None:
        while time.monotonic() < deadline:
            try:
                key, job = todo.get_nowait()
            except queue.Empty:
                return
            self._under_way[key] = time.monotonic()
            try:
                outcome: LookResult = job()
            except CheckpointError as error:
                outcome = error
            except RefineryError as error:
                outcome = CheckpointError(str(error))
            except Exception as error:  # a defect in one look must not end the thread, which has others to do
                outcome = CheckpointError(
                    f"source: unexpected {type(error).__name__}: {first_line(error)} (a defect of this project)."
                )
            self._ended.put((key, outcome))

    def _collect(self, found: dict[Key, LookResult], block_s: float) -> bool:
        try:
            key, outcome = self._ended.get(timeout=block_s) if block_s > 0 else self._ended.get_nowait()
        except queue.Empty:
            return False
        self._under_way.pop(key, None)
        found[key] = outcome
        return True
