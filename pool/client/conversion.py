"""Turns what a caller passes as an input into an array of the dtype wanted, without loss or not at all.

Client process; pure. An array is only cast where no value of its dtype can be lost, because its
owner chose that dtype. Python numbers have no dtype to choose, so a list of them is taken by value:
integers must be exactly representable, floats are rounded to the float dtype wanted.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pool.errors import InvalidInput
from pool.signature import TensorSpec, dtype_name, numpy_dtype

Array = npt.NDArray[Any]
Cast = Literal["safe", "same_kind"]
CASTS: tuple[Cast, ...] = ("safe", "same_kind")

# Integers up to 2**bits in magnitude are exact in these dtypes (significand bits, the hidden one included).
_EXACT_INTEGER_BITS = {
    "float16": 11,
    "bfloat16": 8,
    "float32": 24,
    "float64": 53,
    "complex64": 24,
    "complex128": 53,
}

# What can hold what: a bool may become an integer, an integer a float; never the other way round.
_KIND_ORDER = {"b": 0, "i": 1, "u": 1, "f": 2, "V": 2, "c": 3}  # V: bfloat16 is a void to numpy


def check_cast(cast: str) -> Cast:
    """`cast`, if it is one that is known.

    Raises:
        InvalidInput: it is not.
    """
    for known in CASTS:
        if cast == known:
            return known
    raise InvalidInput(f"cast is {cast!r}; wanted one of {', '.join(map(repr, CASTS))}")


def to_array(value: object, spec: TensorSpec, cast: Cast) -> Array:
    """The value as an array of the spec's dtype; the shape is whatever it has.

    Args:
        value: An array, anything numpy makes an array of, or Python numbers, `bytes` or `str`, nested
            in lists for rank 1 upward.
        spec: Of the input; only its name and dtype matter here.
        cast: `"safe"`, or `"same_kind"` to allow float64 -> float32, int64 -> int32 and the like.

    Returns:
        Array in native byte order, not necessarily contiguous; the value itself where that already
        fits. For `string`: a new object array of `bytes`.

    Raises:
        InvalidInput: another dtype, or a value that would be lost.
    """
    wanted = numpy_dtype(spec.dtype)
    if type(value) is np.ndarray and value.dtype == wanted and wanted.kind != "O":
        return value
    is_bare = isinstance(value, (list, tuple, int, float, complex, str, bytes)) and not isinstance(
        value, np.generic
    )
    is_string = spec.dtype == "string"
    try:
        # As objects, because numpy's own S dtype drops the zero bytes a string ends with.
        array = np.array(value, object) if is_bare and is_string else np.asarray(value)
    except (ValueError, TypeError, OverflowError) as e:
        raise InvalidInput(f"input {spec.name!r} is not an array: {e}; wanted {spec.describe()}") from None
    if is_string:
        return _strings(array, spec)
    got = dtype_name(array.dtype)
    if got is None or got == "string":
        raise _wrong_dtype(array, spec, "")
    if array.dtype == wanted:
        return array
    if is_bare:
        return _from_python_numbers(array, wanted, spec)
    if np.can_cast(array.dtype, wanted, "safe") and _is_exact(array, spec.dtype):
        return array.astype(wanted)
    if cast == "safe":
        allowed = np.can_cast(array.dtype, wanted, "same_kind")
        raise _wrong_dtype(array, spec, '; cast="same_kind" allows the loss' if allowed else "")
    if not np.can_cast(array.dtype, wanted, cast):
        raise _wrong_dtype(array, spec, "")
    with np.errstate(over="ignore", invalid="ignore"):  # the caller asked for it
        return array.astype(wanted)


def _wrong_dtype(array: Array, spec: TensorSpec, advice: str) -> InvalidInput:
    return InvalidInput(f"input {spec.name!r} has dtype {array.dtype}; wanted {spec.describe()}{advice}")


def _is_exact(array: Array, dtype: str) -> bool:
    """Whether integers keep their value as `dtype`; numpy calls int64 -> float64 safe, which it is not."""
    bits = _EXACT_INTEGER_BITS.get(dtype)
    if bits is None or array.dtype.kind not in "iu" or array.size == 0:
        return True
    return int(array.min()) >= -(1 << bits) and int(array.max()) <= 1 << bits


def _from_python_numbers(array: Array, wanted: np.dtype[Any], spec: TensorSpec) -> Array:
    """Cast by value what numpy made of Python numbers (bool, int64, uint64, float64 or complex128)."""
    if array.size and _KIND_ORDER[array.dtype.kind] > _KIND_ORDER[wanted.kind]:
        raise _wrong_dtype(array, spec, "")
    if array.size and array.dtype.kind in "iu":
        if wanted.kind in "iu":
            limits = np.iinfo(wanted)
            fits = int(array.min()) >= limits.min and int(array.max()) <= limits.max
        else:
            fits = _is_exact(array, spec.dtype)
        if not fits:
            raise InvalidInput(
                f"input {spec.name!r} has integers from {array.min()} to {array.max()}, "
                f"not all of which fit; wanted {spec.describe()}"
            )
    with np.errstate(over="ignore"):  # looked for below, by name
        converted = array.astype(wanted)
    if wanted.kind in "fVc" and array.dtype.kind in "fc":
        lost = np.isinf(converted) & ~np.isinf(array)
        if lost.any():
            raise InvalidInput(
                f"input {spec.name!r} has {array[lost].flat[0]}, which is too large; wanted {spec.describe()}"
            )
    return converted


def _strings(array: Array, spec: TensorSpec) -> Array:
    """A new object array of `bytes`; `str` items become UTF-8."""
    if array.dtype.kind not in "OSUT":  # T: numpy's variable-length StringDType
        raise _wrong_dtype(array, spec, "")
    items: list[bytes] = []
    for item in array.reshape(-1).tolist():
        if isinstance(item, bytes):
            items.append(item)
        elif isinstance(item, str):
            try:
                items.append(item.encode())
            except UnicodeEncodeError as e:
                raise InvalidInput(f"input {spec.name!r} has a str that is not Unicode: {e}") from None
        else:
            raise InvalidInput(
                f"input {spec.name!r} has an item of type {type(item).__name__}; wanted bytes or str"
            )
    strings = np.empty(len(items), object)
    strings[:] = items
    return strings.reshape(array.shape)
