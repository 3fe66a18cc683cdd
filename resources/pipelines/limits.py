"""The limits of one request, and the error for a request that has no answer."""

from __future__ import annotations

from dataclasses import dataclass


class RefusedError(ValueError):
    """A request has no answer, and its client is at fault. The message is written for that client."""


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one request. The catalog's field `limits` has the same fields and explains them."""

    text_bytes: int = 4 * 2**20
    request_bytes: int = 32 * 2**20
    labels: int = 1000
    masks: int = 100
    engine_rows: int = 1024
