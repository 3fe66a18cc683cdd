"""One question over HTTP, with a limit to how long and how large its answer may be."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import urlsplit

from resources.foreign import parse_json

#: For connecting, and for each piece of the answer.
_SILENCE_SECONDS = 4.0
#: For all of it.
ANSWER_SECONDS = 8.0
#: The Hub's answer about a repository of ten thousand files is about a megabyte.
_MOST_BYTES = 8 * 2**20


class _SameHost(urllib.request.HTTPRedirectHandler):
    """urllib would send a token on to whatever host an answer points to."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


def get_json(url: str, headers: Mapping[str, str]) -> Any:
    """The JSON document that the address answers with.

    Raises urllib.error.HTTPError, another OSError (TimeoutError where it takes too long) or ValueError.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} is no address of a web server")
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 - the scheme was looked at
    deadline = time.monotonic() + ANSWER_SECONDS
    with urllib.request.build_opener(_SameHost).open(request, timeout=_SILENCE_SECONDS) as answer:
        parts: list[bytes] = []
        while part := answer.read1(65536):
            parts.append(part)
            if time.monotonic() > deadline or sum(map(len, parts)) > _MOST_BYTES:
                raise TimeoutError(f"{url} went on answering for more than {ANSWER_SECONDS:g} s or too much")
    return parse_json(b"".join(parts))
