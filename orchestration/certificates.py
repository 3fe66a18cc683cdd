"""The certificates of a private authority, for every part that talks to servers over TLS.

requests, and with it MLflow, reads REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE. Our own client (resources/boundary/http.py),
huggingface_hub and its Xet client read only SSL_CERT_FILE.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from resources.storage.atomic import write_whole


def share_certificates(environment: MutableMapping[str, str]) -> None:
    """Add the certificates of REQUESTS_CA_BUNDLE to those of SSL_CERT_FILE.

    The usual certificates stay, because a bundle for a private MLflow server must not end downloads from the Hub.
    """
    given = Path(environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE") or "")
    usual = environment.get("SSL_CERT_FILE")
    if given == Path() or not given.exists() or usual == str(given):
        return
    # The file is written once for each content and never removed, because processes that outlive this one read it too.
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer-refinery"
    if usual and Path(usual).parent == cache:  # the process that started this one made that file
        return
    with suppress(OSError):  # a request then fails, and its error names the certificate that is not trusted
        content = b"\n".join(path.read_bytes() for path in (*_usual(usual), *_files(given)))
        place = cache / f"certificates-{hashlib.sha256(content).hexdigest()[:32]}.pem"
        if not place.exists():
            write_whole(place, content)
        environment["SSL_CERT_FILE"] = str(place)


def _usual(file: str | None) -> list[Path]:
    """Return the files that are trusted without a setting: the system's, and Mozilla's, which requests uses."""
    if file:
        return _files(Path(file))
    import certifi

    system = ssl.get_default_verify_paths()
    return [Path(certifi.where()), *_files(Path(system.cafile or system.capath or certifi.where()))]


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
