"""What a load of a SavedModel gives, whichever way it is loaded. Used in loaders and workers.

There are two ways: `revived`, as TensorFlow loads, which takes every model; and `lean`, which takes most,
makes no objects and is for workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import tensorflow as tf

from pool.backends import BoundCall
from pool.signature import DTYPES, Shape, Signature, TensorSpec

Tensor = Any  # tf.Tensor; TensorFlow has no types to check against
Node = Any  # tensorflow.core.framework.node_def_pb2.NodeDef


class Variable(msgspec.Struct):
    """A variable some signature reads: a resource handle and what it holds."""

    name: str
    dtype: Any  # tf.DType
    shape: Any  # tf.TensorShape, possibly not fully known
    handle: Tensor

    def read(self) -> Tensor:
        """Its value."""
        return tf.raw_ops.ReadVariableOp(resource=self.handle, dtype=self.dtype)

    def assign(self, tensor: Tensor) -> None:
        """Have it hold a tensor's memory."""
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=tensor, validate_shape=False)


class Function(Protocol):
    """What a signature runs."""

    @property
    def name(self) -> str:
        """Of nothing else in this load."""

    def bind(self, signature: Signature, tensors: Mapping[str, Tensor], owner: object) -> BoundCall:
        """A call on exactly these tensors, by input; `owner` lives as long as it."""

    def bodies(self) -> Iterable[Sequence[Node]]:
        """The nodes of all functions that it reaches."""


class Loaded(NamedTuple):
    """A SavedModel, loaded.

    Attributes:
        signatures: Those that can be served, by name; the first is what a request without a name means.
        functions: Theirs.
        skipped: Signatures that cannot be served, with the reason.
        variables: Those that a signature reads, once each; the same order for every load, either way. What no
            signature reads (an optimizer's slots) is left out: a worker never needs it.
        unshareable: Why these are not all the state there is; '' if they are.
        owner: What else must live as long as the model.
        release: Called when it is gone.
    """

    signatures: dict[str, Signature]
    functions: Mapping[str, Function]
    skipped: dict[str, str]
    variables: list[Variable]
    unshareable: str
    owner: object
    release: Callable[[], None]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of signatures as they are told: "serving_default" first."""
    return sorted(names, key=lambda name: (name != "serving_default", name))


def signature_of(name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Signature | str:
    """What is known of a signature from what its function declares; or why it cannot be served.

    Args:
        name: Of the signature.
        inputs: Tensors or tf.TensorSpecs, by name.
        outputs: The same; of another type if they are not tensors.
    """
    specs: dict[str, list[TensorSpec]] = {"input": [], "output": []}
    for role, named in (("input", inputs), ("output", outputs)):
        for key in sorted(named):
            tensor = named[key]
            if not isinstance(tensor, (tf.Tensor, tf.TensorSpec)):
                return f"has an {role} {key!r} that is a {type(tensor).__name__}, not a tensor"
            dtype = tensor.dtype.base_dtype.name
            if dtype not in DTYPES:
                return f"has an {role} {key!r} of dtype {dtype}, which is not supported"
            specs[role].append(TensorSpec(key, dtype, _shape(tensor.shape)))
    reason = _unbatched_reason(specs)
    return Signature(
        name, tuple(specs["input"]), tuple(specs["output"]), batched=not reason, unbatched_reason=reason
    )


def _shape(shape: Any) -> Shape | None:
    return None if shape.rank is None else tuple(shape.as_list())


def _unbatched_reason(specs: dict[str, list[TensorSpec]]) -> str:
    for role, named in specs.items():
        for spec in named:
            if spec.shape is not None and (not spec.shape or spec.shape[0] is not None):
                return f"the first dimension of {role} {spec.name!r} ({spec.describe()}) is not a row axis"
    return ""
