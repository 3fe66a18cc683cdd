"""The rules about ensembles: the models of their steps, and the tensors that pass between the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from resources.triton.lint.findings import Finding
from resources.triton.lint.graphs import type_name

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelEnsembling

    from resources.triton.lint.model import Model


def ensemble_findings(model: Model, models: Mapping[str, Model]) -> Iterator[Finding]:
    """Yield the findings in the ensemble's steps, maps and outputs."""
    config = model.config
    assert config is not None
    steps = config.ensemble_scheduling.step
    if not steps:
        yield model.at("ensemble-step", "has no steps.", near="platform")
    made: dict[str, str] = {item.name: "an input" for item in config.input}
    read: set[str] = {item.name for item in config.output}
    waits: dict[int, set[str]] = {}
    types: dict[str, tuple[int, str]] = {item.name: (item.data_type, "the input") for item in config.input}
    seen: Counter[str] = Counter()
    for number, step in enumerate(steps):
        near, nth = f'"{step.model_name}"', seen[step.model_name]
        seen[step.model_name] += 1
        yield from _step(model, step, models.get(step.model_name), near, nth)
        waits[number] = set(step.input_map.values())
        read |= waits[number]
        for tensor in step.output_map.values():
            if tensor in made:
                what = f"{tensor!r} is made by {step.model_name} and is {made[tensor]} too."
                yield model.at("ensemble-map", what, near=near, nth=nth)
            made[tensor] = f"made by {step.model_name}"
        for tensor, type_ in _types(step.output_map, models.get(step.model_name), outputs=True):
            types.setdefault(tensor, (type_, step.model_name))
    uses = [
        (tensor, type_, step.model_name)
        for step in steps
        for tensor, type_ in _types(step.input_map, models.get(step.model_name), outputs=False)
    ]
    for tensor, type_, name in (*uses, *((item.name, item.data_type, "the output") for item in config.output)):
        if tensor in types and types[tensor][0] != type_ and type_ and types[tensor][0]:
            what = (
                f"{tensor!r} is {type_name(types[tensor][0])} of {types[tensor][1]}, and {type_name(type_)} for {name}."
            )
            yield model.at("tensor-type", what, near=f'"{tensor}"')
    for tensor in sorted(read - set(made)):
        yield model.at("ensemble-map", f"nothing makes {tensor!r}.", near=f'"{tensor}"')
    for tensor in sorted(set(made) - read - {item.name for item in config.input}):
        yield model.at("ensemble-unused", f"nothing reads {tensor!r}.", near=f'"{tensor}"')
    # Take away the steps that can be computed, one after the other. The steps that are left wait for themselves.
    there = {item.name for item in config.input} | (read - set(made))
    readers: dict[str, list[int]] = {}
    for number, tensors in waits.items():
        waits[number] = tensors - there
        for tensor in waits[number]:
            readers.setdefault(tensor, []).append(number)
    ready = [number for number, tensors in waits.items() if not tensors]
    while ready:
        number = ready.pop()
        del waits[number]
        for tensor in set(steps[number].output_map.values()):
            for reader in readers.pop(tensor, ()):
                waits[reader].discard(tensor)
                if not waits[reader]:
                    ready.append(reader)
    for number in waits:
        name = steps[number].model_name
        yield model.at("ensemble-cycle", f"{name} waits for what it makes itself.", near=f'"{name}"')


def _types(names: Mapping[str, str], target: Model | None, *, outputs: bool) -> Iterator[tuple[str, int]]:
    """Yield the ensemble's tensors of a map, with the types that the step's configuration gives them."""
    if target is not None and target.config is not None:
        items = target.config.output if outputs else target.config.input
        yield from ((names[item.name], item.data_type) for item in items if item.name in names)


def _step(model: Model, step: ModelEnsembling.Step, target: Model | None, near: str, nth: int) -> Iterator[Finding]:
    assert model.config is not None
    name = step.model_name

    def at(rule: str, message: str, place: str = near) -> Finding:
        return model.at(rule, message, near=place, nth=nth if place == near else 0)

    if target is None:
        yield at("ensemble-step", f"{name!r} is not in the repository.")
        return
    if step.model_version == 0:
        yield at("ensemble-step", f"{name} has no model_version: that means 0. Write -1 or a version.")
    elif step.model_version > 0 and step.model_version not in target.served:
        yield at("ensemble-step", f"{name} has no version {step.model_version} that its policy lets be loaded.")
    if target.config is None or not target.config.input or not target.config.output:
        return  # Triton completes the configuration from the model itself
    inputs = {item.name: item for item in target.config.input}
    for tensor in sorted(set(step.input_map) - set(inputs)):
        yield at("ensemble-map", f"{name} has no input {tensor!r}.", f'"{tensor}"')
    for tensor in sorted(set(step.output_map) - {item.name for item in target.config.output}):
        yield at("ensemble-map", f"{name} has no output {tensor!r}.", f'"{tensor}"')
    for tensor in sorted(set(inputs) - set(step.input_map)):
        if not inputs[tensor].optional:
            yield at("ensemble-map", f"{name} is not given its input {tensor!r}.")
    if model.config.max_batch_size > target.config.max_batch_size:
        rows = f"takes {model.config.max_batch_size} rows, and its step {name} {target.config.max_batch_size}."
        yield at("batch-size", rows, "max_batch_size")
