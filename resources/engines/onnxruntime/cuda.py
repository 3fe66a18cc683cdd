"""ONNX Runtime on one NVIDIA GPU: bound buffers, and a CUDA graph for every shape that is seen.

One module for what is measured and for what serves: a release carries a copy of this file beside its `model.py`, so it
needs nothing else of this project.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime

#: Shapes of more tokens are computing for so long that launching their kernels one by one costs nothing.
MOST_TOKENS_OF_A_GRAPH = 16384
#: Every graph keeps its buffers; what comes after so many shapes runs without one.
MOST_GRAPHS = 128
#: Accuracy first: fp32 is fp32, and the sums of a normalization are fp32 too, which costs under one percent.
SETTINGS = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}
#: Graphs are captured for these numbers of rows alone, and fewer rows are filled up: a server that batches has all
#: numbers sooner or later, and capturing one takes as long as a hundred runs.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
#: Tells ONNX Runtime to run without capturing.
_NO_GRAPH = "-1"


class CudaSession:
    """A loaded graph. `run` takes int64 arrays `[batch, ...]` by input name and answers the output as fp32.

    graphs: whether CUDA graphs are captured. It falls back to running without where a node of the graph has no kernel
    on the GPU, and `why_no_graphs` then says so.
    """

    def __init__(
        self,
        path: object,
        output: str,
        *,
        device: int = 0,
        graphs: bool = True,
        threads: int = 1,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.output, self.device = output, device
        self.why_no_graphs = "" if graphs else "not asked for"
        settings = {**SETTINGS, "device_id": str(device), **(options or {})}
        session: Any = None
        if graphs:
            try:
                session = _open(path, threads, {**settings, "enable_cuda_graph": "1"})
            except Exception as error:
                if "graph" not in str(error).lower():
                    raise
                self.why_no_graphs = str(error).strip().split("\n")[0][:200]
        self._session = _open(path, threads, settings) if session is None else session
        self.graphs = not self.why_no_graphs
        self.inputs = [item.name for item in self._session.get_inputs()]
        self._slots: dict[tuple[tuple[str, tuple[int, ...]], ...], _Slot] = {}
        self._lock = threading.Lock()

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for one batch, on the host."""
        given = {name: np.ascontiguousarray(batch[name]) for name in self.inputs}
        rows = len(given[self.inputs[0]])
        filled = fill(given, rows_of_a_graph(rows))
        with self._lock:
            slot = self.slot(filled)
            if slot is None:
                options = onnxruntime.RunOptions()
                if self.graphs:
                    options.add_run_config_entry("gpu_graph_id", _NO_GRAPH)
                answer: np.ndarray = self._session.run([self.output], given, options)[0]
                return answer
            for name, array in filled.items():
                slot.inputs[name].update_inplace(array)
            slot.run()
            found: np.ndarray = slot.answer.numpy()[:rows]
            return found

    def warm(self, batches: Iterable[Mapping[str, np.ndarray]], most_rows: int, seconds: float) -> int:
        """Capture the graphs of every number of rows of each batch, until the time is over; how many.

        batches: of one row each, a length after the other.
        """
        end, made = time.monotonic() + seconds, 0
        for batch in batches:
            given = {name: np.ascontiguousarray(batch[name]) for name in self.inputs}
            for rows in (size for size in ROWS if size <= rows_of_a_graph(most_rows)):
                if time.monotonic() > end:
                    return made
                with self._lock:
                    made += self.slot(fill(given, rows)) is not None
        return made

    def slot(self, batch: Mapping[str, np.ndarray]) -> _Slot | None:
        """The bound buffers and captured graph of a batch's shapes; None where they run without."""
        key = tuple(sorted((name, array.shape) for name, array in batch.items()))
        if key in self._slots:
            return self._slots[key]
        tokens = max(array.size for array in batch.values())
        if not self.graphs or tokens > MOST_TOKENS_OF_A_GRAPH or len(self._slots) >= MOST_GRAPHS:
            return None
        self._slots[key] = _Slot(self._session, self.output, batch, self.device, len(self._slots) + 1)
        return self._slots[key]


def rows_of_a_graph(rows: int) -> int:
    """With how many rows so many run: the next number that has a graph, or, beyond them, so many."""
    return next((size for size in ROWS if size >= rows), rows)


def fill(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The arrays with so many rows, the first one repeated at the end."""
    return {
        name: np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)]) if len(array) < rows else array
        for name, array in batch.items()
    }


class _Slot:
    """Buffers of one shape at addresses that stay, and the graph that reads and writes them."""

    def __init__(self, session: Any, output: str, batch: Mapping[str, np.ndarray], device: int, number: int) -> None:
        self._session = session
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self.inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", device) for name, array in batch.items()
        }
        plain = onnxruntime.RunOptions()
        plain.add_run_config_entry("gpu_graph_id", _NO_GRAPH)
        shape = session.run([output], dict(batch), plain)[0].shape
        self.answer = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", device)
        self._binding = session.io_binding()
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(output, self.answer)
        self.run()

    def run(self) -> None:
        """One run on what the inputs hold; the answer is there when it returns."""
        self._session.run_with_iobinding(self._binding, self._options)


def _open(path: object, threads: int, settings: Mapping[str, str]) -> Any:
    if find_spec("nvidia"):  # CUDA as Python packages, which no loader finds by itself
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", dict(settings))])
    # Where the provider cannot be loaded, ONNX Runtime falls back to the CPU in silence.
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(
            "ONNX Runtime cannot use CUDA here: its CUDA provider did not load. It needs CUDA 13 and cuDNN 9 on "
            "LD_LIBRARY_PATH, or `pip install onnxruntime-gpu[cuda,cudnn]`."
        )
    return session
