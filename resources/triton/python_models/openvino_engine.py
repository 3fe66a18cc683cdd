"""An OpenVINO model on the CPU.

This module runs inside Triton as engine.py. Its folder also holds the model's files and openvino_session.py.
"""

from pathlib import Path


def open_engine(folder, parameters, args, groups):
    """Compile the model as it was measured, with the same threads. Several instances share the threads.

    Raises:
        RuntimeError: The server's environment does not have the package openvino.
    """
    del args
    try:
        from openvino_session import OpenVinoSession
    except ImportError as error:
        raise RuntimeError(f"it needs the Python package openvino in the server's environment: {error}") from error
    alone = sum(group["count"] for group in groups) == 1
    threads = int(parameters["threads" if alone else "threads_beside"])
    return OpenVinoSession(Path(folder) / parameters["entry_file"], parameters["engine_output"], threads)
