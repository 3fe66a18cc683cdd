"""How busy a machine is while something is built on it: processor, memory and GPUs, under MLflow's names.

Not mlflow.system_metrics: that writes to a run while it samples, and there is none yet when a graph is exported and
engines are built (a run that turns out to change nothing must not leave one), nor has every machine that builds a
connection to MLflow. So the samples are part of the record of what was built, travel with it, and are written with the
first run that it is part of: see resources.tracking.system_metrics.

Only builds are watched. A benchmark is alone on its machine for the sake of its figures, and asking the GPU's driver
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

#: Between two samples. A sample of a processor takes a fifth of a millisecond, one of an H100 30 milliseconds.
INTERVAL_SECONDS = 5.0
#: When the first is taken: most builds end before the second.
FIRST_SECONDS = 1.0
#: When there are more, every other goes, and from then on there are half as many: a record is there to be read.
MOST_SAMPLES = 240
_QUERY_SECONDS = 10
_QUERY = ("utilization.gpu", "memory.used", "memory.total", "power.draw", "enforced.power.limit")
_MEBIBYTE = 2**20 / 1e6


class UsageSample(BaseModel):
    """One look at how busy the machine was. `values` has MLflow's names of system metrics, without `system/`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)
    time_s: float = Field(description="Since the epoch.")
    values: dict[str, float]


class Usage(BaseModel):
    """How busy the machine was while an artifact was made there. `node` is its host name."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)
    node: str
    samples: tuple[UsageSample, ...]


class Watch:
    """Samples from entering to leaving, in a thread of this process; `usage` is what was seen. Nothing it meets makes
    what it watches fail.
    """

    def __init__(self) -> None:
        self._samples: list[UsageSample] = []
        self._interval_s = INTERVAL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)

    @property
    def usage(self) -> Usage | None:
        """What was seen so far, the oldest first."""
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
        import psutil  # here, because definitions are loaded for every step

        psutil.cpu_percent()  # what it answers is the mean since it was asked before, by this thread
        wait_s = FIRST_SECONDS
        while not self._ended.wait(wait_s):
            self._samples.append(UsageSample(time_s=time.time(), values={**machine_usage(), **gpu_usage()}))
            wait_s = self._interval_s
            if len(self._samples) > MOST_SAMPLES:
                self._samples = self._samples[1::2]
                self._interval_s *= 2
        if not self._samples:  # all of it was shorter; the memory of what was built is free again, its time is known
            self._samples.append(UsageSample(time_s=time.time(), values=machine_usage()))


def machine_usage() -> dict[str, float]:
    """Processor since this thread asked before, and memory, of the whole machine."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / 1e6, 1),
        "system_memory_usage_percentage": round(memory.used / memory.total * 100, 1),
    }


def gpu_usage() -> dict[str, float]:
    """All GPUs of NVIDIA's that this machine has; nothing where it has none, or does not answer in time.

    Asked of the driver's own tool, because pynvml would be one more dependency.
    """
    said = ask_driver(_QUERY, "csv,noheader,nounits", seconds=_QUERY_SECONDS)
    return parse_gpus(said) if said is not None else {}


def parse_gpus(text: str) -> dict[str, float]:
    """What nvidia-smi answers, a line a GPU; what one of them does not tell (`[N/A]`) is left out."""
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
