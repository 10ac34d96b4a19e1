"""Triton's python backend: the `model.py` of its model repository."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import saved_model as saved
import triton_python_backend_utils as triton


class TritonPythonModel:
    """`x` to `y`."""

    def initialize(self, args):
        """Load the model."""
        self.run = saved.load()

    def execute(self, requests):
        """Run the requests of a batch together."""
        arrays = [triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        answers = self.run(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])
        responses, at = [], 0
        for array in arrays:
            tensor = triton.Tensor("y", np.ascontiguousarray(answers[at : at + len(array)]))
            responses.append(triton.InferenceResponse([tensor]))
            at += len(array)
        return responses
