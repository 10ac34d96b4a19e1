"""Inputs made up from a signature: for probes, canaries, warm-up and load generation. Pure; any process.

Values are mild, so that most models take them: floats lie in [0, 1), integers are 0 or 1 (any embedding
table has those rows), strings are short. What a signature leaves open (the length of an axis, the rank, what
a string must hold) comes from a `Recipe`; the loader tries several and reports the one the model took.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pool.signature import Signature, TensorSpec, numpy_dtype, row_items

Array = npt.NDArray[Any]

# What frameworks ask of memory they alias (`pool.backends.Model.bind`).
ALIGNMENT_BYTES = 64


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to fill in what a signature leaves open.

    Attributes:
        axis: Length of every unknown axis but the rows', the same for all inputs, because models mostly
            want such axes (sequence lengths) equal.
        rank: Rank, row axis included, of inputs whose rank is unknown.
        text: Every item of string inputs; None for short words that differ from row to row.
    """

    axis: int = 4
    rank: int = 2
    text: bytes | None = None


# Lengths tried for unknown axes: a small one, then what convolutions with pooling need to not run out of
# pixels, then the usual image size, then what a model that squeezes an axis needs.
_AXES = (4, 32, 224, 1)
# Ranks tried when it is unknown: a vector per row, one item per row, images, sequences of vectors; but one
# item per row first where only strings lack a rank, because those are serialized messages.
_RANKS = (2, 1, 4, 3)
_RANKS_OF_STRINGS = (1, 2)

# Several long unknown axes multiply to more memory than a machine has; an RGB image of 1024 pixels a side
# is as much as is tried.
_ROW_ITEMS_MAX = 3 * 1024 * 1024

# A valid image of one grey pixel, for models that decode their input.
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


def recipes(signature: Signature, texts: tuple[bytes, ...] = ()) -> Iterator[Recipe]:
    """Recipes worth trying for this signature, the likeliest first; only those that differ for it.

    Args:
        signature: What to make inputs for.
        texts: Strings the backend found to be what the model parses, tried before the generic ones.
    """
    specs = signature.inputs
    axes = _AXES if any(_has_open_axis(spec) for spec in specs) else _AXES[:1]
    ranks: tuple[int, ...]
    without_rank = {spec.dtype for spec in specs if spec.shape is None}
    ranks = _RANKS if without_rank else _RANKS[:1]
    if without_rank == {"string"}:
        ranks = _RANKS_OF_STRINGS
    strings: tuple[bytes | None, ...] = (None,)
    if any(spec.dtype == "string" for spec in specs):
        strings = (*texts, None, b"", b"0", _PNG)
    for text, rank, axis in itertools.product(strings, ranks, axes):
        recipe = Recipe(axis=axis, rank=rank, text=text)
        items = sum(row_items(_shape(spec, 1, recipe)) for spec in specs)
        if axis == axes[0] or items <= _ROW_ITEMS_MAX:
            yield recipe


def _has_open_axis(spec: TensorSpec) -> bool:
    return spec.shape is None or None in spec.shape[1:]


_DEFAULT = Recipe()

# Of words; their lengths vary, to show models whose answers depend on the longest.
_LETTERS_MAX = 12


def sample_inputs(
    signature: Signature, rows: int, seed: int = 0, recipe: Recipe = _DEFAULT
) -> dict[str, Array]:
    """Arrays that fit the signature, the same for the same arguments.

    Args:
        signature: What to make inputs for.
        rows: Length of axis 0 where the signature leaves it open.
        seed: Different seeds give different values.
        recipe: Fills in what the signature leaves open.

    Returns:
        One C-contiguous, 64-byte aligned array per input, by name, in the signature's order, fit for
        `Model.bind`; string inputs are object arrays of `bytes`.
    """
    generator = np.random.default_rng(seed)
    return {
        spec.name: _values(spec.dtype, _shape(spec, rows, recipe), generator, recipe)
        for spec in signature.inputs
    }


def _shape(spec: TensorSpec, rows: int, recipe: Recipe) -> tuple[int, ...]:
    if spec.shape is None:
        return (rows, *(recipe.axis,) * (recipe.rank - 1))
    if not spec.shape:
        return ()
    first, *rest = spec.shape
    return (
        rows if first is None else first,
        *(recipe.axis if length is None else length for length in rest),
    )


def _values(dtype: str, shape: tuple[int, ...], generator: np.random.Generator, recipe: Recipe) -> Array:
    if dtype == "string":
        strings = np.empty(shape, object)
        for place in np.ndindex(shape):
            letters = generator.integers(ord("a"), ord("z") + 1, generator.integers(1, _LETTERS_MAX + 1))
            strings[place] = bytes(letters.tolist()) if recipe.text is None else recipe.text
        return strings
    array = aligned_empty(shape, numpy_dtype(dtype))
    if array.dtype.kind in "biu":
        array[...] = generator.integers(0, 2, shape)
    else:
        array[...] = generator.random(shape)
    if array.dtype.kind == "c":
        array[...] += 1j * generator.random(shape)
    return array


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised C-contiguous array that starts at a multiple of 64 bytes.

    Args:
        shape: Any, also rank 0 or without items.
        dtype: Not object.
    """
    size = row_items(shape) * dtype.itemsize
    room = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGNMENT_BYTES
    return room[start : start + size].view(dtype).reshape(shape)
