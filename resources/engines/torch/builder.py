"""The baseline: the checkpoint as transformers loads it, in fp32, eager, in inference mode.

It has no `build`, because there is nothing to build.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from resources.artifacts.records import Engine
from resources.checkpoints.collect import checkpoint_files
from resources.engines.interface import Sources
from resources.machine.targets import Device, device_of
from resources.tasks import TASKS


class TorchRunner:
    """The task's own PyTorch module.

    It includes pooling and softmax, so that the baseline does everything that a candidate does.
    """

    def __init__(self, module: torch.nn.Module, threads: int, device: Device = "cpu") -> None:
        torch.set_num_threads(threads)
        self._device = device
        self._module = module.to(device)

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Return the module's output for one batch."""
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array).to(self._device) for name, array in batch.items()}
            answer: np.ndarray = self._module(**inputs).cpu().numpy()
        return answer


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> TorchRunner:
    """Load the module of the checkpoint's task."""
    del folder
    checkpoint = sources.checkpoint
    files = checkpoint_files(checkpoint, sources.checkpoint_folder, sources.trust)
    module = TASKS[checkpoint.task].module(files, **sources.trust.load_arguments)
    return TorchRunner(module, threads, device_of(engine.target))
