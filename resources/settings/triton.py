"""How releases are served and proven. Read by everything, so it imports next to nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resources.settings.connection import PLAIN, Connection, held_key

if TYPE_CHECKING:
    from resources.storage.locations import Location

#: `python`: the engine runs inside a `model.py`, what the embedded server can load. `native`: Triton's own backend.
Flavour = Literal["python", "native"]
#: Triton's `--model-control-mode`. `explicit`: models are loaded when a client says so; `poll`: when the repository
#: changes; `none`: all of them, once, at the start.
Control = Literal["explicit", "poll", "none"]


@dataclass(frozen=True)
class TritonSettings:
    """`servers`: gRPC addresses of running Tritons that serve `repositories/<target>`; none: each release is proven on
    an embedded server of its own. `servers_http`: their HTTP addresses, in the same order. `control`: their
    `--model-control-mode`. `environment`: the virtual environment that `refinery setup` builds for the embedded server.
    `connection`: how the running servers are spoken to. `keys`: the folder with the keys of each `refinery serve`.
    """

    flavour: Flavour = "python"
    servers: tuple[str, ...] = ()
    servers_http: tuple[str, ...] = ()
    control: Control = "explicit"
    repositories: Location | None = None
    environment: Path = Path(sys.prefix) / "triton"
    connection: Connection = PLAIN
    keys: Path | None = None

    @property
    def driven(self) -> tuple[str, ...]:
        """The servers that take up a release while they run."""
        return () if self.control == "none" else self.servers

    @property
    def provable(self) -> bool:
        """Whether a server proves what is published: the embedded one, or those that are configured."""
        return bool(self.driven) or self.flavour == "python"

    def connection_to(self, address: str) -> Connection:
        """Return how the server of that gRPC address is spoken to: with the key of a `refinery serve` that runs there,
        or as the user's own servers are.
        """
        key = held_key(self.keys, address) if self.keys is not None else None
        return self.connection if key is None else Connection(key=key)
