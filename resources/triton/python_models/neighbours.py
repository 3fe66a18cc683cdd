"""Detect whether another instance of the same model is at work. Each instance is a process of its own.

This module runs inside Triton.
"""

import hashlib
import os
import socket
import time
from contextlib import suppress

#: An instance counts as at work for this long after it was seen, because even under load it idles between two runs.
_STILL_SECONDS = 0.05


class Neighbours:
    """The instances of one model in one server, and a context manager around an instance's own work.

    An instance holds a name in Linux's abstract socket namespace while it works. The name leaves no file, and it
    vanishes with the process, however that ends. Holding the name and asking for the others' names take a few
    microseconds each. Triton names an instance after the model, its group and its place in the group: `model_0_1`.

    Args:
        args: The arguments of `initialize`.
        groups: The instance groups of the model's configuration.
    """

    def __init__(self, args, groups):
        model = hashlib.sha256(args["model_name"].encode()).hexdigest()[:16]  # a name holds at most 107 bytes
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
        with suppress(OSError):  # while the model is loaded again, the former instance still holds the name
            self._held.bind(self._own)
        return self

    def __exit__(self, *error):
        if self._held is not None:
            self._held.close()

    def at_work(self):
        """Return whether another instance is at work, or was seen at work a moment ago."""
        now = time.monotonic()
        if any(self._probe.connect_ex(name) == 0 for name in self._others):
            self._seen = now
        return now - self._seen < _STILL_SECONDS
