"""One request over HTTP, with limits for the time and the size of its answer."""

from __future__ import annotations

import io
import json
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from resources.boundary.deadlines import within
from resources.boundary.foreign import parse_json

#: The limit for connecting, and for each piece of the answer.
_SILENCE_SECONDS = 4.0
#: The limit for the whole request, from the lookup of the host's name to the last byte.
ANSWER_SECONDS = 8.0
#: The Hub's answer about a repository of ten thousand files is about a megabyte.
_MOST_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Tls:
    """The certificates with which a server over TLS is checked, and the certificate that it is shown.

    Args:
        authorities: A file or folder of certificates that replaces OpenSSL's usual ones (SSL_CERT_FILE).
        certificate: Our own certificate, with its key.
        insecure: Whether every server is trusted.
    """

    authorities: Path | None = None
    certificate: Path | None = None
    insecure: bool = False

    def context(self) -> ssl.SSLContext:
        """Return the SSL context with these certificates.

        Raises:
            ValueError: A file cannot be read. The message names it.
        """
        place = self.authorities
        try:
            folder = place if place is not None and place.is_dir() else None
            context = ssl.create_default_context(cafile=None if folder else place, capath=folder)
        except OSError as error:
            raise ValueError(f"the certificates in {place} cannot be read ({error})") from error
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate)
            except OSError as error:
                raise ValueError(f"the certificate {self.certificate} cannot be read ({error})") from error
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


_USUAL = Tls()


def get_json(url: str, headers: Mapping[str, str], trust: Tls = _USUAL) -> Any:
    """Return the JSON document that the address answers with.

    Args:
        url: The address without name and password, which urllib would take for the host's name; see
            resources.boundary.addresses.
        headers: The request's headers.
        trust: The certificates for a server over TLS.

    Raises:
        urllib.error.HTTPError: The server answers with an error.
        OSError: There is no connection or no HTTP answer, or the answer takes too long (TimeoutError).
        ValueError: The answer is too large or no JSON, or a file of certificates cannot be read.
    """
    return parse_json(_answer(urllib.request.Request(url, headers=dict(headers)), trust))  # noqa: S310 - see _answer


def post_json(url: str, headers: Mapping[str, str], document: Any) -> None:
    """Send the document to the address.

    The errors are those of `get_json`.
    """
    headers = {"Content-Type": "application/json", **headers}
    _answer(urllib.request.Request(url, json.dumps(document).encode(), headers), _USUAL)  # noqa: S310 - see _answer


def _answer(request: urllib.request.Request, trust: Tls) -> bytes:
    if request.type not in ("http", "https"):
        raise ValueError(f"{request.type}: is not the address of a web server")
    try:
        # The limits of _read hold for the server's answer. The lookup of the server's name has none.
        return within(ANSWER_SECONDS, partial(_read, request, trust, time.monotonic() + ANSWER_SECONDS))
    except HTTPException as error:  # the answer is not HTTP
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _read(request: urllib.request.Request, trust: Tls, deadline: float) -> bytes:
    opener = urllib.request.build_opener(_SameHost, _Http(deadline), _Https(deadline, trust))
    try:
        answer = opener.open(request, timeout=_SILENCE_SECONDS)
    except HTTPError:
        raise
    except URLError as error:  # its text hides the system's message behind an error number and brackets
        if isinstance(error.reason, TimeoutError):
            raise error.reason from error
        raise ConnectionError(getattr(error.reason, "strerror", None) or str(error.reason)) from error
    with answer:
        parts: list[bytes] = []
        size = 0
        while part := answer.read1(65536):
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise ValueError(f"the answer is larger than {_MOST_BYTES} bytes")
    return b"".join(parts)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Redirects that do not send a token on to another host, as urllib would."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


class _Http(urllib.request.HTTPHandler):
    """Connections whose answers, headers included, have to arrive by the deadline (of time.monotonic)."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPConnection, self._deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: float, trust: Tls) -> None:
        super().__init__()
        self._deadline, self._trust = deadline, trust

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPSConnection, self._deadline), req, context=self._trust.context())


def _connection(kind: type[HTTPConnection], deadline: float, host: str, **options: Any) -> HTTPConnection:
    connection = kind(host, **options)
    connection.response_class = partial(_response, deadline)  # type: ignore[assignment]
    return connection


def _response(deadline: float, sock: socket.socket, *arguments: Any, **options: Any) -> HTTPResponse:
    response = HTTPResponse(sock, *arguments, **options)
    response.fp = io.BufferedReader(_Until(response.fp.detach(), sock, deadline))
    return response


class _Until(io.RawIOBase):
    """A stream that reads from a socket until the deadline.

    The socket's own timeout begins anew with each byte.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        late = TimeoutError(f"there was no complete answer within {ANSWER_SECONDS:g} s")
        if left_s <= 0:
            raise late
        self._sock.settimeout(min(left_s, _SILENCE_SECONDS))
        try:
            read: int | None = self._raw.readinto(buffer)
        except TimeoutError:
            silent = TimeoutError(f"the server sent nothing for {_SILENCE_SECONDS:g} s")
            raise (late if left_s < _SILENCE_SECONDS else silent) from None
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()
