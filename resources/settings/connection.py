"""Connections to Triton servers, beside their addresses: the key of the restricted APIs, other headers, and TLS."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from resources.errors import ServerError

Protocol = Literal["grpc", "http"]
#: The header that holds the key. Triton's gRPC endpoint expects a prefix of its own before the name.
KEY_HEADER = "refinery-key"
_GRPC_PREFIX = "triton-grpc-protocol-"
#: The APIs that need the key: they run code from a request, name memory of the machine, or write files. Triton's
#: model-config API stays open, because it only reads and perf_analyzer needs it.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
_KEY_BYTES = 32


@dataclass(frozen=True)
class Connection:
    """The headers that a client sends to a server with each request, and the protection of the channel.

    Args:
        key: The key of the server's restricted APIs.
        headers: Further headers as pairs of a name and a value, such as `authorization`.
        tls: Whether the channel is TLS. The files are in PEM format.
        ca: The certificate authorities to trust. None means those that the client library trusts by default.
        certificate: The certificate that the client presents. It is used with `private_key`.
    """

    key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def sent(self, protocol: Protocol) -> dict[str, str]:
        """Return the headers of every request over the protocol."""
        found = dict(self.headers)
        if self.key is not None:
            found[f"{_GRPC_PREFIX}{KEY_HEADER}" if protocol == "grpc" else KEY_HEADER] = self.key
        return found

    def open(self, api: Any, address: str, protocol: Protocol, **options: Any) -> Any:
        """Return a client of the address that sends the headers with every request.

        Args:
            api: `tritonclient.grpc`, `tritonclient.grpc.aio` or `tritonclient.http`.
            address: The server's host and port.
            protocol: The protocol of `api`.
            **options: Further options of the client that `api` makes.
        """
        client = api.InferenceServerClient(address, **self._tls(protocol), **options)
        if headers := self.sent(protocol):
            client.register_plugin(_adding(headers))
        return client

    def _tls(self, protocol: Protocol) -> dict[str, Any]:
        if not self.tls:
            return {}
        ca, certificate, key = (
            str(path) if path is not None else None for path in (self.ca, self.certificate, self.private_key)
        )
        if protocol == "grpc":
            return {"ssl": True, "root_certificates": ca, "certificate_chain": certificate, "private_key": key}
        given = {"ca_certs": ca, "certfile": certificate, "keyfile": key}
        return {"ssl": True, "ssl_options": {name: path for name, path in given.items() if path is not None}}


def _adding(headers: dict[str, str]) -> Callable[[Any], None]:
    def add(request: Any) -> None:
        request.headers = {**(request.headers or {}), **headers}

    return add


#: A connection without further headers and without TLS.
PLAIN = Connection()


def new_key() -> str:
    """Return a random key."""
    return secrets.token_hex(_KEY_BYTES)


def restrictions(key: str) -> list[str]:
    """Return the options of a server that refuses the restricted APIs to clients without the key."""
    value = f"{','.join(RESTRICTED)}:{KEY_HEADER}={key}"
    return [f"--http-restricted-api={value}", f"--grpc-restricted-protocol={value}"]


@contextmanager
def kept_key(folder: Path, port: int, key: str) -> Iterator[None]:
    """Keep the key of a running server where `held_key` finds it, for this user alone, while the context lasts.

    Args:
        folder: The folder with the key files.
        port: The server's gRPC port.
        key: The server's key.

    Raises:
        ServerError: The key file cannot be written, or another server of this folder has the port.
    """
    path = _file(folder, port)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ServerError(
            f"The key of the server could not be written to {path}: {error.strerror or error}. Make that folder "
            "writable, or have REFINERY_HOME name another."
        ) from error
    with os.fdopen(descriptor, "r+") as file:
        try:  # the kernel drops the lock when the process ends, so only a key in use is locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(
                f"Another `refinery serve` of this REFINERY_HOME has gRPC port {port}. Stop it, or choose another port "
                "with --grpc-port."
            ) from None
        os.fchmod(descriptor, 0o600)
        file.truncate()
        file.write(key)
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def held_key(folder: Path, address: str) -> str | None:
    """Return the key of this user's `refinery serve` at the address, or None if none runs there."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return None
    with suppress(OSError), _file(folder, int(port)).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or None
    return None


def _file(folder: Path, port: int) -> Path:
    return folder / f"{port}.key"
