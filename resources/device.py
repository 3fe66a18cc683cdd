"""What a benchmark ran on. Figures of one device say nothing about another, so it is part of every report's digest."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def describe_device(target: str) -> str:
    """The processor's name and the cores we may use, for the target `cpu`."""
    del target  # GPU targets have no devices yet
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:  # not Linux
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
