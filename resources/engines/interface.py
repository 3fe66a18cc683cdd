"""What every runtime takes and gives, and the two functions that lead to it.

The module of a runtime is imported by `build` and `load` alone, inside child processes.
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
    """What engines are built from and run with. Every runtime takes the parts it needs.

    trust: what loading the checkpoint may do. By default it runs no code of the checkpoint's.
    """

    checkpoint: Checkpoint
    checkpoint_folder: Path
    graph: OnnxGraph
    graph_folder: Path
    trust: Trust = field(default_factory=Trust)


@dataclass(frozen=True)
class Goal:
    """What a reduced-precision engine has to reach, and how much its builder may try for it.

    kept_nodes: where it is known already, what to leave in higher precision (see engines.Built): nothing is searched.
    tuning: of engines that are tuned to shapes.
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
    """What a build left in its folder.

    parameters: the knobs it was built with; operators: nodes by type; kept: operators left in higher precision than the
    spec's; steps: what was tried to find those, a sentence each. kept_nodes: the nodes of the fused graph that `kept`
    stands for; given as Goal.kept_nodes they give the same engine without a search. documents: files for people alone.
    """

    entry_file: str
    parameters: dict[str, str]
    operators: dict[str, int]
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    kept_nodes: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


class Runner(Protocol):
    """An engine, loaded. `run` takes int64 arrays `[batch, sequence]` by input name, and answers fp32 `[batch, width]`,
    or `[batch, sequence, width]` where the task is one of tokens.
    """

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray: ...


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None = None, device: Device = "cpu") -> Built:
    """Build an engine for the device into an empty folder. Runs in a child process; raises EngineError.

    goal: what it has to reach, for specs that are `examined`.
    """
    built: Built = _module(spec.runtime, spec.provider).build(sources, spec, folder, goal, device)
    return built


def load(engine: Engine, folder: Path, sources: Sources, threads: int, *, spinning: bool = True) -> Runner:
    """Load a built engine to run with so many threads. Runs in a child process; raises EngineError.

    spinning: see ThreadSetting; only runtimes that are among `SPINNING` can do without.
    """
    choice = {} if spinning else {"spinning": False}
    module = _module(engine.runtime, engine.parameters.get("provider", ""))
    runner: Runner = module.load(engine, folder, sources, threads, **choice)
    return runner


def _module(runtime: str, provider: str) -> Any:
    return import_module(f"resources.engines.{runtime}.{'_'.join(filter(None, (provider, 'builder')))}")
