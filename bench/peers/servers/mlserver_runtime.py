"""MLServer: a runtime of the V2 protocol. `mlserver start FOLDER`, whose settings name this class."""

import saved_model as model
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Runtime(MLModel):
    """`x` to `y`."""

    async def load(self):
        """Load the model."""
        self.run = model.load()
        return True

    async def predict(self, payload):
        """Run a batch."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        answers = self.run(rows.reshape(-1, *model.SHAPE))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", answers)])
