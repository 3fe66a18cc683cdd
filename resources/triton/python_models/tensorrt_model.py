"""Runs inside Triton: a TensorRT plan, where there is no backend for it (the embedded server; plans of TensorRT-RTX).

Its version folder also holds the plan, batched_model.py and tensorrt_session.py.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

import triton_python_backend_utils as pb_utils  # noqa: E402
from batched_model import BatchedModel  # noqa: E402
from tensorrt_session import TensorRtSession  # noqa: E402


class TritonPythonModel(BatchedModel):
    """A plan on the instance's GPU."""

    def initialize(self, args):
        """Load the plan. Refused with the reason where this server has another TensorRT than the builder had."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._output = config["output"][0]["name"]
        try:
            plan, device = Path(_HERE) / parameters["entry_file"], int(args["model_instance_device_id"])
            session = TensorRtSession(plan, self._output, parameters, device=device)
        except Exception as error:
            raise pb_utils.TritonModelException(f"{args['model_name']} cannot be served here: {error}") from error
        self._inputs, self._answer = session.inputs, session.run
