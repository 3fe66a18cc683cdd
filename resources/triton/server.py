"""The embedded server: the real `tritonserver` of the nvidia-pytriton wheel, in an environment of its own.

It has the Python and ensemble backends only, and its Python models need numpy below 2 (resources.triton.environment).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from resources.errors import ServerError
from resources.triton.client import TextClient
from resources.triton.environment import require_installed
from resources.triton.layout import CONFIG, internal_name, pinned_number, public_models
from resources.triton.settings import TritonSettings

LOOPBACK = "127.0.0.1"
_READY_SECONDS = 120.0
_STOP_SECONDS = 15.0
#: How often a serving process looks for a new release.
_WATCH_SECONDS = 1.0
#: Sets PR_SET_PDEATHSIG, which survives exec, so that the server goes when we do, however we go.
_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def require_free(port: int, option: str) -> None:
    """Raise ServerError where the port is taken. Triton itself says so only deep in its log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ServerError(
                f"Port {port} of {LOOPBACK} cannot be used: {error.strerror}. Choose another with {option}, or stop "
                "what listens there."
            ) from None


class EmbeddedServer:
    """A Triton server of one repository, on loopback, while the context lasts.

    Explicit model control: it holds the named public models and the releases they are pinned to, and nothing else of
    the repository. Ports left out are free ones. Raises ServerError with the telling lines of its log.
    """

    def __init__(
        self,
        repository: Path,
        settings: TritonSettings,
        *,
        models: Sequence[str],
        log: Path,
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
    ) -> None:
        self._repository, self._settings, self._models, self._log = repository, settings, tuple(models), log
        self._http = http_port or free_port()
        self._grpc = grpc_port or free_port()
        self._metrics = metrics_port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    @property
    def grpc_address(self) -> str:
        return f"{LOOPBACK}:{self._grpc}"

    @property
    def http_address(self) -> str:
        return f"{LOOPBACK}:{self._http}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> EmbeddedServer:
        require_installed(self._settings.environment)
        for port, option in (
            (self._http, "--http-port"),
            (self._grpc, "--grpc-port"),
            (self._metrics, "--metrics-port"),
        ):
            require_free(port, option)
        with ExitStack() as starting:
            backends = Path(starting.enter_context(tempfile.TemporaryDirectory(prefix="refinery-triton-")))
            self._log.parent.mkdir(parents=True, exist_ok=True)
            output = starting.enter_context(self._log.open("wb"))
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, *self._command(_assemble(self._settings.environment, backends))],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            starting.callback(self._stop)
            self._await_ready()
            self._stack = starting.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ended(self) -> bool:
        """Whether the server has ended by itself."""
        return self._process is None or self._process.poll() is not None

    def last_words(self) -> str:
        """The lines of its log that say what went wrong, or its last."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [
            line for line in lines if line.startswith("E") or "error" in line.lower() or "failed" in line.lower()
        ]
        return "\n".join((telling or lines)[-8:])[-2000:]

    def _command(self, backends: Path) -> list[str]:
        return [
            str(_package(self._settings.environment) / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._models),
            "--exit-on-error=true",
            "--strict-readiness=true",
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=10",
            f"--http-address={LOOPBACK}",
            f"--grpc-address={LOOPBACK}",
            f"--metrics-address={LOOPBACK}",
            f"--http-port={self._http}",
            f"--grpc-port={self._grpc}",
            f"--metrics-port={self._metrics}",
            # Servers that share a prefix tear down each other's shared memory.
            f"--backend-config=python,shm-region-prefix-name=refinery-{uuid.uuid4().hex[:12]}",
        ]

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        root = self._settings.environment
        libraries = [str(_package(root).parent / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR") or "")]
        environment["PATH"] = f"{root / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
        environment["VIRTUAL_ENV"] = str(root)
        # Releases are immutable, and a cache file would be a change.
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        environment["TOKENIZERS_PARALLELISM"] = "true"
        return environment

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        with TextClient(self.grpc_address) as client:
            while time.monotonic() < deadline:
                if self.ended():
                    raise ServerError(f"The embedded Triton ended while starting:\n{self.last_words()}")
                if client.is_live() and all(client.is_ready(name) for name in self._models):
                    return
                time.sleep(0.1)
        raise ServerError(f"The embedded Triton was not ready within {_READY_SECONDS:g} s:\n{self.last_words()}")

    def _stop(self) -> None:
        """SIGTERM, and after a while SIGKILL to its whole group: its Python models are processes of their own."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _package(environment: Path) -> Path:
    found = sorted(environment.glob("lib/python3*/site-packages/pytriton"))
    if not found:
        raise ServerError(f"{environment} holds no nvidia-pytriton. Run: refinery setup.")
    return found[0]


def _assemble(environment: Path, folder: Path) -> Path:
    """A backend directory of links. The wheel keeps one stub for each Python version, apart from the backend."""
    server = _package(environment) / "tritonserver"
    version = _package(environment).parents[1].name.removeprefix("python")
    python = folder / "python"
    python.mkdir()
    backend = server / "backends" / "python"
    for path in backend.iterdir():
        (python / path.name).symlink_to(path)
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServerError(f"nvidia-pytriton has no stub for Python {version}. Set up again with Python 3.11 or 3.12.")
    place = python / stub.name
    place.unlink(missing_ok=True)
    # A copy, because the backend wants to find its own folder beside the stub.
    shutil.copy2(stub, place)
    return folder


def serve_foreground(
    repository: Path,
    settings: TritonSettings,
    *,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    log: Path,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Serve every public model until Ctrl-C, SIGTERM or `stop()`; take up new releases while running.

    A release that cannot be loaded is said so, and the one before goes on serving. Raises ServerError where the server
    ends by itself.
    """
    with suppress(ValueError):  # not in the main thread: the caller stops us by `stop`
        signal.signal(signal.SIGTERM, _as_interrupt)
    models = public_models(repository)
    pinned = _pointers(repository)
    server = EmbeddedServer(
        repository,
        settings,
        models=models,
        log=log,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
    )
    try:
        with server, TextClient(server.grpc_address) as client:
            say(f"serving {', '.join(models)}: http {server.http_address}, grpc {server.grpc_address}; log {log}")
            while not stop():
                if server.ended():
                    raise ServerError(f"The embedded Triton ended by itself:\n{server.last_words()}")
                found = _pointers(repository)
                for model, config in found.items():
                    if pinned.get(model) != config:
                        _take_up(client, model, pinned.get(model), config, say)
                pinned = found
                time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        say("stopped")


def _take_up(client: TextClient, model: str, before: str | None, after: str, say: Callable[[str], None]) -> None:
    try:
        client.load(model)
    except ServerError as error:
        say(f"{error}; what served before goes on serving")
        return
    say(f"{model}: release {pinned_number(after)} serves")
    old = pinned_number(before) if before is not None else None
    if old is not None and old != pinned_number(after):
        for part in ("tokenizer", "engine"):
            with suppress(ServerError):
                client.unload(internal_name(model, old, "tokenizer" if part == "tokenizer" else "engine"))


def _pointers(repository: Path) -> dict[str, str]:
    pointers = {}
    for model in public_models(repository):
        with suppress(OSError):
            pointers[model] = (repository / model / CONFIG).read_text(encoding="utf-8")
    return pointers


def _as_interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt
