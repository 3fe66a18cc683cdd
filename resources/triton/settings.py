"""How releases are served and proven. Read by everything, so it imports nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: `python`: the engine runs inside a `model.py`, what the embedded server can load. `native`: Triton's own backend.
Flavour = Literal["python", "native"]
#: Triton's `--model-control-mode`. `explicit`: models are loaded when a client says so; `poll`: when the repository
#: changes; `none`: all of them, once, at the start.
Control = Literal["explicit", "poll", "none"]


@dataclass(frozen=True)
class TritonSettings:
    """`server`: gRPC address of a running Triton in explicit model control that serves `repositories/<target>`;
    None: each release is proven on an embedded server of its own. `server_http`: the same server's HTTP address.
    `environment`: the virtual environment that `refinery setup` builds for the embedded server.
    """

    flavour: Flavour = "python"
    server: str | None = None
    server_http: str | None = None
    repositories: Path | None = None
    environment: Path = Path(sys.prefix) / "triton"
