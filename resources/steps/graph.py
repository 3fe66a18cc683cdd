"""All steps, in the order in which they are done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from resources.engines.specs import BASELINE, ENGINES
from resources.steps.benchmark import BenchmarkStep, ServedBenchmarkStep
from resources.steps.champion import ChampionStep
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.engine import EngineStep
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.onnx_graph import ONNX_GRAPH
from resources.steps.reference import REFERENCE
from resources.steps.serving_benchmark import ServingBenchmarkStep
from resources.steps.serving_configuration import ServingConfigurationStep
from resources.steps.step import Node
from resources.steps.triton_repository import ReleaseStep

#: The steps that all targets share.
COMMON: tuple[Node, ...] = (CHECKPOINT, EVALUATION_SET, REFERENCE, ONNX_GRAPH)


@dataclass(frozen=True)
class TargetSteps:
    """The steps of one target."""

    target: str
    engines: tuple[EngineStep, ...]
    benchmarks: tuple[BenchmarkStep, ...]
    served: ServedBenchmarkStep
    champion: ChampionStep
    configuration: ServingConfigurationStep
    release: ReleaseStep
    serving_benchmark: ServingBenchmarkStep

    def __iter__(self) -> Iterator[Node]:
        """Yield the steps in the order in which they are done."""
        yield from self.engines
        yield from self.benchmarks
        yield from (self.served, self.champion, self.configuration, self.release, self.serving_benchmark)


@cache
def steps_of(target: str) -> TargetSteps:
    """Return the steps of a target."""
    engines = tuple(EngineStep(spec, target) for spec in ENGINES)
    baseline = next(engine for engine in engines if engine.spec.name == BASELINE)
    benchmarks = tuple(BenchmarkStep(engine, baseline) for engine in engines)
    served = ServedBenchmarkStep(engines, baseline)
    champion = ChampionStep(target, engines, benchmarks, served)
    configuration = ServingConfigurationStep(target, champion)
    release = ReleaseStep(target, champion, configuration)
    return TargetSteps(
        target, engines, benchmarks, served, champion, configuration, release, ServingBenchmarkStep(target, release)
    )
