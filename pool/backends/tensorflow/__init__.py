"""The TensorFlow backend: SavedModels of every age, and `.keras` files. Runs in the zygote's forks only.

    location      which directory a configured path means; exports `.keras` files
    metagraph     loads a SavedModel by its MetaGraph, the way TensorFlow Serving does
    saved_model   a loaded SavedModel: its signatures, its variables, its calls
    loaded        what it consists of, whichever way it was loaded
    revived       as TensorFlow loads it, by objects or MetaGraph
    lean          only the functions of its signatures, and their variables
    call          the shortest way from numpy arrays through a function and back

Importing this package does not import TensorFlow; `preload` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pool.backends import Array, Model
from pool.backends.pinning import pin
from pool.backends.tensorflow import location
from pool.config import Placement
from pool.errors import ModelLoadError


def preload() -> None:
    """Import TensorFlow and this package's modules; run no operation, list no device, start no thread."""
    # Device discovery and start-up notes are written for somebody at a terminal, once per process.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _hidden("keras"):
        import tensorflow
    from pool.backends.tensorflow import saved_model

    assert saved_model
    # Attributes of `tensorflow` are lazy modules: name those every load needs, so that they are imported
    # once here and not in each fork.
    assert tensorflow.saved_model.load
    assert tensorflow.experimental.dlpack.from_dlpack
    tensorflow.get_logger().setLevel("ERROR")


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Have imports of a module fail inside, as if it were not installed.

    TensorFlow imports Keras where it finds it, for programs that build models. No SavedModel needs it, and it
    is a third of the time that a zygote takes to start, and a sixth of its memory.
    """
    is_imported = name in sys.modules
    if not is_imported:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python's reference says to do
    try:
        yield
    finally:
        if not is_imported:
            del sys.modules[name]


def prepare(placement: Placement) -> None:
    """Pin this process and limit what TensorFlow takes, before it initialises.

    Args:
        placement: Where this process runs.

    Raises:
        ModelLoadError: a core or the GPU asked for is not there.
    """
    pin(placement)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1" if placement.gpu is None else str(placement.gpu)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(placement.threads)
    # One: operations run one after another in the calling thread. With two, every call is handed to a
    # thread of the pool and back: 72 µs against 28 for a small model's batch. A single operation still
    # spreads over all intra-op threads.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if placement.gpu is not None:
        _prepare_gpu(placement)


def _prepare_gpu(placement: Placement) -> None:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        if tf.test.is_built_with_cuda():
            raise ModelLoadError(f"gpu:{placement.gpu} was asked for, and TensorFlow sees no such GPU")
        raise ModelLoadError(
            f"gpu:{placement.gpu} was asked for, and this TensorFlow is built without GPU support; "
            "install poolserve[tensorflow-gpu]"
        )
    if placement.gpu_memory_mb is None:
        tf.config.experimental.set_memory_growth(gpus[0], True)
    else:
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=placement.gpu_memory_mb)
        tf.config.set_logical_device_configuration(gpus[0], [limit])


def resolve(path: str) -> tuple[int, str]:
    """The version and the SavedModel directory that a configured path means.

    Exports a `.keras` file that was not exported before, which runs operations: call it in a loader.

    Raises:
        ModelLoadError: there is no model at `path`; the sentence names what is there instead.
    """
    return location.resolve(path)


def load(path: str, weights: Sequence[Array] | None, is_lean: bool = False) -> Model:
    """Load the SavedModel in directory `path`; see `pool.backends.Backend.load`.

    Raises:
        ModelLoadError: it cannot be loaded; the sentence says why.
    """
    from pool.backends.tensorflow import saved_model

    return saved_model.load(path, weights, is_lean=is_lean)
