"""Run a TensorRT plan on one NVIDIA GPU.

The benchmark and the served release use the same module. A release carries a copy of this file beside its `model.py`,
so the file imports nothing else of this project. It needs TensorRT or TensorRT-RTX, numpy, ONNX Runtime for memory on
the GPU, and the driver's own library.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

#: The packages that contain the API. The one that Triton's own TensorRT backend supports comes first.
FLAVOURS = ("tensorrt", "tensorrt_rtx")
#: Each shape keeps its buffers. Beyond this number the shape that was not used for the longest time is dropped.
MOST_SHAPES = 128
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


def installed_flavour() -> str | None:
    """Return the name of the TensorRT package that is installed, or None, without importing it."""
    return next((name for name in FLAVOURS if find_spec(name) is not None), None)


def mismatch(built: Mapping[str, str], capability: str = "") -> str:
    """Return why a plan does not run here and what to do about it, or an empty string if it may run.

    A plan belongs to the exact version that built it.

    Args:
        built: `flavour`, `tensorrt` (its version) and `compute_capability`, as the builder recorded them.
        capability: The compute capability of this GPU. If it or the recorded one is unknown, they are not compared.
    """
    flavour, version = built["flavour"], built["tensorrt"]
    distribution = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}[flavour]
    remedy = (
        f"Install it (pip install {distribution}=={version}), "
        "or optimize the model again on the machine where it is to run."
    )
    if find_spec(flavour) is None:
        return f"the plan was built by {flavour} {version}, which is not installed here. {remedy}"
    here = str(import_module(flavour).__version__)
    if here != version:
        return f"the plan was built by {flavour} {version}, but {here} is installed here. {remedy}"
    there = built.get("compute_capability", "")
    if there and capability and there != capability:
        return (
            f"the plan was built for GPUs of compute capability {there}, but this GPU has {capability}. Optimize the "
            f"model for the target cuda_sm{capability.replace('.', '')}."
        )
    return ""


def fresh_log(flavour: str) -> Any:
    """Return the logger of the process, with earlier errors cleared.

    Warnings and errors are printed too. The process has one logger, because TensorRT keeps the first one that it is
    given and writes to no other.
    """
    log = _make_log(flavour)
    log.errors.clear()
    return log


@cache
def _make_log(flavour: str) -> Any:
    trt: Any = import_module(flavour)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            if severity not in (trt.ILogger.INFO, trt.ILogger.VERBOSE):
                sys.stdout.write(f"{flavour}: {severity.name.lower()}: {message}\n")
                sys.stdout.flush()

        def last(self) -> str:
            """Return the last error, cut to 400 characters."""
            return self.errors[-1][:400] if self.errors else "no reason was given"

    return Log()


Range = tuple[Sequence[int], Sequence[int]]


def pick_profile(profiles: Sequence[Mapping[str, Range]], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the number of the first profile that accepts inputs of those shapes.

    Args:
        profiles: For each profile, the smallest and the largest shape of each input.
        shapes: The shape of each input.

    Raises:
        ValueError: No profile accepts the shapes.
    """
    for number, ranges in enumerate(profiles):
        if all(
            len(shape) == len(ranges[name][0])
            and all(
                low <= size <= high for low, size, high in zip(ranges[name][0], shape, ranges[name][1], strict=True)
            )
            for name, shape in shapes.items()
        ):
            return number
    wanted = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    largest = "; ".join("x".join(map(str, high)) for ranges in profiles for high in [next(iter(ranges.values()))[1]])
    raise ValueError(f"no optimization profile of the plan accepts {wanted}; the profiles end at {largest}")


class TensorRtSession:
    """A loaded plan that runs on one GPU.

    `run` takes int64 arrays `[batch, ...]` by input name and returns the output as fp32. Each profile has its own
    context and each shape its own buffers. One batch runs at a time.

    Args:
        built: The versions and GPU that the plan was built for, as in `mismatch`.

    Raises:
        RuntimeError: The plan does not run here.
    """

    def __init__(self, path: str | Path, output: str, built: Mapping[str, str], *, device: int = 0) -> None:
        problem = mismatch(built)  # before the driver is loaded, because this is the usual mistake
        if problem:
            raise RuntimeError(problem)
        import onnxruntime

        if find_spec("nvidia"):  # no loader finds the CUDA libraries in Python packages by itself
            onnxruntime.preload_dlls()
        trt = import_module(built["flavour"])
        self._values, self._gpu, self._device = onnxruntime.OrtValue, _Gpu(device), device
        problem = mismatch(built, self._gpu.capability)
        if problem:
            raise RuntimeError(problem)
        self._log = fresh_log(built["flavour"])
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self._engine is None:
            raise RuntimeError(f"TensorRT cannot read the plan: {self._log.last()}")
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.output = output
        self._types = {
            name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in [*self.inputs, output]
        }
        self._profiles: list[dict[str, Range]] = []
        self._contexts: list[Any] = []
        for number in range(self._engine.num_optimization_profiles):
            shapes = {name: self._engine.get_tensor_profile_shape(name, number) for name in self.inputs}
            self._profiles.append({name: (tuple(low), tuple(high)) for name, (low, _, high) in shapes.items()})
            # By default each context holds memory for the largest of all profiles.
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
            if context is None or not context.set_optimization_profile_async(number, self._gpu.stream):
                raise RuntimeError(f"TensorRT has no memory for the plan's profile {number}: {self._log.last()}")
            self._contexts.append(context)
        self._gpu.synchronize()
        self._slots: OrderedDict[tuple[tuple[int, ...], ...], _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the output for one batch, in host memory.

        Raises:
            ValueError: No profile accepts the batch's shape.
        """
        given = {name: np.ascontiguousarray(batch[name], dtype=self._types[name]) for name in self.inputs}
        with self._lock:
            self._gpu.use()
            slot = self._slot({name: array.shape for name, array in given.items()})
            for name, array in given.items():
                slot.inputs[name].update_inplace(array)
                slot.context.set_input_shape(name, array.shape)
                slot.context.set_tensor_address(name, slot.inputs[name].data_ptr())
            slot.context.set_tensor_address(self.output, slot.answer.data_ptr())
            if not slot.context.execute_async_v3(self._gpu.stream):
                raise RuntimeError(f"TensorRT cannot run the batch: {self._log.last()}")
            self._gpu.synchronize()
            answer: np.ndarray = slot.answer.numpy()
        return answer.astype(np.float32, copy=False)

    def _slot(self, shapes: Mapping[str, tuple[int, ...]]) -> _Slot:
        key = tuple(shapes[name] for name in self.inputs)
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        context = self._contexts[pick_profile(self._profiles, shapes)]
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT does not accept {name} of shape {shape}: {self._log.last()}")
        values = {
            name: self._values.ortvalue_from_shape_and_type(shape, self._types[name], "cuda", self._device)
            for name, shape in shapes.items()
        }
        shape = tuple(context.get_tensor_shape(self.output))
        answer = self._values.ortvalue_from_shape_and_type(shape, self._types[self.output], "cuda", self._device)
        if len(self._slots) >= MOST_SHAPES:
            self._slots.popitem(last=False)
        self._slots[key] = _Slot(context, values, answer)
        return self._slots[key]


class _Slot:
    """The context and the buffers that batches of one shape run with."""

    def __init__(self, context: Any, inputs: dict[str, Any], answer: Any) -> None:
        self.context, self.inputs, self.answer = context, inputs, answer


class _Gpu:
    """The GPU's primary context, which TensorRT and ONNX Runtime use too, and one stream of it.

    It calls the driver's own library, which needs no package. The stream and the default stream wait for each other.
    ONNX Runtime copies on the default stream, so copies and runs keep their order.
    """

    def __init__(self, device: int) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise RuntimeError(
                "there is no NVIDIA driver here (libcuda.so.1), and TensorRT runs only on NVIDIA GPUs"
            ) from None
        number, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(number), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        self._context = context
        self.use()
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self._stream, self.stream = stream, int(stream.value or 0)
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, number)
            parts.append(str(value.value))
        self.capability = ".".join(parts)

    def use(self) -> None:
        """Make the context current in this thread, because CUDA sets contexts for each thread."""
        self._call("cuCtxSetCurrent", self._context)

    def synchronize(self) -> None:
        """Wait until the stream has finished.

        Raises:
            RuntimeError: An operation on the stream failed.
        """
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with the CUDA error {code}")
