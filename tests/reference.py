"""What TensorFlow itself answers, computed in a process of its own: `python -m tests.reference FOLDER`.

Every `NAME.npy` in the folder is an input of the model NAME of `tests.models`; its answer, computed with
one thread in batches of `ROWS` rows, is written to `NAME.out.npy`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests import models

ROWS = 16


def answers(folder: Path, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The answers of some models; for each, the input has a multiple of `ROWS` rows."""
    for name, array in inputs.items():
        models.path(name)
        np.save(folder / f"{name}.npy", array)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference", str(folder)],
        cwd=models.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: np.load(folder / f"{name}.out.npy") for name in inputs}


def main(folder: Path) -> None:
    """Compute the answers of every input in the folder."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    for file in list(folder.glob("*.npy")):
        directory = models.path(file.stem)
        loaded = tf.saved_model.load(str(directory / "1"))
        signature = loaded.signatures["serving_default"]
        (name,) = signature.structured_input_signature[1]
        x = np.load(file)
        batches = [x[i : i + ROWS] for i in range(0, len(x), ROWS)]
        outputs = [next(iter(signature(**{name: tf.constant(b)}).values())).numpy() for b in batches]
        np.save(folder / f"{file.stem}.out.npy", np.concatenate(outputs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
