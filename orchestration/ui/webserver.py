"""A program that serves Dagster's web pages behind a guard, with Dagster's daemon beside them. ui.py starts it.

    python -m orchestration.ui.webserver --workspace FILE [--host HOST] [--port PORT] [--daemon]

`dagster dev` does the same without the guard, and opens the port in a process of its own. The code server that both
share listens on a socket in the file system.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import dagster as dg
import uvicorn
from dagster._cli.proxy_server_manager import ProxyServerManager
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context

from orchestration.settings import read_workspace
from orchestration.ui.guard import PagesGuard

#: The defaults of the command `dagster-webserver`, for an instance in a database server: the longest statement, the
#: age at which a connection is replaced, and the connections beyond the pool's size.
_STATEMENT_MS, _CONNECTION_SECONDS, _MORE_CONNECTIONS = 15_000, 3600, 20
#: The time between two requests of a page for news, which is that of `dagster dev`.
_POLL_MS = 2000
#: The time that requests under way (such as the stream of a run's events) and the daemon have to end.
_STOP_SECONDS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, or until the daemon ends by itself, which is a failure."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestration.ui.webserver", description="Serve Dagster's pages behind a guard."
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--workspace", required=True, metavar="FILE", help="Dagster's workspace.yaml")
    parser.add_argument("--daemon", action="store_true", help="run Dagster's daemon too, on the same definitions")
    options = parser.parse_args(arguments)
    address = read_workspace(os.environ).dagster_ui
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("dagster", "dagster-webserver"):
        logging.getLogger(name).setLevel(logging.INFO)
    # With this, Dagster shows errors of the definitions without the lines of its own code.
    os.environ["DAGSTER_IS_DEV_CLI"] = "1"
    signal.signal(signal.SIGTERM, _as_interrupt)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        instance = stack.enter_context(dg.DagsterInstance.get())
        instance.optimize_for_webserver(_STATEMENT_MS, _CONNECTION_SECONDS, _MORE_CONNECTIONS)
        file = stack.enter_context(_code_servers(instance, options.workspace))
        daemon = stack.enter_context(_daemon(file)) if options.daemon else None
        context = stack.enter_context(
            WorkspaceProcessContext(
                instance, WorkspaceFileTarget([file]), dg.__version__, code_server_log_level="warning"
            )
        )
        app = create_app_from_workspace_process_context(context, live_data_poll_rate=_POLL_MS)
        server = uvicorn.Server(
            uvicorn.Config(
                PagesGuard(app, address),
                host=options.host,
                port=options.port,
                log_level="warning",
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )
        if daemon is not None:
            threading.Thread(target=_end_with, args=(daemon, server), daemon=True).start()
        server.run()
        if daemon is not None and daemon.poll() is not None:
            logging.getLogger("dagster").error("The daemon ended by itself with exit status %s.", daemon.returncode)
            return 1
    return 0


def _end_with(daemon: subprocess.Popen[bytes], server: uvicorn.Server) -> None:
    """End the server when the daemon ends, because without the daemon no sensor looks and no queued run begins."""
    daemon.wait()
    server.should_exit = True


@contextmanager
def _code_servers(instance: dg.DagsterInstance, workspace: str) -> Iterator[str]:
    """Yield a workspace file that names a code server for each location.

    For each location of `workspace` that has no code server, one is started.
    """
    with (
        ProxyServerManager(instance, WorkspaceFileTarget([workspace]), "warning") as servers,
        tempfile.TemporaryDirectory(prefix="refinery-ui-") as folder,
    ):
        file = Path(folder) / "workspace.yaml"
        file.write_text(json.dumps({"load_from": servers.get_code_server_specs()}), encoding="utf-8")  # JSON is YAML
        yield str(file)


@contextmanager
def _daemon(file: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "dagster._daemon", "run", "--workspace", file]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _as_interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
