"""The ceiling: one process that calls the model in a loop, by the cheapest call pool itself knows.

`python -m bench.bare PATH --rows R --threads T [--core C]` warms up, prints a line, and then for each
line with a number of seconds on stdin prints one JSON line with what it reached.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from pool.backends import find_backend
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
    call = model.bind(signature.name, [inputs[spec.name] for spec in signature.inputs])
    for _ in range(20):
        call()
    print(json.dumps({"warm": True}), flush=True)
    for line in sys.stdin:
        seconds = float(line)
        times = []
        begin = last = time.perf_counter()
        while last - begin < seconds:
            call()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        rate = len(times) * args.rows / (last - begin)
        print(json.dumps({"rows_per_s": rate, "p50_ms": float(np.median(times)) * 1e3}), flush=True)


main()
