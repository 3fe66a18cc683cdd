"""The device that a benchmark runs on.

The figures of one device say nothing about another, so the device is part of every report's digest.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from resources.machine.targets import capability_of, device_of
from resources.processes.variables import COMPUTE, PROGRAM, inherited

_QUERY_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    capability: str
    driver: str


@cache
def describe_device(target: str) -> str:
    """Return a description of the device that the target's engines run on.

    It has the processor's name and the number of cores that we may use. For a CUDA target it has the name of the GPU
    and the version of its driver.
    """
    if device_of(target) == "cuda":
        gpu = first_gpu()
        return f"{gpu.name}, driver {gpu.driver}" if gpu is not None else "no GPU"
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:  # not Linux
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


@cache
def physical_cores() -> int:
    """Return the number of physical cores among those that we may use.

    If the kernel does not say which cores share a physical core, all of them count.
    """
    siblings = set()
    for core in os.sched_getaffinity(0):
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(os.sched_getaffinity(0))
    return len(siblings)


@cache
def first_gpu() -> Gpu | None:
    """Return the first GPU of this machine, which is the one that is used, or None if there is none.

    The driver's own tool is asked, because initializing CUDA here would take a second and hundreds of megabytes.
    """
    said = ask_driver(("name", "compute_cap", "driver_version"), "csv,noheader", seconds=_QUERY_SECONDS)
    return parse_gpu(said) if said is not None else None


def ask_driver(fields: Sequence[str], form: str, *, seconds: float) -> str | None:
    """Return the fields of all GPUs, one line for each GPU, as nvidia-smi prints them in that form.

    The result is None if there is no driver, or if it fails or does not answer in time.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        result = subprocess.run(
            [tool, f"--query-gpu={','.join(fields)}", f"--format={form}"],
            env=inherited(PROGRAM, COMPUTE),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def parse_gpu(text: str) -> Gpu | None:
    """Return the GPU in the first line of nvidia-smi's answer, or None if the line has another form."""
    parts = [part.strip() for part in text.strip().split("\n")[0].split(",")]
    return Gpu(*parts) if len(parts) == 3 and parts[1].replace(".", "").isdigit() else None


def why_not_here(target: str) -> str | None:
    """Return why this machine can neither build nor measure engines of the target, or None if it can."""
    if device_of(target) == "cpu":
        return None
    gpu, wanted = first_gpu(), capability_of(target)
    if gpu is None:
        return (
            f"{target} needs an NVIDIA GPU of compute capability {wanted}, and nvidia-smi shows none on this machine."
        )
    if gpu.capability != wanted:
        return (
            f"{target} needs an NVIDIA GPU of compute capability {wanted}, but this machine's {gpu.name} has "
            f"{gpu.capability}. Name the target cuda_sm{gpu.capability.replace('.', '')}, or use a machine with the "
            "required GPU."
        )
    return None
