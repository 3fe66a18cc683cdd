"""An embedded Triton that plays a server with Triton's own ONNX Runtime backend, where that is not installed.

Triton looks for a backend's folder by the name that a model's configuration gives. The folder here holds a `model.py`
(Triton's documentation calls it a Python-based backend) that runs the graph by ONNX Runtime's Python package. So
releases of the `native` flavour load from their own configurations, warm-up and instances included. What the real
backend does with its parameters is not played.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from resources.triton import server
from resources.triton.launch import assemble_backends

_BACKEND = """
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._inputs = [item["name"] for item in config["input"]]
        self._output = config["output"][0]["name"]
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        graph = graph / "model.onnx" if graph.is_dir() else graph
        self._session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        responses = []
        for request in requests:
            arrays = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            (answer,) = self._session.run([self._output], arrays)
            tensor = pb_utils.Tensor(self._output, answer.astype(np.float32))
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return responses
"""


def play_native_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every embedded server that starts from now on a backend called `onnxruntime`."""

    def assemble_with_it(environment: Path, folder: Path) -> None:
        assemble_backends(environment, folder)
        # Triton refuses to start a backend of this kind by a link that leads out of the folder.
        library = folder / "python" / "libtriton_python.so"
        real = library.resolve()
        library.unlink()
        shutil.copyfile(real, library)
        (folder / "onnxruntime").mkdir()
        (folder / "onnxruntime" / "model.py").write_text(_BACKEND)

    monkeypatch.setattr(server, "assemble_backends", assemble_with_it)
