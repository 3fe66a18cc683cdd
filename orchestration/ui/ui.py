"""`refinery ui`: the pages of Dagster and MLflow on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import dagster as dg

from orchestration.automation.sensors import SENSOR
from orchestration.runs.instance import WORKSPACE, prepare_instance
from orchestration.settings import read_execution, read_policies, read_workspace, tracker_of, webhook_of
from resources.errors import ServerError
from resources.processes.variables import DATABASE, MLFLOW, PROGRAM, PYTHON, inherited
from resources.settings.workspace import Workspace
from resources.triton.launch import supervised

_LOOPBACK = "127.0.0.1"
_MLFLOW_UI = "REFINERY_MLFLOW_UI"
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0


def serve_pages(options: Namespace) -> int:
    """Start both servers, print their addresses, and stop both when either ends or on Ctrl-C.

    If an MLflow server runs elsewhere, none is started, and the address of that server is printed.
    """
    workspace = read_workspace(os.environ)
    # Mistakes in these settings would otherwise show only on Dagster's pages, which then have no definitions.
    for read in (webhook_of, read_execution, read_policies):
        read(os.environ)
    _require_free(options.dagster_port, "--dagster-port")
    if not is_tracking_server(workspace):
        _require_free(options.mlflow_port, "--mlflow-port")
    os.environ.update(page_addresses(workspace, options.dagster_port, options.mlflow_port))
    prepare_instance(workspace)
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", workspace.catalog().names)
    tracker_of(workspace).prepare()
    folder = workspace.home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    workspace_file = folder / "workspace.yaml"
    workspace_file.write_text(WORKSPACE)
    dagster = [sys.executable, "-m", "orchestration.ui.webserver", "--workspace", str(workspace_file), "--daemon"]
    mlflow = [sys.executable, "-m", "mlflow", "server", "--host", _LOOPBACK, "--workers", "1"]
    commands = {"dagster": [*dagster, "--host", _LOOPBACK, "--port", str(options.dagster_port)]}
    if not is_tracking_server(workspace):
        commands["mlflow"] = [
            *mlflow,
            *("--port", str(options.mlflow_port)),
            *("--default-artifact-root", (workspace.home / "tracking" / "artifacts").as_uri()),
        ]
    # Dagster's processes run our code with all of our settings, and dagster.yaml may name any variable.
    environments = {"dagster": dict(os.environ), "mlflow": mlflow_variables(workspace)}
    ports = {"dagster": options.dagster_port, "mlflow": options.mlflow_port}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP comes when the terminal is closed
        signal.signal(number, _as_interrupt)
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("ab") as log:
                processes[name] = subprocess.Popen(
                    supervised(command, Path(tempfile.mkdtemp(prefix="refinery-ui-"))),
                    env=environments[name],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for name, process in processes.items():
            _await(name, process, ports[name], folder / f"{name}.log")
            print(f"{name:8} http://{_LOOPBACK}:{ports[name]}", flush=True)
        if "mlflow" not in commands:
            print(f"{'mlflow':8} {os.environ[_MLFLOW_UI]}", flush=True)
        print(f"While the sensor {SENSOR} is on, new models and revisions are optimized.", flush=True)
        print("Ctrl-C stops the pages.", flush=True)
        while all(process.poll() is None for process in processes.values()):
            time.sleep(0.5)
        ended = [name for name, process in processes.items() if process.poll() is not None]
        raise ServerError(f"{ended[0]} ended by itself. Its last output is in {folder / ended[0]}.log.")
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must leave none of them running
        _stop(list(processes.values()))


def is_tracking_server(workspace: Workspace) -> bool:
    """Return whether MLflow runs elsewhere, with pages of its own."""
    return workspace.mlflow_uri().is_web


def mlflow_variables(workspace: Workspace) -> dict[str, str]:
    """Return the environment of MLflow's server, with the address of its database and without the keys of a cloud.

    That address may hold a password. Every user of the machine can read a command line, but only the same user can
    read an environment.
    """
    uri = workspace.mlflow_uri().reveal()
    drivers = () if uri.startswith("sqlite:") else DATABASE
    found = inherited(PROGRAM, PYTHON, MLFLOW, secrets=drivers, MLFLOW_BACKEND_STORE_URI=uri)
    # MLflow 3 runs jobs of its evaluation and tracing features in eight more processes, with 1 GB of memory together.
    # Nothing here uses them.
    found.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    return found


def page_addresses(workspace: Workspace, dagster_port: int, mlflow_port: int) -> dict[str, str]:
    """Return the addresses of the pages as settings for the runs that start there, which link to them.

    An address that the user set stays, because it is the one that people use.
    """
    server = workspace.mlflow_uri() if is_tracking_server(workspace) else f"http://{_LOOPBACK}:{mlflow_port}"
    return {
        "REFINERY_DAGSTER_UI": workspace.dagster_ui or f"http://{_LOOPBACK}:{dagster_port}",
        _MLFLOW_UI: workspace.tracking_ui or server,
    }


def _require_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            raise ServerError(f"Port {port} of {_LOOPBACK} is in use. Choose another with {option}.") from None


def _await(name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"{name} did not start. Its last output is in {log}.")
        with suppress(OSError), socket.create_connection((_LOOPBACK, port), timeout=1):
            return
        time.sleep(0.2)
    raise ServerError(f"{name} did not answer within {_START_SECONDS:g} s. See its log {log}.")


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the processes. resources/triton/supervise.py, which runs them, also ends the processes that they started."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _as_interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt
