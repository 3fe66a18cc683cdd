"""Who may change a repository in object storage, where no kernel keeps locks.

Everyone who wants it writes a claim of their own beside the repository and looks again: who then sees no other claim
that lives has it, and everyone else takes theirs back and waits. Two cannot both see none, since stores list what was
written before (S3, Google's and Azure's all promise that). No conditional writes are needed, which fsspec offers for
some stores only, and which taking over from a dead holder would need too.

A claim lives while its text changes: its holder writes it anew all the time. Whoever sees it unchanged for
LEASE_SECONDS, by a clock of their own, takes it for dead; a holder who could not write for that less MARGIN_SECONDS by
theirs stops. What no claim can help against: a holder that is stopped for so long, with its machine say, between its
last look at the clock and what it then sends.
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

from resources.errors import ReleaseError
from resources.triton.storage import ANSWER_SECONDS, RemotePath

#: How long a claim may stay as it is and still live.
LEASE_SECONDS = 60.0
#: So much sooner its holder stops: for the answer to what it has just begun to change, and as long again for a store
#: that does it after nobody waits for that any more.
MARGIN_SECONDS = 2 * ANSWER_SECONDS
#: How often its holder writes it; several times in what is left, or one lost write would end it.
RENEW_SECONDS = 5.0
#: How often one who waits looks, on average.
LOOK_SECONDS = 1.0
#: How long one waits: several publishes.
PATIENCE_SECONDS = 1800.0


_LOG = logging.getLogger(__name__)


def _now() -> float:
    """Seconds. This clock goes on while the machine sleeps, when nothing is written."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """One claim. `require` costs no request."""

    def __init__(self, folder: RemotePath) -> None:
        # A store of its own: claims are written without asking whoever holds the other's lease.
        self._folder = RemotePath(replace(folder.store, leases={}), folder.key)
        self._own = self._folder / uuid.uuid4().hex
        self._written: float | None = None  # when the claim that lies there was
        self._count = 0
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name=f"lease of {folder}")

    def acquire(self) -> None:
        """Wait until nobody else has it. Raises ReleaseError after PATIENCE_SECONDS, naming the holder."""
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
            if _now() - begun > PATIENCE_SECONDS:
                raise ReleaseError(
                    f"{self._folder.parent}: it is being changed by {holder}, for {PATIENCE_SECONDS / 60:.0f} minutes "
                    f"now. Wait for that to end, or stop it; {LEASE_SECONDS:g} s later the next may begin."
                )
            time.sleep(LOOK_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - so that two do not meet again
        self._folder.remove([name for name in self._seen if name != self._own.name])

    def write(self) -> None:
        """Say that the holder lives. Raises ReleaseError, also where that came too late."""
        self.require()
        begun = _now()
        who = f"{_user()}@{socket.gethostname()}, process {os.getpid()}, since {self._since}"
        self._own.write_bytes(json.dumps({"holder": who, "renewed": self._count}).encode())
        self.require()
        # From its beginning on: whoever looked before it arrived has seen the one before.
        self._count, self._written = self._count + 1, begun

    def keep(self) -> None:
        """Have it written anew until `release`. A store that is away for a while costs nothing."""
        self._keeper.start()

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(ReleaseError):
                self.write()

    def require(self) -> None:
        """Raise ReleaseError where another may have it by now."""
        limit = LEASE_SECONDS - MARGIN_SECONDS
        if self._written is not None and _now() - self._written > limit:
            raise ReleaseError(
                f"{self._folder.parent}: nothing more is changed, because this process could not renew its lease for "
                f"{limit:g} s and another may be at it soon. Run again: what is half done is made good."
            )

    def release(self) -> None:
        """Let the next one in at once."""
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join(ANSWER_SECONDS)  # what it is just writing would be there again
        with suppress(ReleaseError):  # then it dies by itself
            self._folder.remove([self._own.name])

    def _living(self) -> str | None:
        """Who else lives, of those who can be read; whom nobody has seen change is in `_seen` alone."""
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
            if _now() - since <= LEASE_SECONDS:
                living = living or _holder(text)
        return living


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def _holder(claim: bytes) -> str:
    try:
        return str(json.loads(claim)["holder"])
    except (ValueError, KeyError, TypeError):
        return "somebody who left no name"


@contextmanager
def leased(folder: RemotePath, places: Sequence[RemotePath]) -> Iterator[None]:
    """Hold the lease whose claims lie in that folder; all that its store is told to change at or below the places asks
    it first.
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
