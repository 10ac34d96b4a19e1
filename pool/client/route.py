"""One way of calling a model, checked once: inputs to rows, meta and frames. Client process; pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from pool import wire
from pool.client.conversion import Cast, to_array
from pool.errors import InvalidInput, TooLarge
from pool.signature import Signature, TensorSpec, numpy_dtype
from pool.wire import PredictMeta, TensorMeta

# What a tensor frame may be: anything with a length and the buffer protocol (bytes, memoryview, zmq.Frame).
Frame = Any
Shape = tuple[int, ...]

# Up to here a payload is copied: the copy (0.1-1 µs) costs less than a view that is safe to keep.
COPY_BYTES = 16_384

NO_LIMIT = 0xFFFF_FFFF  # of rows: as many as the wire can count

# Most payload of a bundle: more does not make a request cheaper, and keeps the server waiting for it.
_BUNDLE_BYTES = 262_144

# Of each cache of a client. A caller with more distinct shapes than this has them worked out again.
_CACHE_ENTRIES = 4_096

Key = TypeVar("Key")
Value = TypeVar("Value")


class Pattern:
    """What a route's requests share if their rows have the same shapes; one object for all of them.

    Args:
        meta: The msgpack part of their headers.
        row_bytes: Of one row in all inputs together; None if they cannot travel in bundles.
        max_frame_bytes: As the route's.

    Attributes:
        meta: As given.
        most_rows: Of a request in a bundle; -1 if none can be in one.
        bundle_rows: Most rows of a bundle.
    """

    __slots__ = ("bundle_rows", "meta", "most_rows")

    def __init__(self, meta: bytes, row_bytes: int | None, max_frame_bytes: int) -> None:
        self.meta = meta
        self.most_rows, self.bundle_rows = -1, 0
        if row_bytes is not None:
            row_bytes = max(1, row_bytes)  # rows of nothing are still to be counted
            self.most_rows = COPY_BYTES // row_bytes
            self.bundle_rows = min(_BUNDLE_BYTES, max_frame_bytes) // row_bytes


class Route:
    """A model's signature and the outputs wanted, with the finished patterns of every row shape seen.

    Args:
        model: As the request names it.
        version: As the request names it.
        signature: The one the request means.
        outputs: Names of the outputs wanted; None for all.
        max_rows: Most rows in one request; None for no limit.
        max_frame_bytes: Most bytes of one input tensor; None for no limit.

    Raises:
        InvalidInput: `outputs` names none, an unknown one, or one twice.

    Attributes:
        patterns: By row shapes of all inputs (whole shapes where the signature is not batched). An
            entry means that those shapes were checked. With a sole input that one's row shape alone is
            the key.
        sole_name: Name of the sole input of a batched signature, if its items have a fixed size: the
            case the core has a fast path for.
        sole_dtype: Its dtype, or None.
    """

    __slots__ = (
        "max_frame_bytes",
        "max_rows",
        "model",
        "outputs",
        "patterns",
        "signature",
        "sole_dtype",
        "sole_name",
        "version",
    )

    def __init__(
        self,
        model: str,
        version: int | None,
        signature: Signature,
        outputs: tuple[str, ...] | None,
        max_rows: int | None,
        max_frame_bytes: int | None = None,
    ) -> None:
        _check_output_names(outputs, signature)
        self.model = model
        self.version = version
        self.signature = signature
        self.outputs = outputs
        self.max_rows = NO_LIMIT if max_rows is None else max_rows
        self.max_frame_bytes = sys.maxsize if max_frame_bytes is None else max_frame_bytes
        self.patterns: dict[tuple[Any, ...], Pattern] = {}
        self.sole_name: str | None = None
        self.sole_dtype: np.dtype[Any] | None = None
        if signature.batched and len(signature.inputs) == 1 and signature.inputs[0].dtype != "string":
            self.sole_name = signature.inputs[0].name
            self.sole_dtype = numpy_dtype(signature.inputs[0].dtype)

    def encode(self, inputs: Any, cast: Cast) -> tuple[int, Pattern, list[Frame]]:
        """Rows, pattern and tensor frames of any legal inputs.

        Args:
            inputs: Name -> array of shape [rows, ...], or the bare array of the only input.
            cast: Which casts are allowed; see `conversion.to_array`.

        Returns:
            The header's `rows`; the pattern; one payload per input, those over `COPY_BYTES` aliasing the
            caller's array where it is contiguous.

        Raises:
            InvalidInput: a name, dtype, rank, shape or row count is wrong; TooLarge if there are too many
                rows or bytes.
        """
        specs = self.signature.inputs
        values = self._values_in_order(inputs)
        arrays = [to_array(value, spec, cast) for value, spec in zip(values, specs, strict=True)]
        shapes: tuple[Shape, ...] = tuple([array.shape for array in arrays])
        rows = 1
        if self.signature.batched:
            rows = self._check_rows(shapes)
            shapes = tuple([shape[1:] for shape in shapes])
        key = shapes if self.sole_dtype is None else shapes[0]
        pattern = self.patterns.get(key)
        if pattern is None:
            for array, spec in zip(arrays, specs, strict=True):
                if not spec.accepts_shape(array.shape):
                    raise self._wrong_shape(array.shape, spec)
            pattern = Pattern(self._encode_meta(shapes), self._row_bytes(shapes), self.max_frame_bytes)
            remember(self.patterns, key, pattern)
        frames: list[Frame] = []
        for array, spec in zip(arrays, specs, strict=True):
            if array.nbytes <= COPY_BYTES and spec.dtype != "string":
                frames.append(array.tobytes())
            else:
                frames.append(wire.encode_tensor(array, spec.dtype))
            if len(frames[-1]) > self.max_frame_bytes:
                raise TooLarge(
                    f"input {spec.name!r} has {len(frames[-1])} bytes; "
                    f"the server takes at most {self.max_frame_bytes} in one message"
                )
        return rows, pattern, frames

    def _values_in_order(self, inputs: Any) -> list[Any]:
        names = [spec.name for spec in self.signature.inputs]
        wanted = ", ".join(map(repr, names)) or "none"
        if not isinstance(inputs, Mapping):
            if len(names) != 1:
                raise InvalidInput(
                    f"inputs is one {type(inputs).__name__}, but signature {self.signature.name!r} has "
                    f"{len(names)} inputs; wanted a dict with {wanted}"
                )
            return [inputs]
        missing = [name for name in names if name not in inputs]
        unknown = [name for name in inputs if name not in names]
        if missing or unknown:
            got = "; ".join(
                f"{word} {', '.join(map(repr, which))}"
                for word, which in (("missing", missing), ("unknown", unknown))
                if which
            )
            raise InvalidInput(f"inputs of signature {self.signature.name!r}: {got}; wanted {wanted}")
        return [inputs[name] for name in names]

    def _check_rows(self, shapes: tuple[Shape, ...]) -> int:
        """The row count that all the whole shapes share."""
        specs = self.signature.inputs
        for shape, spec in zip(shapes, specs, strict=True):
            if not shape:
                raise self._wrong_shape(shape, spec)
        rows = shapes[0][0]
        if any(shape[0] != rows for shape in shapes):
            # A forgotten row axis shows up here as unequal rows: say what is really wrong.
            for shape, spec in zip(shapes, specs, strict=True):
                if not spec.accepts_shape(shape):
                    raise self._wrong_shape(shape, spec)
            got = ", ".join(
                f"{spec.name!r} has {shape[0]}" for shape, spec in zip(shapes, specs, strict=True)
            )
            raise InvalidInput(f"inputs differ in rows: {got}; wanted the same number in all")
        if rows > self.max_rows:
            raise TooLarge(f"{rows} rows; model {self.model!r} takes at most {self.max_rows} in one request")
        return rows

    def _wrong_shape(self, shape: Shape, spec: TensorSpec) -> InvalidInput:
        message = f"input {spec.name!r} has shape {list(shape)}; wanted {spec.describe()}"
        needs_row_axis = not shape if spec.shape is None else spec.accepts_shape((1, *shape))
        if self.signature.batched and needs_row_axis:
            message += f"; a single example needs a row axis: {spec.name}[None]"
        return InvalidInput(message)

    def _row_bytes(self, shapes: tuple[Shape, ...]) -> int | None:
        """Bytes of one row, of these shapes; None where rows have no fixed size or cannot be counted."""
        specs = self.signature.inputs
        if not self.signature.batched or any(spec.dtype == "string" for spec in specs):
            return None
        return sum(wire.tensor_bytes(spec.dtype, shape) for spec, shape in zip(specs, shapes, strict=True))

    def _encode_meta(self, shapes: tuple[Shape, ...]) -> bytes:
        inputs = zip(self.signature.inputs, shapes, strict=True)
        tensors = tuple(TensorMeta(spec.name, spec.dtype, shape) for spec, shape in inputs)
        meta = wire.encode_meta(
            PredictMeta(self.model, self.version, self.signature.name, tensors, self.outputs)
        )
        size = wire.FIXED_BYTES + len(meta)
        if size > wire.MAX_HEADER_BYTES:
            raise InvalidInput(f"names and shapes take {size} bytes; wanted at most {wire.MAX_HEADER_BYTES}")
        return meta


def _check_output_names(outputs: tuple[str, ...] | None, signature: Signature) -> None:
    if outputs is None:
        return
    names = [spec.name for spec in signature.outputs]
    wanted = f"wanted some of {', '.join(map(repr, names))}"
    if not outputs:
        raise InvalidInput(f"outputs is empty; {wanted}, or None for all")
    for name in outputs:
        if name not in names:
            raise InvalidInput(f"signature {signature.name!r} has no output {name!r}; {wanted}")
    if len(set(outputs)) != len(outputs):
        raise InvalidInput(f"outputs {list(outputs)} names one twice; {wanted}")


def remember(cache: dict[Key, Value], key: Key, value: Value) -> None:
    """Put a value into a cache, which is emptied when it is full."""
    if len(cache) >= _CACHE_ENTRIES:
        cache.clear()
    cache[key] = value
