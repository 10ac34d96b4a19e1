"""LitServe. Its batched calls take no raw body: rows travel as base64 in JSON."""

import base64

import litserve
import numpy as np
import saved_model as model


class Api(litserve.LitAPI):
    """`{"x": base64}` to `{"y": base64}`."""

    def setup(self, device):
        """Load the model."""
        self.run = model.load()

    def decode_request(self, request):
        """A row."""
        return model.row(base64.b64decode(request["x"]))

    def batch(self, inputs):
        """Rows side by side."""
        return np.stack(inputs)

    def predict(self, x):
        """Run a batch, or a sole row where there are no batches."""
        return self.run(x) if model.IS_BATCHED else self.run(x[None])[0]

    def unbatch(self, output):
        """Its rows."""
        return list(output)

    def encode_response(self, output):
        """The answer of one row."""
        return {"y": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    api = Api(max_batch_size=model.BATCH, batch_timeout=model.WAIT_MS / 1e3)
    server = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=model.WORKERS, timeout=60, restart_workers=True
    )
    server.run(host="127.0.0.1", port=model.PORT, log_level="warning", generate_client_file=False)
