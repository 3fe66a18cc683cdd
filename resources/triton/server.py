"""The embedded server: the real `tritonserver` of the nvidia-pytriton wheel, in an environment of its own.

It has the Python and ensemble backends only, and its Python models need numpy below 2 (resources.triton.environment).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from resources.errors import ServerError
from resources.triton.client import TextClient
from resources.triton.connection import Connection, Protocol, kept_key, new_key, restrictions
from resources.triton.environment import require_installed
from resources.triton.launch import LOOPBACK, Ports, assemble_backends, command, supervised, variables
from resources.triton.layout import CONFIG, called_internals, public_models
from resources.triton.settings import Control, TritonSettings
from resources.triton.watch import Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_SECONDS = 120.0
#: More than the server is given to finish what it is at, see launch.EXIT_SECONDS.
STOP_SECONDS = 20.0
#: How often a serving process looks for a new release.
WATCH_SECONDS = 1.0


class EmbeddedServer:
    """A Triton server of one repository, on loopback, while the context lasts.

    Explicit model control: it holds the named public models and the releases they are pinned to, and nothing else of
    the repository; the other modes hold all of it, and `models` are those that are waited for. Ports left out are free
    ones. options: further ones of tritonserver. key: of its restricted APIs; None: a random one. It ends when the
    thread that started it ends, however that is.
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
        self._repository, self._settings, self._models, self._log = repository, settings, tuple(models), log
        self._ports = Ports.choose(http_port, grpc_port, metrics_port)
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

    @property
    def pid(self) -> int:
        """The leader of the session that the server and its Python models run in."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> EmbeddedServer:
        environment = self._settings.environment
        require_installed(environment)
        self._ports.require_free()
        with ExitStack() as starting:
            backends = Path(starting.enter_context(tempfile.TemporaryDirectory(prefix="refinery-triton-")))
            assemble_backends(environment, backends)
            self._log.parent.mkdir(parents=True, exist_ok=True)
            output = starting.enter_context(self._log.open("wb"))
            self._process = subprocess.Popen(
                supervised(self._command(backends), backends),
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

    @property
    def metrics_address(self) -> str:
        return f"{LOOPBACK}:{self._ports.metrics}"

    def _command(self, backends: Path) -> list[str]:
        return command(
            self._settings.environment,
            _plainly_named(self._repository, backends),
            backends,
            self._ports,
            self._loaded(),
            self._control,
            [*restrictions(self.connection.key or ""), *self._options],
        )

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        ours = variables(self._settings.environment)
        return {**inherited, **ours, "PATH": f"{ours['PATH']}{os.pathsep}{inherited.get('PATH', '')}"}

    def _loaded(self) -> list[str]:
        """The models, each after those that it calls."""
        names: list[str] = []
        for model in self._models:
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
                if client.is_live() and all(client.is_ready(name) for name in self._models):
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


def serve_foreground(
    repository: Path,
    settings: TritonSettings,
    *,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    log: Path,
    control: Control = "explicit",
    options: Sequence[str] = (),
    key: str | None = None,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
    refresh: Callable[[], None] = lambda: None,
) -> None:
    """Serve every public model until Ctrl-C, SIGTERM or `stop()`.

    control: `explicit`: new releases and models are taken up while it runs; a release that cannot be loaded is said
    so, and the one before goes on serving. `poll`: Triton itself looks, and says so in its log alone. `none`: what is
    there at the start. key: of its restricted APIs; None: a random one. The key of a server that runs is in the
    settings' folder of keys. refresh: called before each look at the repository, which may be a copy. Raises
    ServerError where the server ends by itself, or cannot load a single model of those that are there at the start.
    """
    server = EmbeddedServer(
        repository,
        settings,
        models=() if control == "explicit" else public_models(repository),
        log=log,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        control=control,
        options=options,
        key=key or new_key(),
    )
    keys = nullcontext() if settings.keys is None else kept_key(settings.keys, grpc_port, server.connection.key or "")
    with _sigterm_as_interrupt():
        try:
            with keys, server, server.client() as client:
                watcher = Watcher(repository, client, say) if control == "explicit" else None
                if watcher is not None:
                    watcher.look()
                    if not watcher.serving and public_models(repository):
                        raise ServerError(f"No model of {repository} could be loaded; the log is {log}.")
                names = ", ".join(sorted(watcher.serving if watcher is not None else public_models(repository)))
                addresses = f"http {server.http_address}, grpc {server.grpc_address}"
                say(f"serving {names or 'no model yet'}: {addresses}; log {log}")
                while not stop():
                    time.sleep(WATCH_SECONDS)
                    if server.ended():
                        raise ServerError(f"The embedded Triton ended by itself:\n{server.last_words()}")
                    refresh()
                    if watcher is not None:
                        watcher.look()
        except KeyboardInterrupt:
            say("stopped")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """`kill` ends a `with` block as Ctrl-C does. Outside the main thread no signal can be set, and nothing is done."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
