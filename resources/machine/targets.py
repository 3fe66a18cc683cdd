"""Deployment targets: `cpu`, or the NVIDIA GPUs of one compute capability, such as `cuda_sm90`."""

from __future__ import annotations

import re
from typing import Literal

Device = Literal["cpu", "cuda"]
_CUDA = re.compile(r"cuda_sm([1-9]\d{1,2})")


def check_target(name: str) -> str:
    """Return the name if it is that of a target.

    Raises:
        ValueError: The name is not that of a target.
    """
    if name != "cpu" and not _CUDA.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a target; use cpu, or cuda_sm followed by the compute capability of the GPUs that serve "
            "without its dot, for example cuda_sm90 (`nvidia-smi --query-gpu=compute_cap --format=csv` shows it)"
        )
    return name


def device_of(target: str) -> Device:
    """Return the device that the target's engines run on."""
    return "cpu" if target == "cpu" else "cuda"


def capability_of(target: str) -> str:
    """Return the compute capability of a CUDA target, such as `9.0`."""
    match = _CUDA.fullmatch(target)
    assert match is not None, f"{target} is not a CUDA target"
    return f"{match[1][:-1]}.{match[1][-1]}"
