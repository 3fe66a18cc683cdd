"""Build the engine of ONNX Runtime's TensorRT provider, with which the direct TensorRT engines are compared.

The provider gets the exported graph in fp32 and chooses what runs in half precision, as it does for its other users. A
graph with explicit types would gain nothing: the provider builds weakly typed networks, for which the types in a graph
are hints. Apart from normalization this project keeps nothing in fp32 either. If a value overflows, the accuracy gates
show it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resources.artifacts.records import Engine
from resources.engines.interface import Built, Sources
from resources.engines.onnxruntime.runner import MODEL_FILE, check_answer, save_graph
from resources.engines.onnxruntime.tensorrt_provider import CACHE_FOLDER, SETTINGS_FILE, ProviderSession, open_provider
from resources.engines.specs import EngineSpec
from resources.engines.tuning import Tuning, check_profiles
from resources.errors import EngineError, first_line
from resources.machine.targets import Device
from resources.tasks import TASKS

if TYPE_CHECKING:
    import numpy as np

    from resources.engines.interface import Goal


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None, device: Device) -> Built:
    """Write the exported graph, and let the provider build its engines beside it.

    Raises:
        EngineError: The provider cannot take the graph, or its engine gives wrong answers to a small batch.
    """
    del spec, device
    import onnx

    assert goal is not None and goal.tuning is not None, "a TensorRT engine is built with a goal and a tuning"
    check_profiles(sources.checkpoint.model, goal.tuning.profiles, sources.checkpoint.max_tokens)
    from resources.engines.precision.tensorrt_precision import plain_graph

    # The graph is written anew, because exporters write stack traces into it, and with them the folders of the machine.
    save_graph(
        plain_graph(sources.graph_folder / MODEL_FILE), folder / MODEL_FILE, external=sources.graph.external_data
    )
    settings = provider_settings(sources.graph.inputs, TASKS[sources.checkpoint.task].extra_inputs, goal.tuning)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    (folder / CACHE_FOLDER).mkdir()
    try:
        open_provider(folder / MODEL_FILE, settings, folder / CACHE_FOLDER)
    except Exception as error:
        raise EngineError(
            f"{sources.checkpoint.model}: ONNX Runtime's TensorRT provider cannot load the graph: {first_line(error)}"
        ) from error
    check_answer(_Runner(folder / MODEL_FILE, sources.graph.output, 1), sources)
    proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
    parameters = {
        "provider": "tensorrt",
        "cached_engines": str(len(list((folder / CACHE_FOLDER).glob("*.engine")))),
        **settings,
    }
    return Built(MODEL_FILE, parameters, dict(Counter(node.op_type for node in proto.graph.node)))


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> _Runner:
    """Return a session that runs the graph with the engines that were built beside it."""
    del sources
    return _Runner(folder / engine.entry_file, engine.output, threads)


class _Runner:
    """A session of the TensorRT provider on the first GPU."""

    def __init__(self, model: Path, output: str, threads: int) -> None:
        try:
            self._session = ProviderSession(model, output, threads=threads)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self._session.run(batch)


def provider_settings(inputs: Sequence[str], extra: Sequence[str], tuning: Tuning) -> dict[str, str]:
    """Return the provider's options that determine what it builds.

    There is one profile for all shapes, because the provider writes several profiles down but runs only the first
    (https://github.com/microsoft/onnxruntime/pull/31624, open in November 2026). It is tuned for the best shape of the
    middle one of the profiles.
    """
    profiles = sorted(tuning.profiles, key=lambda profile: profile.best.batch * profile.best.sequence)
    best = profiles[len(profiles) // 2].best
    largest = (max(profile.batch for profile in profiles), max(profile.longest for profile in profiles))

    def shapes(rows: int, tokens: int) -> str:
        return ",".join(f"{name}:{rows}x{1 if name in extra else tokens}" for name in inputs)

    return {
        "trt_fp16_enable": "1",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_builder_optimization_level": str(tuning.settings.optimization_level),
        "trt_max_workspace_size": str(int(tuning.settings.workspace_gb * 1e9)),
        "trt_profile_min_shapes": shapes(1, 1),
        "trt_profile_opt_shapes": shapes(best.batch, best.sequence),
        "trt_profile_max_shapes": shapes(*largest),
    }
