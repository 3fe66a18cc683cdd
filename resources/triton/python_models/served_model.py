"""The model of a release of the python flavour: one process holds the tokenizer and the engine.

It is one Triton model instead of two, because each model is a process, and a request that goes through two of them
waits for four hand-overs. In addition, waiting requests are tokenized together and sorted by length before the engine
runs, while Triton's own batches end at the first request of another length. Measured on one H100 with all-MiniLM-L6-v2
in fp16 and 64 clients, one model answers 11,077 requests a second and two models with two instances each answer 7,704.
At mixed lengths they answer 5,516 and 4,770. A lone request takes 0.95 ms and 1.36 ms.

This module runs inside Triton as model.py. Its version folder also holds answering.py, lane.py, reading.py, aside.py,
engine.py with the modules that it needs, the engine's files, the package `pipelines`, the files that the package reads
(pipeline.json, encoder.json, tokenizer.json) and a copy of the `tokenizers` package.
"""

import json
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
# Links are not resolved. The Python inside Triton cannot name a path that is not ASCII, and the embedded server reads
# such a repository through a link with an ASCII path.
_HERE = str(Path(__file__).absolute().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("tokenizers", "pipelines", "engine")

import triton_python_backend_utils as pb_utils  # noqa: E402
from answering import AnsweringModel  # noqa: E402
from reading import open_here  # noqa: E402

#: Time to run every length once while the model is loaded, so that no request has to wait for a length's first run.
_WARM_SECONDS = 1.0
#: The same on a GPU, where a CUDA graph is captured for each length. The remaining graphs are captured on first use.
_WARM_GRAPHS_SECONDS = 20.0


class TritonPythonModel(AnsweringModel):
    """A model that turns the pipeline's texts, strings `[batch, 1]` each, into its answers."""

    def initialize(self, args):
        """Open the pipeline and the engine as they were measured.

        Raises:
            TritonModelException: The engine cannot run here. The message states the reason.
        """
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._answers, self._largest = config["output"][0]["name"], max(1, config["max_batch_size"])
        self._per_token = parameters["per_token"] == "true"  # noqa: S105
        self._pipeline = open_here(_HERE, parameters)
        try:
            from engine import open_engine

            self._engine = open_engine(_HERE, parameters, args, config["instance_group"])
        except Exception as error:
            raise pb_utils.TritonModelException(f"{args['model_name']} cannot be served here: {error}") from error
        self._warm([name for name in parameters["extra_inputs"].split(",") if name])
        # CUDA graphs belong to the thread that captured them, and Triton's rate limiter counts only requests that
        # Triton waits for. In both cases a second thread must not use the engine.
        counted = any(group.get("rate_limiter", {}).get("resources") for group in config["instance_group"])
        self._open_lane(beside=parameters["device"] == "cpu" and not counted)

    def _infer(self, arrays):
        return self._engine.run({name: arrays[name] for name in self._engine.inputs})

    def _warm(self, extra):
        encoder = self._pipeline.encoder
        batches = (encoder.example(1, length, extra) for length in encoder.buckets)
        if hasattr(self._engine, "warm"):
            self._engine.warm(batches, self._largest, _WARM_GRAPHS_SECONDS)
            return
        end = time.monotonic() + _WARM_SECONDS
        for batch in batches:
            self._infer(batch)
            if time.monotonic() > end:
                return
