"""A TensorRT plan on a GPU.

This module runs inside Triton as engine.py. Its folder also holds the plan and tensorrt_session.py.
"""

from pathlib import Path

from tensorrt_session import TensorRtSession


def open_engine(folder, parameters, args, groups):
    """Load the plan on the instance's GPU. Raise an error if TensorRT here has another version than the builder's."""
    del groups
    plan, device = Path(folder) / parameters["entry_file"], int(args["model_instance_device_id"])
    return TensorRtSession(plan, parameters["engine_output"], parameters, device=device)
