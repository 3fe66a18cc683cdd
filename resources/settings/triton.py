"""The settings for serving and proving releases.

Nearly every module imports this one, so it imports very little itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resources.settings.connection import PLAIN, Connection, held_key

if TYPE_CHECKING:
    from resources.storage.locations import Location

#: With `python`, the engine runs inside a `model.py`, which the embedded server can load. With `native`, Triton's own
#: backend runs it.
Flavour = Literal["python", "native"]
#: Triton's `--model-control-mode`. With `explicit`, Triton loads a model when a client asks for it. With `poll`, it
#: loads models when the repository changes. With `none`, it loads all models once, when it starts.
Control = Literal["explicit", "poll", "none"]


@dataclass(frozen=True)
class TritonSettings:
    """The Triton servers that serve and prove releases.

    Args:
        flavour: How a release runs its engine.
        servers: gRPC addresses of running Tritons that serve `repositories/<target>`. Without any, each release is
            proven on an embedded server of its own.
        servers_http: The HTTP addresses of these servers, in the same order.
        control: The `--model-control-mode` of these servers.
        repositories: The folder or prefix with the repositories of all targets. None means the workspace's own.
        environment: The virtual environment that `refinery setup` builds for the embedded server.
        connection: The headers and TLS settings for these servers.
        keys: The folder with the keys of each `refinery serve`.
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
        """The servers that load a new release while they run."""
        return () if self.control == "none" else self.servers

    @property
    def provable(self) -> bool:
        """Return whether a server can prove a release: the embedded server or one of the configured servers."""
        return bool(self.driven) or self.flavour == "python"

    def connection_to(self, address: str) -> Connection:
        """Return the connection to the server at a gRPC address.

        If a `refinery serve` runs there, the connection has its key. Otherwise it is that of the user's own servers.
        """
        key = held_key(self.keys, address) if self.keys is not None else None
        return self.connection if key is None else Connection(key=key)
