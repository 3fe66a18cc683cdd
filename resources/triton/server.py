"""The embedded server: the real `tritonserver` of the nvidia-pytriton wheel, in an environment of its own.

It has the Python and ensemble backends only, and its Python models need numpy below 2 (resources.triton.environment).
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
#: For requests under way, of a server that ends because it is broken.
_SOON_SECONDS = 1.0
#: Of a log, which may be long.
_LAST_BYTES = 2**18
#: More than the server is given to finish what it is at, see launch.EXIT_SECONDS.
STOP_SECONDS = 20.0


class EmbeddedServer:
    """A Triton server of one repository, on loopback, while the context lasts.

    Explicit model control: it holds the named public models and the releases they are pinned to, and nothing else of
    the repository; the other modes hold all of it, and `models` are those that are waited for. They may be changed
    before the next start. Ports left out are free ones. options: further ones of tritonserver. key: of its restricted
    APIs; None: a random one. It ends when the thread that started it ends, however that is.
    Raises ServerError with the telling lines of its log where it does not get ready.
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
        return f"{LOOPBACK}:{self._ports.grpc}"

    @property
    def http_address(self) -> str:
        return f"{LOOPBACK}:{self._ports.http}"

    def client(self, protocol: Protocol = "grpc") -> TextClient:
        """Return a client that may use the restricted APIs too."""
        address = self.grpc_address if protocol == "grpc" else self.http_address
        return TextClient(address, protocol, self.connection)

    def require_free(self) -> None:
        """Raise ServerError where a port is taken, or given twice."""
        self._ports.require_free()

    @property
    def pid(self) -> int:
        """The leader of the session that the server and its Python models run in."""
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
            # What it said before it died is kept, where it is started again.
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
        """Whether the server has ended by itself."""
        return self._process is None or self._process.poll() is not None

    def death(self) -> str:
        """How it ended, as the end of a sentence; the supervisor's exit status says that as a shell does."""
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return "has not ended"
        if status > 128:
            return f"ended by {signal_text(status - 128)}"
        if status < 0:
            return f"lost its supervisor by {signal_text(-status)}"
        return f"ended by itself with exit status {status}"

    def end_soon(self) -> None:
        """End a server that is broken. By itself it would wait for models whose processes are dead."""
        with suppress(psutil.Error):
            begun = psutil.Process(self.pid).children()
            for process in begun:
                process.terminate()
            for process in psutil.wait_procs(begun, _SOON_SECONDS)[1]:
                process.kill()

    def last_words(self) -> str:
        """The lines of its log that say what went wrong, or its last."""
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        telling = [
            line for line in lines if line.startswith("E") or "error" in line.lower() or "failed" in line.lower()
        ]
        return "\n".join((telling or lines)[-8:])[-2000:]

    @property
    def metrics_address(self) -> str:
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
        # Models and what they run come from outside: they get no key, token or address of ours.
        given, ours = inherited(PROGRAM, COMPUTE), variables(self._settings.environment)
        return {**given, **ours, "PATH": f"{ours['PATH']}{os.pathsep}{given.get('PATH', '')}"}

    def _loaded(self) -> list[str]:
        """The models, each after those that it calls."""
        names: list[str] = []
        for model in self.models:
            with suppress(OSError):  # the server itself says that it is not there
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
        """SIGTERM; resources/triton/supervise.py sees to the rest."""
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
    """The repository, by a name that a shell takes as it is: a link in `folder` where its own is none.

    Triton starts Python models through a shell and does not quote; with a space in a path it waits for them for ever.
    """
    if shlex.quote(str(repository)) == str(repository):
        return repository
    link = folder / "repository"
    link.symlink_to(repository.resolve(), target_is_directory=True)
    return link
