"""What a model takes and gives: dtypes, tensor specs and signatures. Pure; used by all processes.

A *signature* is a named set of input and output tensor specs. Axis 0 of every tensor of a batched
signature is the row axis; `TensorSpec.shape` always includes it. A signature that cannot be batched
(its first dimension is fixed, or an output does not follow it) has `batched = False` and a reason;
each request to it runs alone, and its whole tensors are treated as the one row of a batch of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from pool.errors import InvalidInput, SignatureNotFound

# The dtypes of the wire and of slots. Items are little-endian. `string` has no fixed item size: its
# items are byte strings (`docs/wire.md` 4.2). bfloat16 is not numpy's own: ml_dtypes provides it, and
# is imported only when such a tensor is met.
_NUMPY_NAMES: tuple[str, ...] = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)
DTYPES: tuple[str, ...] = (*_NUMPY_NAMES, "bfloat16", "string")

ITEM_BYTES: dict[str, int] = {name: np.dtype(name).itemsize for name in _NUMPY_NAMES}
ITEM_BYTES["bfloat16"] = 2

_numpy_dtypes: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in _NUMPY_NAMES}
_numpy_dtypes["string"] = np.dtype(object)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype that holds items of a pool dtype; object (of `bytes`) for `string`.

    Raises:
        InvalidInput: the name is not in `DTYPES`.
    """
    found = _numpy_dtypes.get(name)
    if found is None:
        if name != "bfloat16":
            raise InvalidInput(f"dtype {name!r} is not supported; wanted one of {', '.join(DTYPES)}")
        import ml_dtypes  # deferred: a client that never meets bfloat16 does not pay for it

        found = _numpy_dtypes[name] = np.dtype(ml_dtypes.bfloat16)
    return found


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The pool dtype of a numpy dtype, or None if pool has none for it (datetime64, structs ...)."""
    if dtype.kind in "OSU":
        return "string"
    return dtype.name if dtype.name in DTYPES else None


Shape = tuple[int | None, ...]


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One named tensor of a signature.

    Attributes:
        name: The key in the `inputs` or `outputs` dict.
        dtype: One of `DTYPES`.
        shape: All axes, the row axis first; None for an axis of any length. `shape` itself is None
            when the model does not even fix the rank.
    """

    name: str
    dtype: str
    shape: Shape | None

    def describe(self) -> str:
        """`float32 [any, 784]`, for messages and tables."""
        if self.shape is None:
            return f"{self.dtype} of any rank"
        axes = ", ".join("any" if n is None else str(n) for n in self.shape)
        return f"{self.dtype} [{axes}]"

    def accepts_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a whole tensor of this shape (row axis included) fits the spec."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            want is None or want == got for want, got in zip(self.shape, shape, strict=True)
        )


class Signature(msgspec.Struct, frozen=True, omit_defaults=True):
    """The inputs and outputs of one named entry point of a model.

    Attributes:
        name: As in the SavedModel (`serving_default`, ...).
        inputs: Ordered as requests must send their tensor frames.
        outputs: Ordered as replies carry theirs.
        batched: Whether axis 0 is a row axis over which requests may be joined.
        unbatched_reason: Why not, when `batched` is False.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool = True
    unbatched_reason: str = ""

    def input(self, name: str) -> TensorSpec:
        """The input spec of that name.

        Raises:
            InvalidInput: there is none; the message lists those there are.
        """
        for spec in self.inputs:
            if spec.name == name:
                return spec
        names = ", ".join(repr(spec.name) for spec in self.inputs)
        raise InvalidInput(f"signature {self.name!r} has no input {name!r}; wanted {names}")


DEFAULT_SIGNATURE = "serving_default"  # TensorFlow's DEFAULT_SERVING_SIGNATURE_DEF_KEY


def choose_signature(signatures: Iterable[Signature], name: str | None) -> Signature:
    """The signature a request means; client and front both ask here (`docs/wire.md` 3.1).

    Args:
        signatures: Those the model has.
        name: The one asked for; None for `serving_default`, or the only one there is.

    Raises:
        SignatureNotFound: there is none of that name, or None leaves a choice; lists the names.
    """
    by_name = {signature.name: signature for signature in signatures}
    if name is None:
        if DEFAULT_SIGNATURE in by_name:
            return by_name[DEFAULT_SIGNATURE]
        if len(by_name) == 1:
            return next(iter(by_name.values()))
    elif name in by_name:
        return by_name[name]
    got = "no signature named, and none is the default" if name is None else f"no signature {name!r}"
    raise SignatureNotFound(f"{got}; wanted one of {', '.join(map(repr, by_name)) or '(none)'}")


def row_items(shape: tuple[int, ...]) -> int:
    """Number of items in one row of this shape; 1 for rank 0."""
    items = 1
    for axis in shape:
        items *= axis
    return items
