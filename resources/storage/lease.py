"""A lease on a repository in object storage, where no kernel keeps locks.

Each process that wants the lease writes a claim of its own beside the repository and looks again. If it sees no other
living claim, it has the lease. Otherwise it takes its claim back and waits. Two processes cannot both see no other
claim, because a store's listing holds everything that was written before (S3, Google and Azure promise that).
Conditional writes are not needed: fsspec offers them for some stores only, and taking over from a dead holder would
need a claim all the same.

A claim counts as alive while its text keeps changing. The holder therefore rewrites it regularly. A process that sees a
claim unchanged for `LeaseTimes.life`, by its own clock, takes the holder for dead. A holder that could not rewrite its
claim for `LeaseTimes.life` less `LeaseTimes.margin`, by its own clock, stops changing anything. One case stays open: a
holder may be suspended for that long, for instance with its machine, between its last look at the clock and the request
that it then sends.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime

from resources.errors import StorageError
from resources.storage.objects import ANSWER_SECONDS, RemotePath

_LOG = logging.getLogger(__name__)


def _now() -> float:
    """Return the seconds of a clock that goes on while the machine sleeps, because no claim is rewritten meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """One process's claim to the lease on a repository.

    `require` sends no request to the store.
    """

    def __init__(self, folder: RemotePath) -> None:
        self.times = folder.store.lease_times
        # Claims are written through a store without leases, because writing one must not ask for the lease itself.
        self._folder = RemotePath(replace(folder.store, leases={}), folder.key)
        self._own = self._folder / uuid.uuid4().hex
        self._written: float | None = None  # when the current claim was written
        self._count = 0
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name=f"lease of {folder}")

    def acquire(self) -> None:
        """Wait until no other process has the lease, and take it.

        Raises:
            StorageError: Another process still has the lease after `LeaseTimes.patience`. The message names the holder.
        """
        begun, said = _now(), False
        while True:
            holder = self._living()
            if holder is None:
                self.write()
                holder = self._living()
                if holder is None:
                    break
                self._folder.remove([self._own.name])
                self._written = None
            if not said:
                _LOG.warning("%s is being changed by %s; waiting", self._folder.parent, holder)
                said = True
            if _now() - begun > self.times.patience:
                raise StorageError(
                    f"{self._folder.parent} is being changed by {holder}, and this process has waited for "
                    f"{self.times.patience / 60:.0f} minutes. Wait for that process to end, or "
                    f"stop it. The next process may begin {self.times.life:g} s later."
                )
            time.sleep(self.times.look * random.uniform(0.5, 1.5))  # noqa: S311 - so that two do not meet again
        self._folder.remove([name for name in self._seen if name != self._own.name])

    def write(self) -> None:
        """Rewrite the claim, which shows that its holder lives.

        Raises:
            StorageError: The claim could not be written, or was written too late.
        """
        self.require()
        begun = _now()
        who = f"{_user()}@{socket.gethostname()}, process {os.getpid()}, since {self._since}"
        self._own.write_bytes(json.dumps({"holder": who, "renewed": self._count}).encode())
        self.require()
        # The time when the write began counts, because a process that looked before it arrived saw the previous claim.
        self._count, self._written = self._count + 1, begun

    def keep(self) -> None:
        """Start the thread that rewrites the claim until `release`.

        The thread tolerates a store that does not answer for a while.
        """
        self._keeper.start()

    def _keep(self) -> None:
        while not self._ended.wait(self.times.renewal):
            with suppress(StorageError):
                self.write()

    def require(self) -> None:
        """Check that this process must still be the holder.

        Raises:
            StorageError: The claim is too old, so another process may have the lease.
        """
        limit = self.times.life - self.times.margin
        if self._written is not None and _now() - self._written > limit:
            raise StorageError(
                f"{self._folder.parent}: nothing more is changed, because this process could not renew its lease for "
                f"{limit:g} s and another process may take it. Run again: the next run repairs unfinished changes."
            )

    def release(self) -> None:
        """Give the lease up, so that the next process can take it at once."""
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join(ANSWER_SECONDS)  # a write under way would bring the claim back
        with suppress(StorageError):  # a claim that is not removed dies by itself
            self._folder.remove([self._own.name])

    def _living(self) -> str | None:
        """Return the holder of another claim that lives, or None.

        A claim that cannot be read any more is skipped. A claim that has not changed for `LeaseTimes.life` does not
        count, and stays in `_seen` alone.
        """
        there = {path.name: path for path in self._folder.iterdir() if path != self._own}
        self._seen = {name: seen for name, seen in self._seen.items() if name in there}
        living = None
        for name, path in there.items():
            try:
                text = path.read_bytes()
            except FileNotFoundError:
                continue
            before, since = self._seen.get(name, (b"", 0.0))
            if text != before:
                since = _now()
                self._seen[name] = (text, since)
            if _now() - since <= self.times.life:
                living = living or _holder(text)
        return living


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _holder(claim: bytes) -> str:
    try:
        return str(json.loads(claim)["holder"])
    except (ValueError, KeyError, TypeError):
        return "an unknown process"


@contextmanager
def leased(folder: RemotePath, places: Sequence[RemotePath]) -> Iterator[None]:
    """Hold the lease whose claims lie in `folder`.

    While the lease is held, the folder's store asks it before every change at or below one of the `places`.
    """
    lease, store = Lease(folder), folder.store
    keys = [place.key for place in places]
    try:
        lease.acquire()
        lease.keep()
        store.leases |= dict.fromkeys(keys, lease)
        yield
    finally:
        for key in keys:
            if store.leases.get(key) is lease:
                del store.leases[key]
        lease.release()
