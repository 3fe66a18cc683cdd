"""ONNX Runtime: the exported graph with its attention fused, in fp32 or with int8 weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx

from resources.artifacts.records import Engine
from resources.engines import Built, EngineSpec, Sources
from resources.engines.sessions import open_session
from resources.errors import EngineError
from resources.tasks import TASKS

MODEL_FILE = "model.onnx"


def build(sources: Sources, spec: EngineSpec, folder: Path) -> Built:
    """Fuse, then quantize where the spec says so, and run the result once before it counts as built."""
    model = folder / MODEL_FILE
    graph = sources.graph_folder / MODEL_FILE
    external = sources.graph.external_data
    if spec.precision == "fp32":
        fusions = _fuse(graph, model, external)
        parameters = {"fusion": "onnxscript ort_fusions", **{f"fused_{name}": str(n) for name, n in fusions.items()}}
    elif spec.precision == "int8":
        # Beside the result, not in a temporary folder elsewhere: large models need the room of the store's disk.
        fused = folder / "fused.onnx"
        fusions = _fuse(graph, fused, external)
        _quantize(fused, model, external)
        for leftover in folder.glob("fused.onnx*"):
            leftover.unlink()
        parameters = {"fusion": "onnxscript ort_fusions", "quantization": "dynamic", "weights": "int8 by channel"}
    else:
        raise EngineError(f"{spec.name}: {spec.precision} is not built for CPUs.")
    _try_once(model, sources)
    proto = onnx.load(model, load_external_data=False)
    return Built(MODEL_FILE, parameters, dict(Counter(node.op_type for node in proto.graph.node)))


def _fuse(source: Path, target: Path, external: bool) -> dict[str, int]:
    """Rewrite attention, normalization and activation into ONNX Runtime's own operators; count the fusions.

    `onnxruntime.transformers.optimizer` knows the patterns of the old exporter only: on the graphs of today's it fuses
    no attention at all, and `onnxscript`'s rules fuse all of it.
    """
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, counts = optimize_for_ort(onnx_ir.load(source))
    onnx_ir.save(model, target, external_data=f"{target.name}.data" if external else None)
    return {name: int(count) for name, count in counts.items() if count}


def _quantize(source: Path, target: Path, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The quantizer transposes the weights of a head (Gemm, transB), and then stumbles over their old shapes, which the
    # exporter wrote down beside them. Those of inner values stay: it cannot infer them behind fused operators.
    proto = onnx.load(source, load_external_data=False)
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, source)
    # By channel: with one scale a tensor the cosine of all-MiniLM-L6-v2 with itself in fp32 falls to 0.88.
    quantize_dynamic(
        source,
        target,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Attention"],
        use_external_data_format=external,
    )


def _try_once(model: Path, sources: Sources) -> None:
    """Raise EngineError where the runtime refuses the graph or answers with anything but finite numbers."""
    runner = OnnxRuntimeRunner(model, sources.graph.output, threads=1)
    task = TASKS[sources.checkpoint.task]
    shape = (2, 8)
    batch = {
        name: np.ones((2, 1) if name in task.extra_inputs else shape, dtype=np.int64) for name in sources.graph.inputs
    }
    if "token_type_ids" in batch:
        batch["token_type_ids"][:] = 0
    answer = runner.run(batch)
    expected = (*shape, sources.graph.width) if task.per_token else (2, sources.graph.width)
    if answer.shape != expected or not np.isfinite(answer).all():
        raise EngineError(f"The engine answers {answer.shape} with values {answer.ravel()[:4]} to a batch of ones.")


class OnnxRuntimeRunner:
    """One session on the CPU."""

    def __init__(self, model: Path, output: str, threads: int) -> None:
        try:
            self._session = open_session(str(model), threads)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0][:300]}") from error
        self._output = output
        self._inputs = {item.name for item in self._session.get_inputs()}

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        feed = {name: array for name, array in batch.items() if name in self._inputs}
        answer: np.ndarray = self._session.run([self._output], feed)[0]
        return answer


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> OnnxRuntimeRunner:
    """A session over the engine's graph."""
    del sources
    return OnnxRuntimeRunner(folder / engine.entry_file, engine.output, threads)
