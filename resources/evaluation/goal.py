"""What an engine of reduced precision has to reach while it is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resources.tasks import Gates


@dataclass(frozen=True)
class Goal:
    """What a reduced-precision engine has to reach, and how much its builder may try for it."""

    evaluation_folder: Path
    gates: Gates
    max_batch_size: int
    trials: int
    seconds: float
