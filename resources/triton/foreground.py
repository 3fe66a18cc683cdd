"""Serve a repository in the foreground: follow its releases, repair models that break, and restart a dead server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from resources.errors import RefineryError, ServerError, first_line
from resources.settings.connection import kept_key, new_key
from resources.settings.triton import Control, TritonSettings
from resources.triton.client import TextClient
from resources.triton.guard import BeyondRepairError, Guard
from resources.triton.health import Health
from resources.triton.layout import public_models, public_pointers
from resources.triton.server import EmbeddedServer
from resources.triton.watch import Watcher

#: How often a serving process looks for a new release, and how often for broken models.
WATCH_SECONDS = 1.0
GUARD_SECONDS = 0.25
#: Pauses before a server is started again, by the number of failed starts or short lives in a row. A server that keeps
#: dying must not use up the machine. A server that an attacker kills must be back within 10 s, start included.
PAUSES_SECONDS = (0.0, 1.0, 2.0, 4.0)
_SHORT_LIFE_SECONDS = 10.0
#: Serving ends after this many starts in a row that fail before the server is ready.
MOST_ATTEMPTS = 6
#: At the end, a look at the repository that is under way gets this long. A download may take longer, and the next start
#: removes the files that it left.
_LAST_LOOK_SECONDS = 2.0


def serve_foreground(
    repository: Path,
    settings: TritonSettings,
    *,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    health_port: int | None = None,
    log: Path,
    control: Control = "explicit",
    options: Sequence[str] = (),
    key: str | None = None,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
    refresh: Callable[[], None] = lambda: None,
) -> None:
    """Serve every public model until Ctrl-C, SIGTERM or `stop()`, whatever happens to the server meanwhile.

    Args:
        repository: The repository to serve.
        settings: The settings of the embedded server.
        http_port: The server's HTTP port.
        grpc_port: The server's gRPC port.
        metrics_port: The server's metrics port.
        health_port: The port of the address that says whether all models answer. None means no such address.
        log: The file for the server's log.
        control: In mode `explicit`, this process takes up new releases and models while the server runs. It reports a
            release that cannot be loaded, and the one before goes on serving. In mode `poll`, Triton itself looks and
            reports to its log only. In mode `none`, the server serves the models that are there at the start.
        options: Further options of tritonserver.
        key: The key of the restricted APIs. None means a random one. The settings' folder of keys has it while the
            server runs.
        say: Called with each message for the user.
        stop: Called often. Serving ends when it returns True.
        refresh: Called by another thread before each look at the repository, to bring a copy up to date.

    Raises:
        ServerError: The server does not start, can load none of the models that are there at the start, or cannot be
            started again after it died.
    """
    server = EmbeddedServer(
        repository,
        settings,
        models=(),
        log=log,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        control=control,
        options=options,
        key=key or new_key(),
    )
    server.require_free()
    if health_port in (http_port, grpc_port, metrics_port):
        raise ServerError(
            f"--health-port {health_port} is also the HTTP, gRPC or metrics port. Give four different ports."
        )
    with _sigterm_as_interrupt(), ExitStack() as stack:
        try:
            health = Health(health_port) if health_port is not None else None
            if health is not None:
                stack.enter_context(health)
            if settings.keys is not None:
                stack.enter_context(kept_key(settings.keys, grpc_port, server.connection.key or ""))
            _Serving(server, repository, log, control, health, say, stop, refresh).run()
        except KeyboardInterrupt:
            say("stopped")


class _Serving:
    """One server, which is started again each time it ends."""

    def __init__(
        self,
        server: EmbeddedServer,
        repository: Path,
        log: Path,
        control: Control,
        health: Health | None,
        say: Callable[[str], None],
        stop: Callable[[], bool],
        refresh: Callable[[], None],
    ) -> None:
        self._server, self._repository, self._log, self._control = server, repository, log, control
        self._health, self._say, self._stop, self._refresh = health, say, stop, refresh
        self._served = False
        self._serving: Callable[[], Mapping[str, str]] = dict
        self._watcher: Watcher | None = None
        self._ended = threading.Event()
        self._defect: Exception | None = None

    def run(self) -> None:
        """Serve until `stop` returns True.

        Raises:
            ServerError: The server cannot be started, or can load no model.
        """
        following = threading.Thread(target=self._follow, name="follow", daemon=True)
        following.start()
        try:
            self._serve()
        finally:
            self._ended.set()
            following.join(_LAST_LOOK_SECONDS)

    def _serve(self) -> None:
        failed = short = 0
        while True:
            begun = time.monotonic()
            try:
                if self._control != "explicit":
                    self._server.models = tuple(public_models(self._repository))
                with self._server, self._server.client() as client:
                    why = self._live(client)
            except (ServerError, OSError) as error:  # an OSError too, because a full disk may have room later
                failed += 1
                if not self._served or failed == MOST_ATTEMPTS:
                    raise
                self._say(f"The embedded Triton could not be started again: {first_line(error)}")
                self._pause(failed)
                continue
            if why is None:
                return
            failed, short = 0, short + 1 if time.monotonic() - begun < _SHORT_LIFE_SECONDS else 0
            self._show({"server": why})
            self._say(f"{why}; the embedded Triton is started again")
            self._pause(short)

    def _live(self, client: TextClient) -> str | None:
        """Serve as long as the server lives, and return why it has to be started again, or None if it should stop."""
        over = threading.Event()

        def say(line: str) -> None:
            if not over.is_set():  # afterwards loads fail only because the connection is closed
                self._say(line)

        watcher = Watcher(self._repository, client, say) if self._control == "explicit" else None
        if watcher is not None:
            watcher.look()
            if not watcher.serving and public_models(self._repository):
                raise ServerError(f"No model of {self._repository} could be loaded; the log is {self._log}.")
        # The guard gets a copy, because another thread changes the original.
        serving = (lambda: public_pointers(self._repository)) if watcher is None else lambda: dict(watcher.serving)
        self._serving = serving
        guard = Guard(self._server.pid, client, serving, explicit=watcher is not None, say=self._say, show=self._show)
        self._served = True
        self._show({})
        self._say(
            f"serving {', '.join(sorted(serving())) or 'no model yet'}: http {self._server.http_address}, "
            f"grpc {self._server.grpc_address}{self._health_address()}; log {self._log}"
        )
        self._watcher = watcher
        try:
            return self._guarded(guard)
        finally:
            self._watcher = None
            over.set()

    def _guarded(self, guard: Guard) -> str | None:
        """Repair broken models as long as the server lives, and return the same as `_live`."""
        while not self._stop():
            time.sleep(GUARD_SECONDS)
            if self._server.ended():
                return f"the embedded Triton {self._server.death()}"
            if self._defect is not None:
                raise self._defect
            try:
                guard.look()
            except BeyondRepairError as error:
                self._server.end_soon()
                return str(error)
        return None

    def _follow(self) -> None:
        """Keep the server in step with its repository, in a thread of its own.

        Downloading or loading a release may take minutes. In a thread of its own it does not delay repairs.
        """
        said = ""
        while not self._ended.wait(WATCH_SECONDS):
            try:
                self._refresh()
                if (watcher := self._watcher) is not None:
                    watcher.look()
                said = ""
            except (RefineryError, OSError) as error:  # a network file system may come back
                if str(error) != said:
                    said = str(error)
                    self._say(
                        f"{self._repository} could not be read: {first_line(error)}. What serves goes on serving."
                    )
            except Exception as error:
                self._defect = error
                return

    def _show(self, problems: Mapping[str, str]) -> None:
        if self._health is not None:
            self._health.show(problems or ({} if self._serving() else {"server": "it serves no model yet"}))

    def _health_address(self) -> str:
        return f", health {self._health.address}" if self._health is not None else ""

    def _pause(self, number: int) -> None:
        """Wait before the next attempt, longer after several."""
        end = time.monotonic() + PAUSES_SECONDS[min(number, len(PAUSES_SECONDS) - 1)]
        while time.monotonic() < end and not self._stop():
            time.sleep(0.05)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM end a `with` block as Ctrl-C does.

    Outside the main thread no signal handler can be set, and this does nothing.
    """

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
