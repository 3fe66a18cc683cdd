"""Runs inside Triton: whether another instance of the same model is at work, which is a process of its own."""

import hashlib
import os
import socket
import time
from contextlib import suppress

#: Between two runs an instance is idle for a moment, even under load.
_STILL_SECONDS = 0.05


class Neighbours:
    """The instances of one model in one server. A context manager around an instance's own work.

    A name in Linux's abstract socket namespace is held while an instance works: it leaves no file, and goes when its
    process does, however that ends. Both calls take a few microseconds. args: those of `initialize`.
    """

    def __init__(self, args, count):
        model = hashlib.sha256(args["model_name"].encode()).hexdigest()[:16]  # 107 bytes are the most
        names = [f"\0refinery-{os.getppid()}-{model}-{number}" for number in range(count)]
        self._own = names.pop(int(args["model_instance_name"].rsplit("_", 1)[1]))
        self._others, self._held, self._seen = names, None, float("-inf")

    def __enter__(self):
        self._held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with suppress(OSError):  # the model is being loaded anew, and the instance before holds the name
            self._held.bind(self._own)
        return self

    def __exit__(self, *error):
        self._held.close()

    def at_work(self):
        """Whether another instance is, or was when this was last asked, a moment ago."""
        now = time.monotonic()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            if any(probe.connect_ex(name) == 0 for name in self._others):
                self._seen = now
        return now - self._seen < _STILL_SECONDS
