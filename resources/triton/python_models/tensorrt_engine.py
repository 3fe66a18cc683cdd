"""Runs inside Triton as engine.py: a TensorRT plan on a GPU. Beside it lie the plan and tensorrt_session.py."""

from pathlib import Path

from tensorrt_session import TensorRtSession


def open_engine(folder, parameters, args, groups):
    """The plan on the instance's GPU. Raises where this machine has another TensorRT than the builder had."""
    del groups
    plan, device = Path(folder) / parameters["entry_file"], int(args["model_instance_device_id"])
    return TensorRtSession(plan, parameters["engine_output"], parameters, device=device)
