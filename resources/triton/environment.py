"""The embedded server's own virtual environment, with Triton's wheel, numpy 1, and the runtimes that were measured."""

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

#: 0.7.0 ships Triton 2.51.0 (24.10). Its dependencies are left out, because only its unused Python API needs them.
_TRITON = "nvidia-pytriton==0.7.0"
#: With numpy 2, the Python backend of that version loads and then fails at the first request.
_NUMPY = "numpy<2"
_STAMP = "refinery.json"
_BEGUN = "refinery.begun"
_INSTALL_SECONDS = 1800


def requirements() -> dict[str, list[str]]:
    """Return the packages to install: `alone` without their dependencies, and `whole` with them.

    OpenVINO is included where it is a candidate, that is, where it is installed here. TensorRT is large, so it is
    included only where it can run, in the version installed here: a plan runs only on the version that built it.

    Raises:
        ServerError: onnxruntime is not installed here.
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
    """Return the requirement for the installed version of a distribution, or an empty string if there is none."""
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return ""


def is_installed(environment: Path) -> bool:
    """Return whether the environment is complete and holds the current requirements."""
    try:
        stamp = json.loads((environment / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _wanted(environment))


def require_installed(environment: Path) -> None:
    """Check that the environment is installed.

    Raises:
        ServerError: The environment is missing or out of date. The message names the remedy.
    """
    if not is_installed(environment):
        state = "is out of date" if (environment / _STAMP).exists() else "is not installed"
        raise ServerError(
            f"The embedded Triton {state} (looked in {environment}). Run: refinery setup. Or point "
            "REFINERY_TRITON_GRPC to a server of your own."
        )


def install(environment: Path, progress: Callable[[str], None] = print) -> None:
    """Build the environment unless it is installed.

    The stamp is written last. An interrupted installation has no stamp, so the next call starts it again.

    Raises:
        ServerError: The environment cannot be built. If pip failed, the message has the last lines of its output.
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
    """Check that the folder is an installation of ours, complete or not, because the build removes its content."""
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
    # A virtual environment cannot be moved. With its place in the stamp, a moved copy counts as not installed.
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
