"""Run ONNX Runtime with its TensorRT provider.

The benchmark and the served release use the same module. A release carries a copy of this file beside its `model.py`,
so the file imports nothing else of this project.
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

#: The file beside the graph that holds the provider's settings. `CACHE_FOLDER`, also beside the graph, holds the
#: engines that the provider built and its timings.
SETTINGS_FILE = "provider.json"
#: The settings that are read from that file. The provider has others, and one of them names libraries to load. A file
#: that others may be able to write must not choose which code runs.
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
    """A loaded graph that runs with the TensorRT provider.

    `run` takes int64 arrays `[batch, ...]` by input name and returns the output as fp32. The provider adds to its cache
    what it does not find there. Artifacts and releases never change, so the provider works on a copy of the cache that
    exists as long as the session.
    """

    def __init__(self, path: str | Path, output: str, *, device: int = 0, threads: int = 1) -> None:
        folder = Path(path).parent
        settings = read_settings(folder / SETTINGS_FILE)
        self._scratch = tempfile.TemporaryDirectory(prefix="refinery-")
        cache = Path(self._scratch.name) / CACHE_FOLDER
        if (folder / CACHE_FOLDER).is_dir():  # an artifact does not keep empty folders
            shutil.copytree(folder / CACHE_FOLDER, cache)
        cache.mkdir(exist_ok=True)
        self._session = open_provider(path, settings, cache, device=device, threads=threads)
        self.output, self.inputs = output, [item.name for item in self._session.get_inputs()]

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the output for one batch, in host memory."""
        given = {name: np.ascontiguousarray(batch[name]) for name in self.inputs}
        answer: np.ndarray = self._session.run([self.output], given)[0]
        return answer


def read_settings(path: Path) -> dict[str, str]:
    """Return the provider's settings from that file.

    Raises:
        ValueError: The file contains a setting that is not in `SETTINGS`.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(
            f"{path}: the setting {unknown[0]!r} is not one of {', '.join(SETTINGS)}. Build the engine again."
        )
    return {name: str(value) for name, value in settings.items()}


def open_provider(
    path: str | Path, settings: Mapping[str, str], cache: Path, *, device: int = 0, threads: int = 1
) -> Any:
    """Open a session that keeps its engines and timings in the folder `cache`.

    Raises:
        RuntimeError: TensorRT cannot be loaded.
    """
    if find_spec("nvidia"):  # no loader finds the CUDA libraries in Python packages by itself
        onnxruntime.preload_dlls()
    if find_spec("tensorrt"):  # importing it loads its libraries, which the provider then finds
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
        ("CUDAExecutionProvider", {"device_id": str(device)}),  # runs the operators that TensorRT does not support
    ]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    # If the provider cannot be loaded, ONNX Runtime falls back to another one without an error.
    if session.get_providers()[0] != "TensorrtExecutionProvider":
        raise RuntimeError(
            "ONNX Runtime cannot use TensorRT here: its provider did not load. It needs the libraries of TensorRT 10, "
            "CUDA 13 and cuDNN 9. Install 'transformer-refinery[tensorrt]' and onnxruntime-gpu[cuda,cudnn] with pip."
        )
    return session
