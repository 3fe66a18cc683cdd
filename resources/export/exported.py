"""What an export gives. Light: the exporter itself imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from resources.artifacts.records import ParityCase


@dataclass(frozen=True)
class Exported:
    """What an export left in its folder; the fields are those of resources.artifacts.records.OnnxGraph."""

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
