"""The baseline: the checkpoint as transformers loads it, fp32, eager, in inference mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from resources.artifacts.records import Engine
from resources.checkpoints import checkpoint_files, load_arguments
from resources.engines import Built, EngineSpec, Sources
from resources.tasks import TASKS


def build(sources: Sources, spec: EngineSpec, folder: Path) -> Built:
    """Nothing is built: the checkpoint is the engine."""
    del sources, spec, folder
    return Built(entry_file="", parameters={"attention": "as transformers chooses", "mode": "eager"}, operators={})


class TorchRunner:
    """Runs the task's own module, pooling and softmax included, so that it does all that a candidate does."""

    def __init__(self, module: torch.nn.Module, threads: int) -> None:
        torch.set_num_threads(threads)
        self._module = module

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            answer: np.ndarray = self._module(
                **{name: torch.from_numpy(array) for name, array in batch.items()}
            ).numpy()
        return answer


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> TorchRunner:
    """The module of the checkpoint's task."""
    del engine, folder
    checkpoint = sources.checkpoint
    files = checkpoint_files(checkpoint, sources.checkpoint_folder)
    return TorchRunner(TASKS[checkpoint.task].module(files, **load_arguments(checkpoint)), threads)
