"""The embedded server: the real `tritonserver` of the nvidia-pytriton wheel, in an environment of its own.

The wheel holds only the Python and ensemble backends, and its Python models need numpy below 2 (see
resources.triton.environment).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from resources.errors import ServerError
from resources.processes.variables import COMPUTE, PROGRAM, inherited
from resources.settings.connection import Connection, Protocol, new_key, restrictions
from resources.settings.triton import Control, TritonSettings
from resources.triton.client import TextClient
from resources.triton.environment import require_installed
from resources.triton.launch import LOOPBACK, Ports, assemble_backends, command, new_prefix, supervised, variables
from resources.triton.layout import CONFIG, called_internals
from resources.triton.stubs import signal_text

READY_SECONDS = 120.0
#: A broken server that is being ended gets this long to answer the requests under way.
_SOON_SECONDS = 1.0
#: How much of the log's end is read, because a log may be long.
_LAST_BYTES = 2**18
#: This exceeds launch.EXIT_SECONDS, the time that the server itself waits for requests under way.
STOP_SECONDS = 20.0


class EmbeddedServer:
    """A context manager that runs a Triton server of one repository on loopback.

    In explicit model control, the server holds the named public models and the releases that they are pinned to, and
    nothing else of the repository. In the other modes it holds the whole repository. The server also ends when the
    thread that started it ends, for whatever reason.

    Args:
        repository: The model repository.
        settings: The settings that name the server's environment.
        models: The public models to wait for. They may be changed before the next start.
        log: The file for the server's output.
        http_port: The port for HTTP. A port that is None, here and below, becomes a free one.
        grpc_port: The port for gRPC.
        metrics_port: The port for metrics.
        control: The model control mode.
        options: Further options of tritonserver.
        key: The key of the server's restricted APIs. None makes a random one.

    Raises:
        ServerError: The server did not get ready. The message holds the lines of its log that tell why.
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
        control: Control = "explicit",
        options: Sequence[str] = (),
        key: str | None = None,
    ) -> None:
        self.connection = Connection(key=key or new_key())
        self._control: Control = control
        self._options = tuple(options)
        self._repository, self._settings, self._log = repository, settings, log
        self.models = tuple(models)
        self._ports = Ports.choose(http_port, grpc_port, metrics_port)
        self._lives = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    @property
    def grpc_address(self) -> str:
        """The address of the server's gRPC endpoint."""
        return f"{LOOPBACK}:{self._ports.grpc}"

    @property
    def http_address(self) -> str:
        """The address of the server's HTTP endpoint."""
        return f"{LOOPBACK}:{self._ports.http}"

    def client(self, protocol: Protocol = "grpc") -> TextClient:
        """Return a client that may use the restricted APIs too."""
        address = self.grpc_address if protocol == "grpc" else self.http_address
        return TextClient(address, protocol, self.connection)

    def require_free(self) -> None:
        """Raise ServerError if a port is taken, or given twice."""
        self._ports.require_free()

    @property
    def pid(self) -> int:
        """The process id of the supervisor, which leads the session of the server and its Python models."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> EmbeddedServer:
        environment = self._settings.environment
        require_installed(environment)
        self.require_free()
        with ExitStack() as starting:
            backends = Path(starting.enter_context(tempfile.TemporaryDirectory(prefix="refinery-triton-")))
            assemble_backends(environment, backends)
            self._log.parent.mkdir(parents=True, exist_ok=True)
            # A server that is started again appends to the log, so that its last words before it died are kept.
            output = starting.enter_context(self._log.open("ab" if self._lives else "wb"))
            self._lives += 1
            prefix = new_prefix()
            self._process = subprocess.Popen(
                supervised(self._command(backends, prefix), backends, prefix),
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
        """Return whether the server has ended, or was never started."""
        return self._process is None or self._process.poll() is not None

    def death(self) -> str:
        """Return how the server ended, as the end of a sentence.

        The supervisor's exit status is that of the server; as in a shell, it is 128 plus the signal's number if a
        signal ended the server.
        """
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return "has not ended"
        if status > 128:
            return f"ended by {signal_text(status - 128)}"
        if status < 0:
            return f"lost its supervisor by {signal_text(-status)}"
        return f"ended by itself with exit status {status}"

    def end_soon(self) -> None:
        """End a broken server. Left to itself, it would wait for models whose processes are dead."""
        with suppress(psutil.Error):
            begun = psutil.Process(self.pid).children()
            for process in begun:
                process.terminate()
            for process in psutil.wait_procs(begun, _SOON_SECONDS)[1]:
                process.kill()

    def last_words(self) -> str:
        """Return the last lines of the log that report errors, or the log's last lines if none does."""
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        telling = [
            line for line in lines if line.startswith("E") or "error" in line.lower() or "failed" in line.lower()
        ]
        return "\n".join((telling or lines)[-8:])[-2000:]

    @property
    def metrics_address(self) -> str:
        """The address of the server's metrics endpoint."""
        return f"{LOOPBACK}:{self._ports.metrics}"

    def _command(self, backends: Path, prefix: str) -> list[str]:
        return command(
            self._settings.environment,
            _plainly_named(self._repository, backends),
            backends,
            prefix,
            self._ports,
            self._loaded(),
            self._control,
            [*restrictions(self.connection.key or ""), *self._options],
        )

    def _environment(self) -> dict[str, str]:
        # Models and the code in them come from outside, so they get no key, token or address of this process.
        given, ours = inherited(PROGRAM, COMPUTE), variables(self._settings.environment)
        return {**given, **ours, "PATH": f"{ours['PATH']}{os.pathsep}{given.get('PATH', '')}"}

    def _loaded(self) -> list[str]:
        """Return the models to load, each after the internal models that it calls."""
        names: list[str] = []
        for model in self.models:
            with suppress(OSError):  # the server itself reports a model that is missing
                names += called_internals((self._repository / model / CONFIG).read_text(encoding="utf-8"))
            names.append(model)
        return names

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        with self.client() as client:
            while time.monotonic() < deadline:
                if self.ended():
                    raise ServerError(f"The embedded Triton ended while starting:\n{self.last_words()}")
                if client.is_live() and all(client.is_ready(name) for name in self.models):
                    return
                time.sleep(0.1)
        raise ServerError(f"The embedded Triton was not ready within {READY_SECONDS:g} s:\n{self.last_words()}")

    def _stop(self) -> None:
        """Send SIGTERM to the supervisor, resources/triton/supervise.py, and wait until it has ended the server."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _plainly_named(repository: Path, folder: Path) -> Path:
    """Return a path of the repository that needs no quoting in a shell, if necessary a link in `folder`.

    Triton starts Python models through a shell and does not quote paths. If a path holds a space, it waits for the
    models for ever.
    """
    if shlex.quote(str(repository)) == str(repository):
        return repository
    link = folder / "repository"
    link.symlink_to(repository.resolve(), target_is_directory=True)
    return link
