"""Check whether an engine can be built on this machine."""

from __future__ import annotations

from importlib.util import find_spec

from resources.engines.specs import EngineSpec
from resources.engines.tensorrt_availability import why_no_tensorrt
from resources.machine.device import why_not_here
from resources.machine.targets import device_of


def unsupported_reason(spec: EngineSpec, target: str) -> str | None:
    """Return why the engine cannot be built for the target on this machine, or None if it can."""
    device = device_of(target)
    if device not in spec.devices:
        where = "an NVIDIA GPU; the target 'cpu' has none" if device == "cpu" else f"a CPU; {target!r} is a GPU"
        return f"{spec.name} needs {where}."
    if spec.runtime == "openvino" and find_spec("openvino") is None:
        return (
            f"{spec.name} needs OpenVINO, which is not installed. "
            "Install it: pip install 'transformer-refinery[openvino]'."
        )
    return why_not_here(target) or (why_no_tensorrt(spec, target) if spec.tuned else None)
