"""The command line and the environment of the `tritonserver` in the nvidia-pytriton wheel."""

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
#: A Triton that is stopped waits at most this long for requests under way.
EXIT_SECONDS = 10
#: How often a polling server looks at its repository.
POLL_SECONDS = 1
#: These ports lie below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range, 32768 to 60999).
_OWN_PORTS = range(20_000, 32_768)
_SUPERVISOR = Path(__file__).with_name("supervise.py")


@dataclass(frozen=True)
class Ports:
    """The ports of one server, all on loopback."""

    http: int
    grpc: int
    metrics: int

    @classmethod
    def choose(cls, http: int | None, grpc: int | None, metrics: int | None) -> Ports:
        """Return the given ports, with free ports in place of None and 0."""
        with ExitStack() as held:  # all are held at once, so that none is found twice
            free = [_free_port(held) for _ in range(3)]
        return cls(http or free[0], grpc or free[1], metrics or free[2])

    def require_free(self) -> None:
        """Check that the ports are free and differ. Triton itself reports this only deep in its log.

        Raises:
            ServerError: A port is taken, or given twice.
        """
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
    """Return a free port that Linux does not give to an outgoing connection before the server has started."""
    probe = held.enter_context(socket.socket())
    for port in random.sample(_OWN_PORTS, 100):
        with suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    probe.bind((LOOPBACK, 0))
    return int(probe.getsockname()[1])


def new_prefix() -> str:
    """Return a new prefix for the names of one server's shared memory.

    Servers with the same prefix would remove each other's shared memory.
    """
    return f"refinery-{uuid.uuid4().hex[:12]}"


def supervised(command: Sequence[str], folder: Path, prefix: str = "") -> list[str]:
    """Return the command line that runs a command and ends all of its processes when this process ends.

    Args:
        command: The command line to run.
        folder: A folder of the command, which is removed at the end.
        prefix: The prefix of the command's shared memory. The supervisor lets only this user read that memory, and
            removes it at the end.
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
    """Return the command line of a server.

    Args:
        environment: The environment that holds the server.
        repository: The model repository.
        backends: The folder of backends, made by `assemble_backends`.
        prefix: The prefix of the server's shared memory.
        ports: The server's ports.
        models: The models to load at the start, in explicit control only. In other modes the server loads the whole
            repository.
        control: The model control mode.
        options: Further options of tritonserver.
    """
    mode = [f"--model-control-mode={control}"]
    if control == "explicit":
        mode += [f"--load-model={name}" for name in models]
    elif control == "poll":
        # One model is loaded after the other. Four loads at once would take the cores from running requests.
        mode += [f"--repository-poll-secs={POLL_SECONDS}", "--model-load-thread-count=1"]
    return [
        str(_package(environment) / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        *mode,
        *options,
        "--exit-on-error=true",
        "--strict-readiness=true",
        # Triton would complete configurations by guessing, for example with a batch size of 4.
        "--disable-auto-complete-config",
        # Without this option Triton ignores rate limiters and lets the instances take turns. See config.py.
        "--rate-limit=execution_count",
        "--allow-gpu-metrics=false",
        # These endpoints offer the same APIs, and the restrictions do not cover them. With AIP_MODE=PREDICTION in the
        # environment, Triton would open the Vertex AI endpoint and close the usual ones.
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
    """Return the options of a server with a response cache of that size, for models whose configuration uses it."""
    folder = _package(environment) / "tritonserver" / "caches"
    return [f"--cache-directory={folder}", f"--cache-config=local,size={megabytes * 2**20}"]


def limited(resources: Mapping[str, int]) -> list[str]:
    """Return the options that give a server so many of each resource that rate limiters name.

    By default Triton has as many of a resource as the neediest instance takes. Then only one such instance runs at a
    time.
    """
    return [f"--rate-limit-resource={name}:{count}" for name, count in sorted(resources.items())]


def variables(environment: Path) -> dict[str, str]:
    """Return the environment variables that the server needs. The caller puts `PATH` before the present one."""
    libraries = [
        str(_package(environment).parent / "nvidia_pytriton.libs"),
        str(sysconfig.get_config_var("LIBDIR") or ""),
        # A CUDA build of PyTorch brings CUDA libraries. The engine's model finds them in these folders too.
        *map(str, sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib"))),
    ]
    return {
        "PATH": str(environment / "bin"),
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "VIRTUAL_ENV": str(environment),
        "TOKENIZERS_PARALLELISM": "true",
    }


def assemble_backends(environment: Path, folder: Path) -> None:
    """Make `folder` a backend directory, with links and the Python stub.

    The wheel keeps one stub for each Python version, apart from the backend.

    Raises:
        ServerError: The wheel has no stub for this version of Python.
    """
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
    # The stub is copied and not linked, because the backend looks for its own folder beside the stub.
    shutil.copy2(stub, place)


def _package(environment: Path) -> Path:
    found = sorted(environment.glob("lib/python3*/site-packages/pytriton"))
    if not found:
        raise ServerError(f"{environment} holds no nvidia-pytriton. Run: refinery setup.")
    return found[0]
