"""Rules about ensembles: which models their steps are, and how tensors go from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from resources.triton.lint.findings import Finding

if TYPE_CHECKING:
    from resources.triton.lint.repository import Model


def ensemble_findings(model: Model, models: Mapping[str, Model]) -> Iterator[Finding]:
    """What is wrong with the ensemble's steps, maps and outputs."""
    config = model.config
    assert config is not None
    steps = config.ensemble_scheduling.step
    if not steps:
        yield model.at("ensemble-step", "has no steps.", near="platform")
    made: dict[str, str] = {item.name: "an input" for item in config.input}
    read: set[str] = {item.name for item in config.output}
    waits: dict[int, set[str]] = {}
    for number, step in enumerate(steps):
        near = f'"{step.model_name}"'
        yield from _step(model, step, models.get(step.model_name), near)
        waits[number] = set(step.input_map.values())
        read |= waits[number]
        for tensor in step.output_map.values():
            if tensor in made:
                yield model.at(
                    "ensemble-map", f"{tensor!r} is made by {step.model_name} and is {made[tensor]} too.", near=near
                )
            made[tensor] = f"made by {step.model_name}"
    for tensor in sorted(read - set(made)):
        yield model.at("ensemble-map", f"nothing makes {tensor!r}.", near=f'"{tensor}"')
    for tensor in sorted(set(made) - read):
        yield model.at("ensemble-unused", f"nothing reads {tensor!r}.", near=f'"{tensor}"')
    # What can be computed, step after step; what is left then waits for itself.
    there = {item.name for item in config.input} | (read - set(made))
    while ready := [number for number, tensors in waits.items() if tensors <= there]:
        for number in ready:
            there |= set(steps[number].output_map.values())
            del waits[number]
    for number in waits:
        name = steps[number].model_name
        yield model.at("ensemble-cycle", f"{name} waits for what it makes itself.", near=f'"{name}"')


def _step(model: Model, step: object, target: Model | None, near: str) -> Iterator[Finding]:
    from tritonclient.grpc.model_config_pb2 import ModelEnsembling

    assert isinstance(step, ModelEnsembling.Step) and model.config is not None
    if target is None:
        yield model.at("ensemble-step", f"{step.model_name!r} is not in the repository.", near=near)
        return
    if step.model_version == 0:
        yield model.at(
            "ensemble-step", f"{step.model_name} has no model_version: that means 0. Write -1 or a version.", near=near
        )
    elif step.model_version > 0 and step.model_version not in target.versions:
        yield model.at("ensemble-step", f"{step.model_name} has no version {step.model_version}.", near=near)
    if target.config is None:
        return
    inputs = {item.name: item for item in target.config.input}
    outputs = {item.name for item in target.config.output}
    for name in sorted(set(step.input_map) - set(inputs)):
        yield model.at("ensemble-map", f"{step.model_name} has no input {name!r}.", near=f'"{name}"')
    for name in sorted(set(step.output_map) - outputs):
        yield model.at("ensemble-map", f"{step.model_name} has no output {name!r}.", near=f'"{name}"')
    for name in sorted(set(inputs) - set(step.input_map)):
        if not inputs[name].optional:
            yield model.at("ensemble-map", f"{step.model_name} is not given its input {name!r}.", near=near)
    if model.config.max_batch_size > target.config.max_batch_size:
        yield model.at(
            "batch-size",
            f"takes {model.config.max_batch_size} rows, and its step {step.model_name} {target.config.max_batch_size}.",
            near="max_batch_size",
        )
