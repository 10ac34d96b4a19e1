"""mosec: a front in Rust, workers in Python. Its settings `--port` and `--timeout` are arguments."""

import numpy as np
import saved_model as model
from mosec import Server, Worker


class Inference(Worker):
    """Raw float32 in and out."""

    def __init__(self):
        self.run = model.load()

    def deserialize(self, data):
        """A row from a request's body."""
        return model.row(data)

    def serialize(self, data):
        """The body of the answer."""
        return data.tobytes()

    def forward(self, data):
        """Run a batch: a list of rows, or a sole row where there are no batches."""
        if not model.IS_BATCHED:
            return self.run(data[None])[0]
        return list(self.run(np.stack(data)))


if __name__ == "__main__":
    server = Server()
    # A wait of 0 is taken for its default of 10 ms: 1 ms is the least.
    wait_ms = max(1, round(model.WAIT_MS))
    server.append_worker(
        Inference, num=model.WORKERS, max_batch_size=model.BATCH, max_wait_time=wait_ms, timeout=60
    )
    server.run()
