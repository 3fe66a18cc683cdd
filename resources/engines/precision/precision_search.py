"""The parts that the builders of reduced precision share: the ladder's trials, and the reduction to half precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from resources.accuracy.gate_check import GateCheck
from resources.accuracy.inference import Run
from resources.engines.interface import Goal, Sources
from resources.engines.onnxruntime.runner import OnnxRuntimeRunner, cpu_runner, save_graph, trial_runner
from resources.engines.precision import half_precision as half
from resources.engines.precision.ladder import Operator, Reduced, SearchResult, require_nodes, search
from resources.engines.precision.quantization import SWITCHES
from resources.machine.targets import Device

#: Batches: the inputs by name, and the number of tokens in each row.
Batches = Sequence[tuple[Mapping[str, np.ndarray], Sequence[int]]]


def reduce_to_half(
    model: ir.Model,
    sources: Sources,
    goal: Goal,
    target: Path,
    *,
    kind: half.Kind = "fp16",
    wide: Collection[tuple[str, str]] = (),
    device: Device = "cpu",
) -> Reduced:
    """Write the graph with as much of it in half precision as stays finite and passes the accuracy gates.

    Nodes whose numbers come near the largest number of fp16 on real text stay in fp32 from the start. The ladder finds
    the nodes that miss a gate for another reason. If no trial passes the gates, all nodes that stay finite are in half
    precision and `steps` says so.

    Operators in `wide` are computed in fp32 wherever they are, as in `half_precision.to_half`.
    """
    if goal.kept_nodes is not None:
        require_nodes(goal.kept_nodes, [str(node.name) for node in model.graph])
        known = half.to_half(model, goal.kept_nodes, kind=kind, wide=wide)
        save_graph(known, target, external=sources.graph.external_data)
        return Reduced({}, kept_nodes=goal.kept_nodes)
    gate_check = open_gate_check(goal, sources)
    trial = target.with_name("trial.onnx")
    near = near_overflow(model, trial, sources, gate_check) if kind == "fp16" else {}
    operators = [operator for operator in half.find_operators(model, wide=wide) if not set(operator.nodes) <= set(near)]
    nodes = {operator.name: operator.nodes for operator in operators}
    emulated = device == "cpu"  # see the module `half_precision`

    def single(kept: Collection[str]) -> set[str]:
        return {*near, *(node for name in kept for node in nodes[name])}

    def halved(kept: Collection[str], *, emulated: bool = False) -> ir.Model:
        return half.to_half(model, single(kept), kind=kind, wide=wide, emulated=emulated)

    def running(reduced: Collection[str]) -> Run:
        kept = [operator.name for operator in operators if operator.name not in reduced]
        return trial_runner(halved(kept, emulated=emulated), trial, sources, device).run

    # Each trial has a graph of its own, because a switch would need casts everywhere.
    trials = Trials(running, operators, gate_check)
    outcome = search(operators, trials.damage, trials.misses, trials=goal.trials, seconds=goal.seconds)
    save_graph(halved(outcome.kept), target, external=sources.graph.external_data)
    paths, steps = explained(model, near)
    parameters = {"overflowing_operators": str(len(near)), "ladder": verdict(outcome)}
    if emulated:
        parameters["judged"] = (
            f"in fp32 on a processor, with values rounded to {kind} wherever the engine computes in {kind}"
        )
    kept = tuple(dict.fromkeys([*paths, *outcome.kept]))
    return Reduced(parameters, kept, (*steps, *outcome.steps), tuple(sorted(single(outcome.kept))))


def near_overflow(model: ir.Model, trial: Path, sources: Sources, gate_check: GateCheck) -> dict[str, float]:
    """Return the nodes whose numbers come near the largest number of fp16 on real text.

    Returns:
        The largest number that was seen, by the node's name.
    """
    watching, names = half.watched_values(model)
    runner, seen = cpu_runner(watching, trial, sources), dict.fromkeys(names, 0.0)
    for batch in gate_check.calibration_batches():
        for name, largest in zip(names, runner.outputs([f"{name}_largest" for name in names], batch), strict=True):
            # Not max(), because a NaN must win over all numbers.
            seen[name] = float(largest) if not largest <= seen[name] else seen[name]
    return half.near_overflow(model, seen)


def explained(model: ir.Model, near: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules of the nodes that come near the largest number of fp16, and a sentence for each node."""
    paths = half.paths_of(model, near)
    steps = tuple(
        f"{path} reaches {near[name]:.3g} on real text, near fp16's largest number: kept in fp32"
        for name, path in paths.items()
    )
    return tuple(dict.fromkeys(paths.values())), steps


def verdict(outcome: SearchResult) -> str:
    """Return the result of the ladder as a parameter of the engine."""
    if not outcome.passed:
        return outcome.steps[-1]
    return "gates kept" if outcome.kept else "not needed"


def open_gate_check(goal: Goal, sources: Sources) -> GateCheck:
    """Open the evaluation set that an engine of reduced precision is judged on while it is built."""
    return GateCheck(
        goal.evaluation_folder,
        goal.gates,
        goal.max_batch_size,
        sources.checkpoint,
        sources.checkpoint_folder,
        sources.graph.width,
    )


class Trials:
    """The trials of the ladder.

    Args:
        running: Returns the function that runs a batch with only the operators of those names in low precision.
        operators: All operators that the ladder decides on.
        gate_check: The check that judges the answers.
    """

    def __init__(
        self, running: Callable[[Collection[str]], Run], operators: Sequence[Operator], gate_check: GateCheck
    ) -> None:
        self._running, self._gate_check = running, gate_check
        self._names = [operator.name for operator in operators]

    def damage(self, reduced: Collection[str]) -> float:
        """Return the relative error of the answers with only those operators in low precision.

        The error is infinite if an answer is NaN.
        """
        batches, exact = self._screening
        return _relative_error(_answers(self._running(reduced), batches), exact)

    def misses(self, kept: Collection[str]) -> list[str]:
        """Return the gates that are missed with all operators except those in low precision."""
        return self._gate_check.misses(self._running([name for name in self._names if name not in kept]))

    @cached_property
    def _screening(self) -> tuple[Batches, list[np.ndarray]]:
        """The batches that harm is measured on, and their exact answers.

        They are chosen when harm is first measured, because the hard texts are known only after `misses` has run.
        """
        batches = self._gate_check.screening_batches()
        return batches, _answers(self._running([]), batches)


def switched(runner: OnnxRuntimeRunner, operators: Sequence[Operator]) -> Callable[[Collection[str]], Run]:
    """Return the `running` function of `Trials` for one loaded graph with a switch at each operator."""
    names = [operator.name for operator in operators]

    def running(reduced: Collection[str]) -> Run:
        switches = np.array([name in reduced for name in names])
        return lambda batch: runner.run({**batch, SWITCHES: switches})

    return running


def _answers(run: Run, batches: Batches) -> list[np.ndarray]:
    """Return one array for each row, without the answers for its padding."""
    return [
        row[:count] if row.ndim == 2 else row
        for batch, tokens in batches
        for row, count in zip(run(dict(batch)), tokens, strict=True)
    ]


def _relative_error(found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return the root mean square of the rows' relative errors, or infinity if one is not finite."""
    errors = [
        float(np.linalg.norm(one - other)) / (float(np.linalg.norm(other)) or 1.0)
        for one, other in zip(found, exact, strict=True)
    ]
    total = float(np.sqrt(np.mean(np.square(errors))))
    return total if np.isfinite(total) else float("inf")
