"""Runs inside Triton as engine.py: an OpenVINO model on the CPU. Beside it lie its files and openvino_session.py."""

from pathlib import Path


def open_engine(folder, parameters, args, instances):
    """The model, compiled as it was measured, with the same threads, which instances share."""
    del args
    try:
        from openvino_session import OpenVinoSession
    except ImportError as error:
        raise RuntimeError(f"it needs the Python package openvino in the server's environment: {error}") from error
    threads = int(parameters["threads_beside"] if instances > 1 else parameters["threads"])
    return OpenVinoSession(Path(folder) / parameters["entry_file"], parameters["engine_output"], threads)
