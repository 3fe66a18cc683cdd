"""The interface that every runtime implements, and the two functions that call it.

Only `build` and `load` import the module of a runtime, and both run inside child processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resources.boundary.trust import Trust
from resources.engines.specs import EngineSpec
from resources.engines.tuning import Tuning
from resources.machine.targets import Device
from resources.tasks import Gates

if TYPE_CHECKING:
    import numpy as np

    from resources.artifacts.records import Checkpoint, Engine, OnnxGraph


@dataclass(frozen=True)
class Sources:
    """The checkpoint and the graph that engines are built from and run with.

    Every runtime uses the parts that it needs.

    Args:
        trust: What the loading of the checkpoint may do. By default it runs none of the checkpoint's own code.
    """

    checkpoint: Checkpoint
    checkpoint_folder: Path
    graph: OnnxGraph
    graph_folder: Path
    trust: Trust = field(default_factory=Trust)


@dataclass(frozen=True)
class Goal:
    """The accuracy that an engine of reduced precision has to reach, and the limits of its builder's search.

    Args:
        evaluation_folder: The evaluation set that the engine is judged on and calibrated with.
        gates: The accuracy gates that the engine has to pass.
        max_batch_size: The largest batch that is served.
        trials: How many trials the search may run after the first.
        seconds: How long the search may take.
        kept_nodes: The nodes to leave in higher precision, if they are known already (see `Built`). The builder then
            searches for nothing.
        tuning: The shapes and settings of an engine that is tuned to shapes.
    """

    evaluation_folder: Path
    gates: Gates
    max_batch_size: int
    trials: int
    seconds: float
    kept_nodes: tuple[str, ...] | None = None
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Built:
    """The result of a build: the files in its folder, and how the builder came to them.

    Args:
        entry_file: The file that `load` opens.
        parameters: The settings that the engine was built with.
        operators: The number of nodes of each operator type.
        kept: The operators that stay in a higher precision than the spec's.
        steps: The trials that found those operators, one sentence each.
        kept_nodes: The nodes of the fused graph that `kept` stands for. A builder that gets them as `Goal.kept_nodes`
            makes the same engine without a search.
        documents: Files that only people read.
    """

    entry_file: str
    parameters: dict[str, str]
    operators: dict[str, int]
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    kept_nodes: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


class Runner(Protocol):
    """A loaded engine that answers batches.

    `run` takes int64 arrays `[batch, sequence]` by input name. It returns fp32 `[batch, width]`, or
    `[batch, sequence, width]` if the task answers for each token.
    """

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Return the engine's answer to a batch."""


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None = None, device: Device = "cpu") -> Built:
    """Build an engine for the device into an empty folder.

    The function runs in a child process. Specs that are `examined` need a goal.

    Raises:
        EngineError: The engine cannot be built.
    """
    built: Built = _module(spec.runtime, spec.provider).build(sources, spec, folder, goal, device)
    return built


def load(engine: Engine, folder: Path, sources: Sources, threads: int, *, spinning: bool = True) -> Runner:
    """Load a built engine that runs with the given number of threads.

    The function runs in a child process. Only the runtimes in `SPINNING` accept `spinning=False`; `ThreadSetting` says
    what it means.

    Raises:
        EngineError: The engine cannot be loaded.
    """
    choice = {} if spinning else {"spinning": False}
    module = _module(engine.runtime, engine.parameters.get("provider", ""))
    runner: Runner = module.load(engine, folder, sources, threads, **choice)
    return runner


def _module(runtime: str, provider: str) -> Any:
    return import_module(f"resources.engines.{runtime}.{'_'.join(filter(None, (provider, 'builder')))}")
