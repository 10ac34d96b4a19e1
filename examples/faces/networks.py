"""Exports the networks of the package `mtcnn`, which carries their weights. Runs as a child of the example.

    python -m examples.faces.networks FOLDER     writes FOLDER/proposal, FOLDER/refinement, FOLDER/output

All take `pixels` from -1 to 1, float32 [rows, height, width, 3]. They give `face`, the probability of one,
and `offsets`, by how much the corners of its box (left, top, right, bottom) are off, in parts of its size.
The first gives both for each place of a grid, at every other pixel. The third gives `landmarks` as well: x of
left eye, right eye, nose, left and right corner of the mouth, then their y.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = PROPOSAL, REFINEMENT, OUTPUT = "proposal", "refinement", "output"


def export(folder: Path) -> None:
    """Write the three networks, each whole or not at all."""
    import keras
    import tensorflow as tf
    from mtcnn.network.onet import ONet
    from mtcnn.network.pnet import PNet
    from mtcnn.network.rnet import RNet
    from mtcnn.utils.tensorflow import load_weights

    for name, network, weights, side in (
        (PROPOSAL, PNet(), "pnet.lz4", None),
        (REFINEMENT, RNet(), "rnet.lz4", 24),
        (OUTPUT, ONet(), "onet.lz4", 48),
    ):
        network.build()
        network.set_weights(load_weights(weights))
        archive = keras.export.ExportArchive()
        archive.track(network)
        spec = tf.TensorSpec([None, side, side, 3], tf.float32, "pixels")
        archive.add_endpoint("serving_default", _named(network), [spec])
        partial = folder / name / ".exporting"  # no number: never taken for a version
        shutil.rmtree(partial, ignore_errors=True)
        archive.write_out(str(partial), verbose=False)
        partial.rename(folder / name / "1")


def _named(network: Any) -> Callable[[Any], dict[str, Any]]:
    """The network with names for what it gives."""

    def serve(pixels: Any) -> dict[str, Any]:
        offsets, *landmarks, classes = network(pixels)
        outputs = {"offsets": offsets, "face": classes[..., 1]}
        if landmarks:
            (outputs["landmarks"],) = landmarks
        return outputs

    return serve


if __name__ == "__main__":
    export(Path(sys.argv[1]))
