"""An S3 server on loopback: moto, with its requests written down, and refused where a test says so."""

from __future__ import annotations

import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from resources.storage.locations import Location, parse_location
from resources.storage.objects import RemotePath

BUCKET = "releases"
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_KEY = re.compile(rb"<Key>(.*?)</Key>")
#: What changes something in S3.
CHANGES = ("PUT", "POST", "DELETE")


class S3Server:
    """`requests`: method and key of each, in the order in which they came. `refuses`: whether one is answered 403.
    `drips`: whether a GET of the key is answered a byte every 0.2 seconds.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[tuple[str, str]] = []
        self.refuses: Callable[[str, str], bool] = lambda method, key: False
        self.drips: Callable[[str], bool] = lambda key: False

    def place(self, name: str, scratch: Path, bucket: str = BUCKET) -> RemotePath:
        """A place in it, as a user writes it."""
        place = parse_location(f"s3://http://{self.address}/{bucket}/{name}", scratch, {})
        assert isinstance(place, RemotePath)
        return place

    def age(self, place: RemotePath, days: float) -> None:
        """Let what lies at or below the place have been written so many days before it was."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        for key, found in s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys.items():
            if f"{BUCKET}/{key}".startswith(place.key):
                found.last_modified -= timedelta(days=days)

    def changed(self) -> list[str]:
        """The keys that were put, or asked to be."""
        return [key for method, key in self.requests if method == "PUT"]


@contextmanager
def s3_credentials() -> Iterator[None]:
    """Those of the server, and no others, in the environment, where Triton reads them too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "somebody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """One with a bucket, and the environment that its users need, while the context lasts."""
    with s3_credentials(), _server() as server:
        yield server


@contextmanager
def _server() -> Iterator[S3Server]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *arguments: Any) -> None:
            pass

    moto = DomainDispatcherApplication(create_backend_app)
    s3 = S3Server("")

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix(f"/{BUCKET}").strip("/")
        refused = s3.refuses(method, key)
        s3.requests.append((method, key))
        if method == "POST" and environ.get("QUERY_STRING", "").startswith("delete"):
            # Many removals at once are answered 200 whatever becomes of them.
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            denied = [one for one in _KEY.findall(body) if s3.refuses("DELETE", one.decode())]
            if denied:
                code = b"<Code>AccessDenied</Code><Message>Access Denied</Message>"
                errors = b"".join(b"<Error><Key>" + one + b"</Key>" + code + b"</Error>" for one in denied)
                start("200 OK", [("Content-Type", "application/xml")])
                return [b"<DeleteResult>" + errors + b"</DeleteResult>"]
            environ["wsgi.input"] = BytesIO(body)
        if refused:
            # Read, or the connection could not be used again.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(_DENIED)))])
            return [_DENIED]
        answer: Iterable[bytes] = moto(environ, start)
        return _dripping(answer) if method == "GET" and s3.drips(key) else answer

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    s3.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        # moto keeps what it holds by process, and another test may have had a server in this one.
        reset = urllib.request.Request(f"http://{s3.address}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()  # noqa: S310
        s3.place("x", Path()).store.filesystem().mkdir(BUCKET)
        yield s3
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def _dripping(answer: Iterable[bytes]) -> Iterator[bytes]:
    for part in answer:
        for byte in part:
            yield bytes([byte])
            time.sleep(0.2)


def files_of(folder: Location) -> dict[str, bytes]:
    """Every file below, by its path."""
    if isinstance(folder, RemotePath):
        return {name: (folder / name).read_bytes() for name in folder.sizes()}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_file(path: Location, data: bytes) -> None:
    """As somebody else would put it there."""
    if not isinstance(path, RemotePath):
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
