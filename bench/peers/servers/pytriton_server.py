"""PyTriton: Triton with its models in threads of the calling process."""

import os

import numpy as np
import saved_model as model
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

run = model.load()


@batch
def predict(x):
    """Run a batch."""
    return {"y": run(x)}


if __name__ == "__main__":
    config = TritonConfig(
        http_port=model.PORT,
        grpc_port=model.GRPC_PORT,
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        allow_metrics=False,
    )
    with Triton(config=config, workspace=os.environ["BENCH_FOLDER"] + "/workspace") as triton:
        triton.bind(
            model_name="model",
            infer_func=[predict] * model.WORKERS,
            inputs=[Tensor(name="x", dtype=np.float32, shape=model.SHAPE)],
            outputs=[Tensor(name="y", dtype=np.float32, shape=model.OUTPUT_SHAPE)],
            config=ModelConfig(
                max_batch_size=model.BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(model.WAIT_MS * 1e3)),
            ),
        )
        triton.serve()
