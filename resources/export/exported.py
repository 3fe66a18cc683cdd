"""The result of an export. It has a module of its own because the exporter imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from resources.artifacts.records import ParityCase


@dataclass(frozen=True)
class Exported:
    """The result of an export, which left its graph in a folder.

    The fields have the meaning of those of resources.artifacts.records.OnnxGraph.
    """

    opset: int
    nodes: int
    parameters: int
    inputs: tuple[str, ...]
    output: str
    width: int
    external_data: bool
    parity: tuple[ParityCase, ...]
    checker: str
    parity_misses: tuple[str, ...]
