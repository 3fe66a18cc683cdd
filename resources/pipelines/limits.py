"""How much one request may ask for, and the error for one that asks for too much."""

from __future__ import annotations

from dataclasses import dataclass


class RefusedError(ValueError):
    """A request that has no answer, through its own fault. The message is for the client who sent it."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for. The catalog's field `limits` has the same fields, with their meaning."""

    text_bytes: int = 4 * 2**20
    request_bytes: int = 32 * 2**20
    labels: int = 1000
    masks: int = 100
    engine_rows: int = 1024
