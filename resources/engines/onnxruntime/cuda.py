"""Run ONNX Runtime on one NVIDIA GPU, with bound buffers and a CUDA graph for each shape.

The benchmark and the served release use the same module. A release carries a copy of this file beside its `model.py`,
so the file imports nothing else of this project.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime

#: Shapes with more tokens compute for so long that launching their kernels one by one costs nothing.
MOST_TOKENS_OF_A_GRAPH = 16384
#: Every graph keeps its buffers. Shapes that come after this many run without a graph.
MOST_GRAPHS = 128
#: Accuracy comes first. Products in fp32 do not use TF32, and a normalization sums in fp32, which costs less than one
#: percent.
SETTINGS = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}
#: Graphs are captured only for these numbers of rows, and smaller batches are filled up to the next of them. A server
#: that batches sees every number of rows sooner or later, and capturing a graph takes as long as a hundred runs.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
#: Tells ONNX Runtime to run without capturing.
_NO_GRAPH = "-1"


class CudaSession:
    """A loaded graph that runs on one GPU.

    `run` takes int64 arrays `[batch, ...]` by input name and returns the output as fp32.

    Args:
        graphs: Whether to capture CUDA graphs. If a node of the graph has no kernel on the GPU, the session runs
            without them and gives the reason in `why_no_graphs`.
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
        self.why_no_graphs = "" if graphs else "not requested"
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
        """Return the output for one batch, in host memory."""
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
        """Capture the CUDA graphs of the batches until the time is over.

        Args:
            batches: Batches of one row each, one for each length. Each is captured with every number of rows in `ROWS`.
            most_rows: The largest number of rows that will run. Graphs for more rows are not captured.
            seconds: How long the captures may take. One that has begun is completed.

        Returns:
            The number of shapes that now have a graph.
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
        """Return the bound buffers and captured graph of the batch's shapes, or None if they run without a graph."""
        key = tuple(sorted((name, array.shape) for name, array in batch.items()))
        if key in self._slots:
            return self._slots[key]
        tokens = max(array.size for array in batch.values())
        if not self.graphs or tokens > MOST_TOKENS_OF_A_GRAPH or len(self._slots) >= MOST_GRAPHS:
            return None
        self._slots[key] = _Slot(self._session, self.output, batch, self.device, len(self._slots) + 1)
        return self._slots[key]


def rows_of_a_graph(rows: int) -> int:
    """Return the number of rows that a batch of `rows` rows is filled up to.

    It is the next number in `ROWS`, or `rows` itself if that is larger than all of them.
    """
    return next((size for size in ROWS if size >= rows), rows)


def fill(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Return the arrays with `rows` rows, by repeating the first row at the end."""
    return {
        name: np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)]) if len(array) < rows else array
        for name, array in batch.items()
    }


class _Slot:
    """The buffers of one shape, at fixed addresses, and the CUDA graph that reads and writes them."""

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
        """Run the graph on the numbers in the inputs, and return when the answer is complete."""
        self._session.run_with_iobinding(self._binding, self._options)


def _open(path: object, threads: int, settings: Mapping[str, str]) -> Any:
    if find_spec("nvidia"):  # no loader finds the CUDA libraries in Python packages by itself
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", dict(settings))])
    # If the provider cannot be loaded, ONNX Runtime falls back to the CPU without an error.
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(
            "ONNX Runtime cannot use CUDA here: its CUDA provider did not load. It needs CUDA 13 and cuDNN 9 on "
            "LD_LIBRARY_PATH, or `pip install onnxruntime-gpu[cuda,cudnn]`."
        )
    return session
