"""What an engine of reduced precision has to reach while it is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resources.tasks import Gates

if TYPE_CHECKING:
    from resources.engines.tuning import Tuning


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
