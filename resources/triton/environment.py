"""The embedded server's own environment: Triton's wheel, numpy 1, and the runtimes that were measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from resources.engines.tensorrt_availability import tensorrt_packages
from resources.errors import ServerError
from resources.machine.device import first_gpu
from resources.processes.variables import NETWORK, PIP, PROGRAM, inherited
from resources.storage.atomic import write_whole
from resources.storage.locks import file_lock

#: 0.7.0 ships Triton 2.51.0 (24.10). Without its dependencies: those are of its Python API, which is not used.
_TRITON = "nvidia-pytriton==0.7.0"
#: Triton's Python backend of that version loads with numpy 2, and then fails at the first request.
_NUMPY = "numpy<2"
_STAMP = "refinery.json"
_BEGUN = "refinery.begun"
_INSTALL_SECONDS = 1800


def requirements() -> dict[str, list[str]]:
    """What is installed: `alone` without dependencies, `whole` with them. OpenVINO, where it is a candidate here.

    TensorRT where it can run: it is large, and a plan needs the very version that built it.
    """
    runtimes = [_installed("onnxruntime-gpu") or _installed("onnxruntime")]
    if not runtimes[0]:
        raise ServerError("onnxruntime is not installed here; install transformer-refinery again.")
    runtimes += filter(None, [_installed("openvino")])
    if first_gpu() is not None:
        packages = {name: version for name, version in tensorrt_packages().items() if name != "libnvinfer"}
        runtimes += [f"{name}=={version}" for name, version in packages.items()]
    return {"alone": [_TRITON], "whole": [_NUMPY, *runtimes]}


def _installed(name: str) -> str:
    """The distribution at the version that is here; empty where it is not."""
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return ""


def is_installed(environment: Path) -> bool:
    """Whether the environment is there, whole, and of this version of what it should hold."""
    try:
        stamp = json.loads((environment / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _wanted(environment))


def require_installed(environment: Path) -> None:
    """Raise ServerError with the remedy where it is not there."""
    if not is_installed(environment):
        state = "is out of date" if (environment / _STAMP).exists() else "is not installed"
        raise ServerError(
            f"The embedded Triton {state} (looked in {environment}). Run: refinery setup. Or point "
            "REFINERY_TRITON_GRPC to a server of your own."
        )


def install(environment: Path, progress: Callable[[str], None] = print) -> None:
    """Build the environment, unless it is there. Raises ServerError with pip's last words.

    The stamp is written last, so that an interrupted installation counts as none and is begun anew.
    """
    if is_installed(environment):
        return
    if sys.platform != "linux":
        raise ServerError(
            "The embedded Triton runs on Linux alone. Point REFINERY_TRITON_GRPC to a server of your own."
        )
    try:
        with file_lock(environment.with_name(f".{environment.name}.lock")):
            if not is_installed(environment):
                _require_ours(environment)
                progress(f"installing the embedded Triton into {environment} (once, 600 MB or more)")
                _build(environment)
                progress("installed")
    except OSError as error:
        raise ServerError(
            f"The embedded Triton cannot be installed into {environment}: {error.strerror or error}. Mend it, or set "
            "REFINERY_TRITON_ENVIRONMENT to another folder."
        ) from error


def _require_ours(environment: Path) -> None:
    """What is there will be removed: it must be an installation of ours, whole or not."""
    ours = (environment / _STAMP).exists() or (environment / _BEGUN).exists()
    if environment.exists() and not ours and any(environment.iterdir()):
        raise ServerError(
            f"{environment} holds something that `refinery setup` did not make. Set REFINERY_TRITON_ENVIRONMENT to "
            "another folder, or remove this one."
        )


def _build(environment: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    environment.mkdir(parents=True)
    (environment / _BEGUN).touch()
    _run([sys.executable, "-m", "venv", str(environment)])
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = requirements()
    _run([*pip, "--no-deps", *wanted["alone"]])
    _run([*pip, *wanted["whole"]])
    write_whole(environment / _STAMP, json.dumps(_wanted(environment)))


def _wanted(environment: Path) -> dict[str, object]:
    # A virtual environment cannot be moved: one that was copied elsewhere counts as none.
    return {"place": os.path.abspath(environment), "python": list(sys.version_info[:2]), **requirements()}  # noqa: PTH100 - links stay


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command,
            env=inherited(PROGRAM, PIP, NETWORK, secrets=PIP),
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServerError(f"Gave up after {_INSTALL_SECONDS} s: {' '.join(command)}") from None
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ServerError(f"The embedded Triton cannot be installed: {' '.join(command[1:])} failed:\n{last}")
