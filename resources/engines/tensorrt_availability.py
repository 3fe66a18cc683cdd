"""Find out whether TensorRT is on this machine, without importing it, because a Dagster process asks."""

from __future__ import annotations

import ctypes.util
import functools
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from resources.machine.targets import capability_of

if TYPE_CHECKING:
    from resources.engines.specs import EngineSpec

_REMEDY = "Install it: pip install 'transformer-refinery[tensorrt]'."
#: The GPUs of TensorRT-RTX 1.7. On a GPU of 9.0 it refuses its own plans.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
#: NVIDIA's packages that no engine is built or run with.
_NO_TOOLKIT = ("nvidia-pytriton",)
#: The first GPUs whose tensor cores support the format.
_FIRST = {"bf16": (8, 0), "fp8": (8, 9)}


def why_no_tensorrt(spec: EngineSpec, target: str) -> str | None:
    """Return why an engine of TensorRT cannot be built here, or None if it can.

    The machine is taken to have the GPU of the target.
    """
    capability = capability_of(target)
    first = _FIRST.get(spec.precision, (0, 0))
    if tuple(map(int, capability.split("."))) < first:
        return (
            f"{spec.name} needs GPUs of compute capability {'.'.join(map(str, first))} or more. The GPUs of {target} "
            f"have {capability} and cannot compute in {spec.precision}."
        )
    if spec.runtime == "onnxruntime":
        return _why_no_provider(spec)
    if find_spec("tensorrt") is not None:
        return None
    if find_spec("tensorrt_rtx") is None:
        return f"{spec.name} needs TensorRT, which is not installed. {_REMEDY}"
    if capability not in RTX_CAPABILITIES:
        return (
            f"{spec.name}: TensorRT-RTX is installed, but it does not run on GPUs of compute capability {capability} "
            f"(it runs on {', '.join(RTX_CAPABILITIES)}). Install TensorRT beside it: "
            "pip install 'transformer-refinery[tensorrt]'."
        )
    return None


def tensorrt_packages() -> dict[str, str]:
    """Return the names and versions of the TensorRT that is installed here.

    These are the packages that hold TensorRT's modules under any name (for example `tensorrt-cu12`), and the library
    that ONNX Runtime's provider would load.
    """
    held = sorted({name for module in ("tensorrt", "tensorrt_rtx") for name in _holders(module)})
    library = _provider_library()
    found = {name: metadata.version(name) for name in held}
    return {**found, "libnvinfer": library.resolve().name if library is not None else "absent"}


@functools.cache
def cuda_packages() -> dict[str, str]:
    """Return the names and versions of the CUDA libraries (cuBLAS, cuDNN) that are installed as Python packages."""
    found = ((str(one.metadata["Name"]), one.version) for one in metadata.distributions())
    return {name: version for name, version in sorted(found) if name.startswith("nvidia-") and name not in _NO_TOOLKIT}


def _holders(module: str) -> list[str]:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return []
    # The folder's modification time changes whenever pip installs, upgrades or removes a package, because pip renames a
    # folder in it.
    return _packages(Path(spec.origin).parents[1].stat().st_mtime_ns).get(module, [])


@functools.lru_cache(maxsize=1)
def _packages(_changed_ns: int) -> Mapping[str, list[str]]:
    """Return all modules with their packages.

    The call takes a third of a second, so its result is cached for the given modification time.
    """
    return metadata.packages_distributions()


def _provider_library() -> Path | None:
    """Return the path of libnvinfer.so.10, from the Python package or from the system.

    If the system knows the library but the usual folders do not hold it, the path is the name alone.
    """
    libraries = find_spec("tensorrt_libs")
    folders = [Path(folder) for folder in (libraries.submodule_search_locations or ())] if libraries is not None else []
    for path in (folder / "libnvinfer.so.10" for folder in folders):
        if path.exists():
            return path
    if ctypes.util.find_library("nvinfer") != "libnvinfer.so.10":
        return None
    usual = (Path("/usr/lib") / machine / "libnvinfer.so.10" for machine in ("x86_64-linux-gnu", "aarch64-linux-gnu"))
    return next((path for path in usual if path.exists()), Path("libnvinfer.so.10"))


def _why_no_provider(spec: EngineSpec) -> str | None:
    """Return why ONNX Runtime's TensorRT provider does not load here, or None if it does.

    ONNX Runtime cannot be asked: it lists the provider wherever it was compiled with it, and runs on the CPU if the
    provider does not load.
    """
    if _provider_library() is not None:
        return None
    return f"{spec.name} needs TensorRT 10 (libnvinfer.so.10), which is not installed. {_REMEDY}"
