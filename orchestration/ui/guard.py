"""The checks that a request passes before Dagster's own web application sees it.

Dagster's web server has no log-in, takes GraphQL mutations by GET and by forms, and looks at neither Host nor Origin.
So any web page that a user of this machine opens could start runs, by an image's address or by a form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SETTING = "REFINERY_DAGSTER_UI"


class PagesGuard:
    """Dagster's web application behind checks of Host, Origin, method and content type.

    A foreign name in Host means DNS rebinding. A foreign Origin means that another web page sent the request. JSON is
    required because a browser sends other content types for any page, without asking first (preflight).
    """

    def __init__(self, app: ASGIApp, address: str | None = None) -> None:
        """Guard `app`.

        Args:
            app: Dagster's web application.
            address: The address at which people find the pages, if a proxy stands before them. The loopback names are
                always accepted.
        """
        self._app = app
        self._origin = origin_of(address) if address else None
        names = {self._origin[1]} if self._origin else set()
        self._names = _LOOPBACK_NAMES | names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer it with the reason of its refusal."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _unframed(send))
        elif scope["type"] == "websocket":  # the client sees status 403, because the socket was not accepted yet
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            await PlainTextResponse(refusal[1] + "\n", refusal[0])(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal, or None for a request that Dagster may see."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = origin_of(f"http://{hosts[0]}") if len(hosts) == 1 else None
        if host is None or host[1] not in self._names:
            return (
                403,
                f"The request names a host that is not served here. Set {_SETTING} to the address of your proxy.",
            )
        if not all(self._is_own(origin, hosts[0]) for origin in origins):
            return (
                403,
                f"The request comes from another web page. Set {_SETTING} to the address of your proxy.",
            )
        if scope["type"] == "websocket":
            return None
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                return 415, "A request that may change something needs the content type application/json."
        # The path is not compared exactly, because Dagster's routes also accept it with a line break at its end.
        elif scope["path"].startswith("/graphql") and "text/html" not in headers.get("accept", ""):
            return 405, "Send GraphQL by POST with the content type application/json."
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        found = origin_of(origin)
        # A proxy may send its own name as Host, or the address to which it forwards the request.
        return found is not None and (found == self._origin or found == origin_of(f"{found[0]}://{host}"))


def origin_of(address: str) -> tuple[str, str, int] | None:
    """Return the scheme, host and port of a web address, or None for anything else."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, _DEFAULT_PORTS[parts.scheme] if port is None else port


def _unframed(send: Send) -> Send:
    """Return a `send` that keeps the pages out of other pages' frames.

    In such a frame, a click that is meant for the other page could land on a button of these pages.
    """

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Frame-Options"] = "SAMEORIGIN"
        await send(message)

    return sent
