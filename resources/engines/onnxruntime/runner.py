"""Run graphs with ONNX Runtime on the CPU or on the first GPU.

Only child processes import this module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resources.engines.interface import Runner, Sources
from resources.engines.onnxruntime.sessions import open_session
from resources.errors import EngineError, first_line
from resources.machine.targets import Device
from resources.pipelines.tokenization import TextEncoder
from resources.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir

MODEL_FILE = "model.onnx"


def save_graph(model: onnx_ir.Model, path: Path, *, external: bool) -> None:
    """Write a graph, with its weights in a file beside it if `external` is set.

    The graph's metadata is left out, because exporters write stack traces into it, and with them the folders of the
    machine.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def cpu_runner(model: onnx_ir.Model, path: Path, sources: Sources, *, as_written: bool = False) -> OnnxRuntimeRunner:
    """Load the graph to run on the CPU, from a file that is deleted again.

    With `as_written`, QuantizeLinear and DequantizeLinear run as operators of their own, instead of becoming part of a
    product.
    """
    runner = trial_runner(model, path, sources, "cpu", as_written=as_written)
    assert isinstance(runner, OnnxRuntimeRunner), "an OnnxRuntimeRunner runs the graph on the CPU"
    return runner


def trial_runner(
    model: onnx_ir.Model, path: Path, sources: Sources, device: Device, *, as_written: bool = False
) -> OnnxRuntimeRunner | CudaRunner:
    """Load the graph from a file that is deleted again.

    It runs with all cores, because nothing is measured during a trial.
    """
    try:
        save_graph(model, path, external=True)  # otherwise the runtime holds every weight twice while it loads
        return open_runner(
            path, sources.graph.output, len(os.sched_getaffinity(0)), device, graphs=False, as_written=as_written
        )
    finally:
        for leftover in path.parent.glob(f"{path.name}*"):
            leftover.unlink()


def check_answer(runner: Runner, sources: Sources) -> None:
    """Check that the engine answers a small batch with finite numbers of the expected shape.

    Raises:
        EngineError: The answer has another shape, or one of its numbers is not finite.
    """
    task = TASKS[sources.checkpoint.task]
    rows, tokens = 2, 8
    encoder = TextEncoder.from_folder(str(sources.checkpoint_folder))
    answer = runner.run(encoder.example(rows, tokens, task.extra_inputs))
    expected = (rows, tokens, sources.graph.width) if task.per_token else (rows, sources.graph.width)
    if answer.shape != expected or not np.isfinite(answer).all():
        raise EngineError(
            f"The engine's answer to a small batch is wrong: it has the shape {answer.shape} and begins with the "
            f"values {answer.ravel()[:4]}."
        )


class OnnxRuntimeRunner:
    """An ONNX Runtime session on the CPU."""

    def __init__(
        self, model: Path, output: str, threads: int, *, spinning: bool = True, as_written: bool = False
    ) -> None:
        try:
            self._session = open_session(str(model), threads, spinning=spinning, as_written=as_written)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
        self._output = output
        self._inputs = {item.name for item in self._session.get_inputs()}

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the graph's output for one batch."""
        return self.outputs([self._output], batch)[0]

    def outputs(self, names: Sequence[str], batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of those names."""
        answers: list[np.ndarray] = self._session.run(
            list(names), {name: array for name, array in batch.items() if name in self._inputs}
        )
        return answers


class CudaRunner:
    """An ONNX Runtime session on the first GPU."""

    def __init__(self, model: Path, output: str, threads: int, *, graphs: bool = True) -> None:
        from resources.engines.onnxruntime.cuda import CudaSession

        try:
            self._session = CudaSession(model, output, graphs=graphs, threads=threads)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error

    @property
    def why_no_graphs(self) -> str:
        """The reason why no CUDA graphs are captured; empty if they are."""
        return self._session.why_no_graphs

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the graph's output for one batch."""
        return self._session.run(batch)


def open_runner(
    path: Path,
    output: str,
    threads: int,
    device: Device,
    *,
    graphs: bool = True,
    spinning: bool = True,
    as_written: bool = False,
) -> OnnxRuntimeRunner | CudaRunner:
    """Load a graph from its file to run on the device."""
    if device == "cuda":
        return CudaRunner(path, output, threads, graphs=graphs)
    return OnnxRuntimeRunner(path, output, threads, spinning=spinning, as_written=as_written)
