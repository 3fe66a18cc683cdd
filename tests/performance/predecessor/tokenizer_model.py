"""Runs inside Triton: transformers' tokenizer, one request after the other."""

import json
import sys

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """TEXT, strings `[texts, 1]`, to int64 `[texts, sequence]`, padded to the longest of the request."""

    def initialize(self, args):
        """Load the tokenizer; parameters: where packages are that this environment lacks, the checkpoint's folder."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        sys.path.append(parameters["packages"])  # behind: numpy is to stay the one of this environment
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(parameters["checkpoint"])
        self._max_tokens = int(parameters["max_tokens"])
        self._outputs = [output["name"] for output in config["output"]]

    def execute(self, requests):
        """One call of the tokenizer a request."""
        responses = []
        for request in requests:
            column = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            texts = [text.decode() for text in column.ravel().tolist()]
            tokens = self._tokenizer(
                texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="np"
            )
            responses.append(
                pb_utils.InferenceResponse([pb_utils.Tensor(name, tokens[name]) for name in self._outputs])
            )
        return responses
