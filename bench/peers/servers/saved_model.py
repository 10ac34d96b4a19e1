"""The model as every peer's server calls it. Runs in the peers' own environments: no part of pool is here.

What to serve and how is told by the environment: `BENCH_MODEL` (the SavedModel), `BENCH_BATCH` (most rows of
a batch), `BENCH_WAIT_MS`, `BENCH_WORKERS`, `BENCH_PORT`, `BENCH_GRPC_PORT`.
"""

import gc
import os

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

BATCH = int(os.environ["BENCH_BATCH"])
WAIT_MS = float(os.environ["BENCH_WAIT_MS"])
WORKERS = int(os.environ["BENCH_WORKERS"])
PORT = int(os.environ["BENCH_PORT"])
GRPC_PORT = int(os.environ["BENCH_GRPC_PORT"])
PATH = os.environ["BENCH_MODEL"]
SHAPE = tuple(int(size) for size in os.environ["BENCH_SHAPE"].split(","))
OUTPUT_SHAPE = tuple(int(size) for size in os.environ["BENCH_OUTPUT_SHAPE"].split(","))
# Batches of one row need not wait for more: where the model's rows are large, they fill one alone.
IS_BATCHED = BATCH > 1


def load():
    """Load the model; gives a function from rows [n, *SHAPE] float32 to rows of the output."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded = tf.saved_model.load(PATH)
    function = loaded.signatures["serving_default"]
    (name,) = function.structured_input_signature[1]
    (output,) = function.structured_outputs

    def run(rows, _kept=loaded):
        return function(**{name: tf.constant(rows)})[output].numpy()

    for rows in sorted({1, BATCH}):
        run(np.zeros((rows, *SHAPE), np.float32))
    if os.environ.get("BENCH_FREEZE") == "1":
        gc.collect()
        gc.freeze()
    return run


def row(body):
    """One row of the model's input from its bytes."""
    return np.frombuffer(body, np.float32).reshape(SHAPE)
