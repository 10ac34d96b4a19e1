"""The demo's model: a small convolutional network that reads handwritten digits. Runs as a child of the demo.

    python -m pool.cli.digits train MODEL_DIR      train it, export it to MODEL_DIR/1, tell the progress
    python -m pool.cli.digits answer MODEL_DIR     run the exported model in this process on every scan

Each line on the output is a JSON object: `{"epoch", "epochs", "accuracy"}` while training,
`{"probabilities"}` as the answer. A process of its own, so that nothing of TensorFlow is in the
process that measures, and all its memory is given back before the server starts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SEED = 20_240_229  # of the split and of the training: both must be the same in every run
HELD_OUT = 360  # of 1797
EPOCHS = 20  # 5 s on two cores; accuracy on the held-out part no longer rises
BATCH_ROWS = 32
VERSION = 1


class Digits(NamedTuple):
    """Scikit-learn's scans.

    Attributes:
        images: float32 [1797, 8, 8, 1], 0 (paper) to 1 (ink).
        digits: int64 [1797], what each shows.
        held_out: bool [1797], whether training never saw it.
    """

    images: npt.NDArray[np.float32]
    digits: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]


def load() -> Digits:
    """The scans and the fixed split. Needs scikit-learn."""
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    images = (scans.images / 16.0).astype(np.float32)[..., np.newaxis]
    held_out = np.zeros(len(images), bool)
    held_out[np.random.default_rng(SEED).permutation(len(images))[:HELD_OUT]] = True
    return Digits(images, scans.target.astype(np.int64), held_out)


def train(folder: Path) -> None:
    """Train on the scans that are not held out and export to `folder/1`, whole or not at all."""
    import keras
    import tensorflow as tf

    data = load()
    keras.utils.set_random_seed(SEED)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(128, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.4),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, EPOCHS * (1797 - HELD_OUT) // BATCH_ROWS)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])

    def tell(epoch: int, logs: dict[str, float]) -> None:
        line = {"epoch": epoch + 1, "epochs": EPOCHS, "accuracy": float(logs["accuracy"])}
        print(json.dumps(line), flush=True)

    model.fit(
        data.images[~data.held_out],
        data.digits[~data.held_out],
        batch_size=BATCH_ROWS,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=tell)],
    )

    def serve(image: Any) -> dict[str, Any]:
        probabilities = model(image, training=False)
        return {"digit": tf.argmax(probabilities, -1), "probabilities": probabilities}

    archive = keras.export.ExportArchive()  # holds the weights alone, without the optimizer's state
    archive.track(model)
    archive.add_endpoint("serving_default", serve, [tf.TensorSpec([None, 8, 8, 1], tf.float32, "image")])
    partial = folder / ".exporting"  # no number: never taken for a version
    shutil.rmtree(partial, ignore_errors=True)
    archive.write_out(str(partial), verbose=False)
    partial.rename(folder / str(VERSION))


def answer(folder: Path) -> None:
    """Run the exported model on every scan, in this process, in one batch."""
    import tensorflow as tf

    model = tf.saved_model.load(str(folder / str(VERSION)))
    outputs = model.signatures["serving_default"](image=tf.constant(load().images))
    print(json.dumps({"probabilities": outputs["probabilities"].numpy().tolist()}), flush=True)


if __name__ == "__main__":
    {"train": train, "answer": answer}[sys.argv[1]](Path(sys.argv[2]))
