"""TensorFlow models that only measurements serve. `path(name)` builds one if need be, and keeps it.

Run as `python -m bench.models DIRECTORY NAME` to build; what was built lies in `build/bench-models/`, under
a hash of this file. `tests/models.py` has the others.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
WIDTH = 64  # floats in a row of either model
ABORT_ABOVE = 1e6


def path(name: str) -> Path:
    """Where the model of that name is."""
    directory = (
        REPOSITORY / "build" / "bench-models" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    )
    target = directory / name
    if not target.exists():
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        command = [sys.executable, "-m", "bench.models", str(directory), name]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"model {name!r} cannot be built: {done.stderr[-4000:]}")
    return target


def build_aborting(directory: str) -> None:
    """`x` float32 [any, 64] to `y` [any, 10]; aborts the process if an item is above `ABORT_ABOVE`."""
    import tensorflow as tf

    class Aborting(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.matrix = tf.Variable(tf.random.Generator.from_seed(1).normal([WIDTH, 10]))

        @tf.function(input_signature=[tf.TensorSpec([None, WIDTH], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def run(self, x: Any) -> Any:
            def abort() -> Any:
                with tf.control_dependencies([tf.raw_ops.Abort(error_msg="a row told the model to abort")]):
                    return tf.constant(0)

            checked = tf.cond(tf.reduce_any(x > ABORT_ABOVE), abort, lambda: tf.constant(0))
            with tf.control_dependencies([checked]):
                return {"y": tf.identity(x) @ self.matrix}

    module = Aborting()
    tf.saved_model.save(module, directory, signatures=module.run)


def build_slow(directory: str) -> None:
    """`x` float32 [any, 64] to `y` [any, 8], by 16 products with 2048 x 2048 matrices: 0.13 GFLOP a row."""
    import tensorflow as tf

    class Slow(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            chance = tf.random.Generator.from_seed(2)
            self.first = tf.Variable(chance.normal([WIDTH, 2048], stddev=0.1))
            self.between = [tf.Variable(chance.normal([2048, 2048], stddev=0.03)) for _ in range(4)]
            self.last = tf.Variable(chance.normal([2048, 8], stddev=0.02))

        @tf.function(input_signature=[tf.TensorSpec([None, WIDTH], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def run(self, x: Any) -> Any:
            x = x @ self.first
            for _ in range(4):
                for matrix in self.between:
                    x = tf.nn.relu(x @ matrix)
            return {"y": x @ self.last}

    module = Slow()
    tf.saved_model.save(module, directory, signatures=module.run)


def build_crop(directory: str) -> None:
    """`x` float32 [any, 1080, 1920, 3], 25 MB a row, to `y`, 8 x 8 points: all copying, no work."""
    import tensorflow as tf

    class Crop(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec([None, 1080, 1920, 3], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def run(self, x: Any) -> Any:
            return {"y": tf.identity(x[:, 536:544, 956:964, :])}

    module = Crop()
    tf.saved_model.save(module, directory, signatures=module.run)


BUILDERS: dict[str, Callable[[str], None]] = {
    "aborting": build_aborting,
    "crop": build_crop,
    "slow": build_slow,
}


def main(directory: Path, name: str) -> None:
    """Build a model, under a temporary name first, so that nobody ever finds half of one."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=directory) as temporary:
        BUILDERS[name](str(Path(temporary, name, "1")))
        Path(temporary, name).rename(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
