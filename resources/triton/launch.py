"""How the `tritonserver` of the nvidia-pytriton wheel is found and called."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
import sysconfig
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from resources.errors import ServerError
from resources.settings.triton import Control

LOOPBACK = "127.0.0.1"
#: Triton itself gives up waiting for requests under way after this long.
EXIT_SECONDS = 10
#: How often a polling server looks.
POLL_SECONDS = 1
#: Below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range, 32768 to 60999).
_OWN_PORTS = range(20_000, 32_768)
_SUPERVISOR = Path(__file__).with_name("supervise.py")


@dataclass(frozen=True)
class Ports:
    """Of one server, all on loopback."""

    http: int
    grpc: int
    metrics: int

    @classmethod
    def choose(cls, http: int | None, grpc: int | None, metrics: int | None) -> Ports:
        """The given ones, and free ones in place of None and 0."""
        with ExitStack() as held:  # all at once, or the same one might be found twice
            free = [_free_port(held) for _ in range(3)]
        return cls(http or free[0], grpc or free[1], metrics or free[2])

    def require_free(self) -> None:
        """Raise ServerError where one is taken, or given twice. Triton itself says so only deep in its log."""
        given = ((self.http, "--http-port"), (self.grpc, "--grpc-port"), (self.metrics, "--metrics-port"))
        for (port, option), (other, beside) in combinations(given, 2):
            if port == other:
                raise ServerError(f"{option} and {beside} are both {port}. Give three different ports.")
        for port, option in given:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((LOOPBACK, port))
                except OSError as error:
                    raise ServerError(
                        f"Port {port} of {LOOPBACK} cannot be used: {error.strerror}. Choose another with {option}, or "
                        "stop what listens there."
                    ) from None


def _free_port(held: ExitStack) -> int:
    """One that nobody has now, and that no outgoing connection is given before the server has started."""
    probe = held.enter_context(socket.socket())
    for port in random.sample(_OWN_PORTS, 100):
        with suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    probe.bind((LOOPBACK, 0))
    return int(probe.getsockname()[1])


def new_prefix() -> str:
    """Return how the names of one server's shared memory begin. Servers that share a prefix tear down each other's."""
    return f"refinery-{uuid.uuid4().hex[:12]}"


def supervised(command: Sequence[str], folder: Path, prefix: str = "") -> list[str]:
    """The command line of a process that ends with this one, with all that it started; `folder` goes with it.

    prefix: of its shared memory, which only this user can read then, and which goes with it too.
    """
    caller, seconds = str(os.getpid()), str(EXIT_SECONDS + 2)
    return [sys.executable, "-I", str(_SUPERVISOR), caller, seconds, str(folder), prefix, *command]


def command(
    environment: Path,
    repository: Path,
    backends: Path,
    prefix: str,
    ports: Ports,
    models: Sequence[str],
    control: Control = "explicit",
    options: Sequence[str] = (),
) -> list[str]:
    """The command line of a server: in explicit control it holds the named models alone, else the whole repository."""
    mode = [f"--model-control-mode={control}"]
    if control == "explicit":
        mode += [f"--load-model={name}" for name in models]
    elif control == "poll":
        # One model after the other, or four at once take the cores from those that are answered.
        mode += [f"--repository-poll-secs={POLL_SECONDS}", "--model-load-thread-count=1"]
    return [
        str(_package(environment) / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        *mode,
        *options,
        "--exit-on-error=true",
        "--strict-readiness=true",
        # It would fill in what a configuration lacks by guessing, a batch size of 4 among other things.
        "--disable-auto-complete-config",
        # Heed the models' rate limiters. By default Triton gives its instances turns instead; see config.py.
        "--rate-limit=execution_count",
        "--allow-gpu-metrics=false",
        # Further doors to the same APIs, which restrictions do not cover. With AIP_MODE=PREDICTION in the environment
        # Triton would open the first and close the usual ones.
        "--allow-vertex-ai=false",
        "--allow-sagemaker=false",
        "--allow-http=true",
        "--allow-grpc=true",
        "--allow-metrics=true",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        f"--http-address={LOOPBACK}",
        f"--grpc-address={LOOPBACK}",
        f"--metrics-address={LOOPBACK}",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]


def caching(environment: Path, megabytes: int) -> list[str]:
    """Options of a server that keeps answers, so many megabytes of them, of models that ask for it."""
    folder = _package(environment) / "tritonserver" / "caches"
    return [f"--cache-directory={folder}", f"--cache-config=local,size={megabytes * 2**20}"]


def limited(resources: Mapping[str, int]) -> list[str]:
    """Options of a server that has so many of each resource that rate limiters name.

    Triton's default is as many as the largest need of any one instance: then one of them runs at a time.
    """
    return [f"--rate-limit-resource={name}:{count}" for name, count in sorted(resources.items())]


def variables(environment: Path) -> dict[str, str]:
    """Environment variables that the server needs set; `PATH` is to be put before what is there."""
    libraries = [
        str(_package(environment).parent / "nvidia_pytriton.libs"),
        str(sysconfig.get_config_var("LIBDIR") or ""),
        # The CUDA libraries that a CUDA build of PyTorch brings: the engine's model finds them there too.
        *map(str, sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib"))),
    ]
    return {
        "PATH": str(environment / "bin"),
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "VIRTUAL_ENV": str(environment),
        "TOKENIZERS_PARALLELISM": "true",
    }


def assemble_backends(environment: Path, folder: Path) -> None:
    """Make `folder` a backend directory of links. The wheel keeps one stub for each Python, apart from the backend."""
    server = _package(environment) / "tritonserver"
    version = _package(environment).parents[1].name.removeprefix("python")
    python = folder / "python"
    python.mkdir()
    for path in (server / "backends" / "python").iterdir():
        (python / path.name).symlink_to(path)
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServerError(f"nvidia-pytriton has no stub for Python {version}. Set up again with Python 3.11 or 3.12.")
    place = python / stub.name
    place.unlink(missing_ok=True)
    # A copy, because the backend wants to find its own folder beside the stub.
    shutil.copy2(stub, place)


def _package(environment: Path) -> Path:
    found = sorted(environment.glob("lib/python3*/site-packages/pytriton"))
    if not found:
        raise ServerError(f"{environment} holds no nvidia-pytriton. Run: refinery setup.")
    return found[0]
