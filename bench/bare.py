"""The model without pool: one process that calls it in a loop.

`python -m bench.bare PATH --rows R --threads T [--core C]` warms up, prints a line, and then for each
line "CALL SECONDS" on stdin prints one JSON line with what it reached. CALL is one of

    documented   `signature(**inputs)` as TensorFlow documents it: numpy array in, numpy array out
    cheapest     the call pool's own workers make, on tensors prepared once: the ceiling
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from pool.backends import Array, find_backend
from pool.config import Placement
from pool.sample import sample_inputs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--core", type=int)
    args = parser.parse_args()
    backend = find_backend("tensorflow")
    backend.preload()
    cores = () if args.core is None else (args.core,)
    backend.prepare(Placement(cores=cores, threads=args.threads))
    _, path = backend.resolve(args.path)
    model = backend.load(path, None)
    signature = next((s for s in model.signatures if s.name == "serving_default"), model.signatures[0])
    inputs = sample_inputs(signature, args.rows)
    calls: dict[str, Callable[[], object]] = {
        "cheapest": model.bind(signature.name, [inputs[spec.name] for spec in signature.inputs]),
        "documented": documented(path, signature.name, inputs),
    }
    for call in calls.values():
        for _ in range(20):
            call()
    print(json.dumps({"warm": True}), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(json.dumps(measure(calls[name], args.rows, float(seconds))), flush=True)


def documented(path: str, signature: str, inputs: dict[str, Array]) -> Callable[[], object]:
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    function = loaded.signatures[signature]

    def call(_kept: object = loaded) -> object:
        outputs = function(**{name: tf.constant(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return call


def measure(call: Callable[[], object], rows: int, seconds: float) -> dict[str, float]:
    times = []
    begin = last = time.perf_counter()
    while last - begin < seconds:
        call()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return {"rows_per_s": len(times) * rows / (last - begin), "p50_ms": float(np.median(times)) * 1e3}


main()
