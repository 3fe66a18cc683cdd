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
    process does, however that ends. Both calls take a few microseconds. args: those of `initialize`; groups: of the
    model's configuration. Triton calls an instance after the model, its group and its place in that: `model_0_1`.
    """

    def __init__(self, args, groups):
        model = hashlib.sha256(args["model_name"].encode()).hexdigest()[:16]  # 107 bytes are the most
        prefix = f"\0refinery-{os.getppid()}-{model}-"
        places = [f"{place}_{number}" for place, group in enumerate(groups) for number in range(group["count"])]
        own = "_".join(args["model_instance_name"].rsplit("_", 2)[1:])
        self._own, self._others = prefix + own, [prefix + place for place in places if place != own]
        self._held, self._seen = None, float("-inf")
        self._probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __enter__(self):
        if not self._others:
            return self
        self._held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with suppress(OSError):  # the model is being loaded anew, and the instance before holds the name
            self._held.bind(self._own)
        return self

    def __exit__(self, *error):
        if self._held is not None:
            self._held.close()

    def at_work(self):
        """Whether another instance is, or was when this was last asked, a moment ago."""
        now = time.monotonic()
        if any(self._probe.connect_ex(name) == 0 for name in self._others):
            self._seen = now
        return now - self._seen < _STILL_SECONDS
