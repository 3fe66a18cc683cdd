"""Locations by their names: local folders, and prefixes in object storage as Triton writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resources.boundary.addresses import holds_login
from resources.storage.objects import TRIES, RemotePath, Store

_CONNECT_SECONDS = 3.0
#: The longest wait for one part of an upload, which may have gigabytes in all.
_READ_SECONDS = 60.0
#: `s3://http://host:port/bucket/prefix` and `s3://host:port/bucket/prefix`, as Triton reads them (docs/user_guide/
#: model_repository.md of triton-inference-server). Without a protocol, Triton uses HTTP.
_S3_SERVER = re.compile(r"(https?://)?([0-9A-Za-z.-]+:[0-9]+)/(.+)")

Location = Path | RemotePath


def contents(folder: Location) -> list[Location]:
    """Return the entries directly below the folder, sorted by name."""
    found: list[Location] = [*folder.iterdir()]
    return sorted(found, key=lambda path: path.name)


def parse_location(
    text: str, scratch: Path, environment: Mapping[str, str], variable: str = "REFINERY_TRITON_REPOSITORIES"
) -> Location:
    """Return the folder or the place in object storage that the text names.

    Args:
        text: A path, or an `s3://`, `gs://` or `as://` address.
        scratch: The store's folder on this machine; see `Store`.
        environment: The variables with those credentials that the store's package does not look for where Triton does.
        variable: The variable that holds the address. The store's errors name it if the address is wrong.

    Raises:
        ValueError: The text names no such place, or its address holds a name or password.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text).expanduser().resolve()
    if holds_login(text):
        raise ValueError(
            f"its {scheme}:// address holds a name or password, and addresses are printed. Remove both from the "
            "address, and give the credentials in the environment variables of that store"
        )
    parts = rest.strip("/")
    shown = f"{scheme}://"
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        match = _S3_SERVER.fullmatch(parts)
        server = f"{match[1] or 'http://'}{match[2]}" if match else None
        if match:
            shown, parts = f"s3://{match[1] or ''}{match[2]}/", match[3]
        elif ":" in parts:
            raise ValueError(f"{text!r} is neither s3://bucket/prefix nor s3://http://host:port/bucket/prefix")
        store = Store("s3", shown, scratch, {**options, **_s3_options(server)}, setting=variable)
        return RemotePath(store, _key(text, parts))
    if scheme == "gs":
        return RemotePath(Store("gs", shown, scratch, options, setting=variable), _key(text, parts))
    if scheme == "as":
        account, _, parts = parts.partition("/")
        options |= {"account_name": account, "account_key": environment.get("AZURE_STORAGE_KEY")}
        store = Store("abfs", f"as://{account}/", scratch, options, setting=variable)
        return RemotePath(store, _key(text, parts))
    raise ValueError(f"{text!r} is neither a folder nor a path that Triton reads (s3://, gs://, as://)")


def _key(text: str, parts: str) -> str:
    key = re.sub("/+", "/", parts.strip("/"))
    if not key:
        raise ValueError(f"{text!r} names no bucket")
    if re.search(r"[*?\[]", key):
        raise ValueError(f"{text!r} holds *, ? or [, which would match other places too")
    return key


def _s3_options(server: str | None) -> dict[str, Any]:
    config = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": TRIES},
    }
    return {"config_kwargs": config, **({"endpoint_url": server} if server else {})}
