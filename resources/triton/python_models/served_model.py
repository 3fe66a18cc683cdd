"""Runs inside Triton: text to answer in one process, tokenizer, engine and all. The python flavour of a release.

One model and not two: each is a process, and a request that goes through two of them waits for four hand-overs. And
the requests that wait are tokenized together and sorted by length before the engine runs, where Triton's own batches
end at the first request of another length. On one H100, all-MiniLM-L6-v2 in fp16 from 64 clients: 11,077 requests a
second against 7,704 from two models with two instances each, 5,516 against 4,770 at mixed lengths, and a lone request
in 0.95 ms against 1.36.

Its version folder also holds answering.py, lane.py, reading.py, aside.py, engine.py with what that needs, the engine's
files, the package `pipelines`, what that reads (pipeline.json, encoder.json, tokenizer.json) and a copy of the
`tokenizers` package.
"""

import json
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
# Links are not resolved: the Python inside Triton cannot name a path that is not ASCII, and the embedded server is
# given its repository by a link whose path is.
_HERE = str(Path(__file__).absolute().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("tokenizers", "pipelines", "engine")

import triton_python_backend_utils as pb_utils  # noqa: E402
from answering import AnsweringModel  # noqa: E402
from reading import open_here  # noqa: E402

#: For running every length once while the model is loaded, and not while somebody waits for an answer.
_WARM_SECONDS = 1.0
#: The same on a GPU, where a CUDA graph is captured for each; what is left is captured when it is asked for.
_WARM_GRAPHS_SECONDS = 20.0


class TritonPythonModel(AnsweringModel):
    """The pipeline's texts, strings `[batch, 1]` each, to its answers."""

    def initialize(self, args):
        """Open pipeline and engine as they were measured. Refused with the reason where the engine cannot run here."""
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
        # CUDA graphs belong to the thread that captured them, and the rate limiter counts only what Triton waits for.
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
