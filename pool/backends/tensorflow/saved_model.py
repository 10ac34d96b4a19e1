"""A loaded SavedModel: its signatures, its variables, its calls. Runs in loader and worker processes.

Sharing weights rests on two things TensorFlow does: `from_dlpack` makes a tensor over foreign memory, and
assigning a tensor to a resource variable makes the variable hold that tensor's buffer, without a copy.
So a SavedModel is loaded without its checkpoint, and each variable is assigned a view of the weights memfd.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress

from pool.backends import Array, BoundCall
from pool.backends.tensorflow import call, examples, lean, metagraph, revived
from pool.backends.tensorflow.loaded import Loaded
from pool.errors import ModelLoadError, SignatureNotFound
from pool.signature import DTYPES, Signature, numpy_dtype


def load(path: str, weights: Sequence[Array] | None, *, is_lean: bool) -> SavedModel:
    """Load a SavedModel directory; see `pool.backends.Backend.load`.

    Raises:
        ModelLoadError: it cannot be loaded, has no servable signature, or does not fit `weights`.
    """
    try:
        proto = metagraph.parse(path)
    except Exception as error:
        raise ModelLoadError(f"{path}: {call.describe(error)}") from None
    graphs = proto.meta_graphs
    state = next((found for graph in graphs if (found := metagraph.stateful_operation(graph))), "")
    has_objects = len(graphs) == 1 and graphs[0].HasField("object_graph_def")
    loaded: Loaded | None = None
    if weights is not None and is_lean and has_objects and not state:
        with suppress(
            Exception
        ):  # there is no closed list; and the other way tells what is wrong, if anything
            loaded = lean.load(graphs[0])
    del proto, graphs
    if loaded is None:
        loaded = revived.load(path, state, has_objects=has_objects, skip_checkpoint=weights is not None)
    model = SavedModel(path, loaded)
    if weights is not None:
        model.adopt(weights)
    return model


class SavedModel:
    """A `pool.backends.Model` over a loaded SavedModel.

    Args:
        path: Its directory, for messages.
        loaded: What it consists of.

    Raises:
        ModelLoadError: no signature is servable.
    """

    def __init__(self, path: str, loaded: Loaded) -> None:
        self._path = path
        self._loaded = loaded
        self.skipped = loaded.skipped
        weakref.finalize(self, loaded.release).atexit = False
        if not loaded.signatures:
            reasons = "; ".join(f"{name!r} {reason}" for name, reason in sorted(self.skipped.items()))
            raise ModelLoadError(f"{path} has no servable signature: {reasons or 'it was saved without any'}")

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """All servable signatures, "serving_default" first; `batched` as far as static shapes tell."""
        return tuple(self._loaded.signatures.values())

    def bind(self, signature: str, inputs: Sequence[Array]) -> BoundCall:
        """Prepare a call; see `pool.backends.Model.bind`.

        Raises:
            SignatureNotFound: there is no servable signature of that name.
        """
        found = self._loaded.signatures.get(signature)
        if found is None:
            raise SignatureNotFound(
                f"no signature {signature!r}; wanted one of {sorted(self._loaded.signatures)}"
            )
        named = zip(found.inputs, inputs, strict=True)
        tensors = {spec.name: call.as_tensor(array, spec.dtype) for spec, array in named}
        return self._loaded.functions[signature].bind(found, tensors, owner=self)

    def texts(self, signature: str) -> tuple[bytes, ...]:
        """Serialized `tf.train.Example`s the signature's parsing operations would take."""
        if not any(spec.dtype == "string" for spec in self._loaded.signatures[signature].inputs):
            return ()
        return examples.texts(self._loaded.functions[signature].bodies())

    def runs(self, signature: str) -> str:
        """The function behind a signature; see `pool.backends.Model.runs`."""
        return self._loaded.functions[signature].name

    def weights(self) -> list[tuple[str, Array]]:
        """Name and value of each variable that a signature reads, aliasing TensorFlow's memory.

        Raises:
            ModelLoadError: the model holds state that these do not carry.
        """
        self._check_shareable()
        named = []
        for variable in self._loaded.variables:
            dtype = variable.dtype.base_dtype.name
            if dtype not in DTYPES or dtype == "string":
                raise ModelLoadError(f"variable {variable.name!r} holds {dtype}, which cannot be shared")
            try:
                named.append((variable.name, call.as_array(variable.read(), dtype)))
            except Exception as error:
                raise ModelLoadError(f"variable {variable.name!r}: {call.describe(error)}") from None
        return named

    def adopt(self, weights: Sequence[Array]) -> None:
        """Make the variables hold these arrays' memory instead of memory of their own.

        Args:
            weights: One per variable, in the order of `weights()`; 64-byte aligned and writable.

        Raises:
            ModelLoadError: they are not this model's weights.
        """
        self._check_shareable()
        variables = self._loaded.variables
        if len(variables) != len(weights):
            raise ModelLoadError(f"{self._path} has {len(variables)} variables; got {len(weights)} weights")
        for variable, array in zip(variables, weights, strict=True):
            dtype = variable.dtype.base_dtype.name
            if array.dtype != numpy_dtype(dtype) or not variable.shape.is_compatible_with(array.shape):
                raise ModelLoadError(
                    f"variable {variable.name!r} is {dtype} {variable.shape}; "
                    f"got a weight of {array.dtype} {list(array.shape)}"
                )
            variable.assign(call.as_tensor(array, dtype))

    def _check_shareable(self) -> None:
        if self._loaded.unshareable:
            raise ModelLoadError(self._loaded.unshareable)
