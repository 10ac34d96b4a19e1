"""Ray Serve: replicas behind its HTTP proxy, batches by `serve.batch`."""

import os
import signal

import numpy as np
import ray
import saved_model as model
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=model.WORKERS, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.1})
class Model:
    """Raw float32 in and out."""

    def __init__(self):
        self.run = model.load()

    @serve.batch(max_batch_size=model.BATCH, batch_wait_timeout_s=model.WAIT_MS / 1e3)
    async def predict(self, rows):
        """Run a batch."""
        return list(self.run(np.stack(rows)))

    async def __call__(self, request: Request):
        """Answer a request."""
        answer = await self.predict(model.row(await request.body()))
        return Response(answer.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
        _temp_dir=os.environ["BENCH_FOLDER"],
    )
    serve.start(http_options={"host": "127.0.0.1", "port": model.PORT})
    serve.run(Model.bind())
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()
