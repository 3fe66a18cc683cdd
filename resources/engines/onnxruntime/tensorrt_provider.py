"""ONNX Runtime over its TensorRT provider: one module for what is measured and for what serves.

A release carries a copy of this file beside its `model.py`, so it needs nothing else of this project.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

#: Beside the graph: the provider's settings, and what it built and timed.
SETTINGS_FILE = "provider.json"
#: The settings that are taken from that file. The provider has others, one of which names libraries to load: a file
#: that lies where others may write must not choose what code runs.
SETTINGS = (
    "trt_builder_optimization_level",
    "trt_fp16_enable",
    "trt_layer_norm_fp32_fallback",
    "trt_max_workspace_size",
    "trt_profile_max_shapes",
    "trt_profile_min_shapes",
    "trt_profile_opt_shapes",
)
CACHE_FOLDER = "provider_cache"


class ProviderSession:
    """A loaded graph. `run` takes int64 arrays `[batch, ...]` by input name and answers the output as fp32.

    The provider writes into its cache what it does not find there. An artifact and a release never change, so it gets
    a copy, for as long as the session lives.
    """

    def __init__(self, path: str | Path, output: str, *, device: int = 0, threads: int = 1) -> None:
        folder = Path(path).parent
        settings = read_settings(folder / SETTINGS_FILE)
        self._scratch = tempfile.TemporaryDirectory(prefix="refinery-")
        cache = Path(self._scratch.name) / CACHE_FOLDER
        if (folder / CACHE_FOLDER).is_dir():  # an empty one is no file of an artifact
            shutil.copytree(folder / CACHE_FOLDER, cache)
        cache.mkdir(exist_ok=True)
        self._session = open_provider(path, settings, cache, device=device, threads=threads)
        self.output, self.inputs = output, [item.name for item in self._session.get_inputs()]

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for one batch, on the host."""
        given = {name: np.ascontiguousarray(batch[name]) for name in self.inputs}
        answer: np.ndarray = self._session.run([self.output], given)[0]
        return answer


def read_settings(path: Path) -> dict[str, str]:
    """The provider's settings in that file. Raises ValueError where one is not among SETTINGS."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"{path}: the setting {unknown[0]!r} is none of {', '.join(SETTINGS)}. Build the engine anew.")
    return {name: str(value) for name, value in settings.items()}


def open_provider(
    path: str | Path, settings: Mapping[str, str], cache: Path, *, device: int = 0, threads: int = 1
) -> Any:
    """A session whose engines and timings are kept in the folder `cache`. Raises RuntimeError where TensorRT is not."""
    if find_spec("nvidia"):  # CUDA as Python packages, which no loader finds by itself
        onnxruntime.preload_dlls()
    if find_spec("tensorrt"):  # likewise: importing it loads its libraries, which the provider then finds
        import_module("tensorrt")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    place = {
        "device_id": str(device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    providers = [
        ("TensorrtExecutionProvider", {**settings, **place}),
        ("CUDAExecutionProvider", {"device_id": str(device)}),  # what TensorRT does not take
    ]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    # Where the provider cannot be loaded, ONNX Runtime falls back in silence.
    if session.get_providers()[0] != "TensorrtExecutionProvider":
        raise RuntimeError(
            "ONNX Runtime cannot use TensorRT here: its provider did not load. It needs the libraries of TensorRT 10, "
            "CUDA 13 and cuDNN 9: pip install 'transformer-refinery[tensorrt]' and onnxruntime-gpu[cuda,cudnn]."
        )
    return session
