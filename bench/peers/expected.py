"""Rows and their right answers, from the model called in a process of its own.

`python -m bench.peers.expected PATH FILE ROWS SHAPE` writes `x` and `y` to FILE (`.npz`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.peers.doors import Array


def rows_of(path: Path, rows: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Rows float32 [rows, *shape] and what the model at `path` makes of them."""
    with tempfile.TemporaryDirectory(prefix="pool-bench-") as folder:
        file = Path(folder, "rows.npz")
        words = [str(path), str(file), str(rows), ",".join(map(str, shape))]
        subprocess.run([sys.executable, "-m", "bench.peers.expected", *words], check=True)
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]


def main(path: str, file: str, rows: str, shape: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    x = np.random.default_rng(1).random((int(rows), *map(int, shape.split(","))), np.float32)
    loaded = tf.saved_model.load(str(Path(path, "1")))
    function = loaded.signatures["serving_default"]
    (name,) = function.structured_input_signature[1]
    (y,) = function(**{name: tf.constant(x)}).values()
    np.savez(file, x=x, y=y.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
