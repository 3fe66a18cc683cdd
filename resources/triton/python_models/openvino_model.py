"""Runs inside Triton: an OpenVINO model, where there is no backend of that name (the embedded server).

Its version folder also holds the engine's files, batched_model.py and openvino_session.py.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("openvino")

import triton_python_backend_utils as pb_utils  # noqa: E402
from batched_model import BatchedModel  # noqa: E402


class TritonPythonModel(BatchedModel):
    """A model on the CPU."""

    def initialize(self, args):
        """Compile the model as it was measured, with the same threads."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._output = config["output"][0]["name"]
        try:
            from openvino_session import OpenVinoSession
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{args['model_name']} needs the Python package openvino in the server's environment: {error}"
            ) from error
        session = OpenVinoSession(Path(_HERE) / parameters["entry_file"], self._output, int(parameters["threads"]))
        self._inputs, self._answer = session.inputs, session.run
