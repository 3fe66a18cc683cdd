"""Runs inside Triton: what the models of all runtimes have in common, copied beside each `model.py`."""

import numpy as np
import triton_python_backend_utils as pb_utils


class BatchedModel:
    """int64 inputs `[batch, sequence]` or `[batch, 1]` to one fp32 output.

    That is `[batch, width]`, or `[batch, sequence, width]` where the task is one of tokens. Its `initialize` sets
    `_inputs` and `_output`, the names, and `_answer`, from arrays by name to the output's.
    """

    def execute(self, requests):
        """One run of the engine for all requests of one length, which is how the dynamic batcher groups them."""
        batches = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        groups = {}
        for number, batch in enumerate(batches):
            groups.setdefault(tuple(array.shape[1] for array in batch.values()), []).append(number)
        responses = [None] * len(requests)
        for numbers in groups.values():
            for number, response in zip(numbers, self._run([batches[number] for number in numbers]), strict=True):
                responses[number] = response
        return responses

    def _run(self, batches):
        try:
            feed = {name: np.concatenate([batch[name] for batch in batches]) for name in self._inputs}
            answers = self._answer(feed)
        except Exception as error:
            if len(batches) > 1:  # one request with ids that the model does not know must not cost the others
                return [self._run([batch])[0] for batch in batches]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))]
        ends = np.cumsum([len(batch[self._inputs[0]]) for batch in batches])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self._output, np.ascontiguousarray(rows))])
            for rows in np.split(answers, ends[:-1])
        ]
