"""The usage of a machine while something is built on it: processor, memory and GPUs, under MLflow's names.

mlflow.system_metrics cannot be used, because it writes to a run while it samples. There is no run yet when a graph is
exported and engines are built, since a run that turns out to change nothing must not leave one. In addition, some
machines that build have no connection to MLflow. The samples are therefore part of the record of the artifact that was
built, and travel with it. They are written with the first run that the artifact is part of: see
resources.tracking.system_metrics.

Only builds are watched. A benchmark is alone on its machine for the sake of its figures. A query of the GPU's driver
takes a lock there and, on the processor, as long as many requests.
"""

from __future__ import annotations

import platform
import threading
import time
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from resources.machine.device import ask_driver

#: The time between two samples. A sample of a processor takes a fifth of a millisecond, one of an H100 takes 30
#: milliseconds.
INTERVAL_SECONDS = 5.0
#: The time before the first sample. Most builds end before the second.
FIRST_SECONDS = 1.0
#: If there are more samples, every other one is dropped and the interval doubles, because people read the record.
MOST_SAMPLES = 240
_QUERY_SECONDS = 10
_QUERY = ("utilization.gpu", "memory.used", "memory.total", "power.draw", "enforced.power.limit")
_MEBIBYTE = 2**20 / 1e6


class UsageSample(BaseModel):
    """One sample of the machine's usage.

    Args:
        values: The figures under MLflow's names of system metrics, without `system/`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)
    time_s: float = Field(description="Seconds since the epoch.")
    values: dict[str, float]


class Usage(BaseModel):
    """The machine's usage while an artifact was made there.

    Args:
        node: The machine's host name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)
    node: str
    samples: tuple[UsageSample, ...]


class Watch:
    """A context whose thread samples the machine's usage from its beginning to its end.

    An error in the thread does not make the watched work fail.
    """

    def __init__(self) -> None:
        self._samples: list[UsageSample] = []
        self._interval_s = INTERVAL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)

    @property
    def usage(self) -> Usage | None:
        """The samples so far, the oldest first, or None if there are none."""
        return Usage(node=platform.node(), samples=tuple(self._samples)) if self._samples else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil  # imported here, because every step loads the definitions

        psutil.cpu_percent()  # each answer is the mean since this thread's last call
        wait_s = FIRST_SECONDS
        while not self._ended.wait(wait_s):
            self._samples.append(UsageSample(time_s=time.time(), values={**machine_usage(), **gpu_usage()}))
            wait_s = self._interval_s
            if len(self._samples) > MOST_SAMPLES:
                self._samples = self._samples[1::2]
                self._interval_s *= 2
        if not self._samples:  # the build was shorter. Its memory is free again, but its time is known.
            self._samples.append(UsageSample(time_s=time.time(), values=machine_usage()))


def machine_usage() -> dict[str, float]:
    """Return the machine's memory usage, and its processor usage since this thread's last call."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / 1e6, 1),
        "system_memory_usage_percentage": round(memory.used / memory.total * 100, 1),
    }


def gpu_usage() -> dict[str, float]:
    """Return the usage of all NVIDIA GPUs of this machine.

    The result is empty if there is none, or if the driver does not answer in time. The driver's own tool is asked,
    because pynvml would be one more dependency.
    """
    said = ask_driver(_QUERY, "csv,noheader,nounits", seconds=_QUERY_SECONDS)
    return parse_gpus(said) if said is not None else {}


def parse_gpus(text: str) -> dict[str, float]:
    """Return the usage in nvidia-smi's answer, which has one line for each GPU.

    A figure that a GPU does not report (`[N/A]`) is left out.
    """
    found = {}
    for number, line in enumerate(text.strip().splitlines()):
        values = dict(zip(_QUERY, map(_number, line.split(",")), strict=False))
        busy, used, total = (values.get(name) for name in _QUERY[:3])
        drawn, limit = (values.get(name) for name in _QUERY[3:])
        if busy is not None:
            found[f"gpu_{number}_utilization_percentage"] = busy
        if used is not None:
            found[f"gpu_{number}_memory_usage_megabytes"] = round(used * _MEBIBYTE, 1)
        if used is not None and total:
            found[f"gpu_{number}_memory_usage_percentage"] = round(used / total * 100, 1)
        if drawn is not None:
            found[f"gpu_{number}_power_usage_watts"] = drawn
        if drawn is not None and limit:
            found[f"gpu_{number}_power_usage_percentage"] = round(drawn / limit * 100, 1)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
