"""The weights memfd: one copy of a model's variables for all its workers. Used by front, loader, workers.

    offset 0                                                                     size of the memfd
    +------------------+-----+--------------+-----+----------------------+-----+
    | weight 0's items | pad | weight 1 ... | pad | last weight's items  | pad |
    +------------------+-----+--------------+-----+----------------------+-----+
    ^ 64-byte aligned        ^ 64-byte aligned    (items C-contiguous, little-endian)

The front creates the memfd (`create`) and owns it. The loader fills it (`write`) and seals it (`seal`):
from then on no process can change what it holds. A worker maps it privately (`map_private`): pages are
shared until a model writes one of its variables, and the pages it writes become its own, as they would
have been without sharing. No framework is imported here.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pool.errors import ModelLoadError
from pool.shm.memory import reserve
from pool.signature import dtype_name, numpy_dtype, row_items

Array = npt.NDArray[Any]

# Frameworks alias foreign memory only when it is aligned for their widest vector instructions: TensorFlow
# and XLA ask for 64 bytes, which is also a cache line.
ALIGNMENT_BYTES = 64

# pwrite moves at most 2 GiB - 4 KiB at a time; a round GiB keeps the pieces page-aligned.
_PIECE_BYTES = 1 << 30


class Weight(msgspec.Struct, frozen=True):
    """One tensor of the weights memfd: its place there and how to read it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


def create() -> int:
    """An empty, sealable memfd, closed on exec; the caller owns the descriptor."""
    return os.memfd_create("pool-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def layout(named: Sequence[tuple[str, Array]]) -> tuple[tuple[Weight, ...], int]:
    """Where each array goes, and the size of the whole in bytes.

    Args:
        named: Name and value of each weight, in the backend's order; dtypes of `DTYPES` but `string`.

    Raises:
        ModelLoadError: an array's dtype cannot be laid out in shared memory.
    """
    weights = []
    end = 0
    for name, array in named:
        dtype = dtype_name(array.dtype)
        if dtype is None or dtype == "string":
            raise ModelLoadError(f"weight {name!r} has dtype {array.dtype}, which cannot be shared")
        weights.append(Weight(name=name, dtype=dtype, shape=array.shape, offset_bytes=end))
        end += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(weights), end


def write(fd: int, named: Sequence[tuple[str, Array]]) -> tuple[Weight, ...]:
    """Size the memfd and fill it with these arrays.

    Args:
        fd: From `create`, still empty.
        named: As in `layout`.

    Returns:
        The place of each weight, in the order given.

    Raises:
        ModelLoadError: an array cannot be laid out, or the memory is not there.
    """
    weights, size = layout(named)
    try:
        reserve(fd, size)
    except MemoryError as e:
        raise ModelLoadError(f"the weights cannot be shared: {e}") from None
    for weight, (_, array) in zip(weights, named, strict=True):
        _write_at(fd, weight.offset_bytes, array)
    return weights


def _write_at(fd: int, offset: int, array: Array) -> None:
    if not array.nbytes:
        return
    # Through uint8, because the buffer protocol has no code for bfloat16.
    items = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while items:
        written = os.pwrite(fd, items[:_PIECE_BYTES], offset)
        items = items[written:]
        offset += written


def seal(fd: int) -> None:
    """Make the memfd immutable for every process, for good. Private mappings stay possible."""
    # `write` uses pwrite, so that no writable shared mapping stands in the way of F_SEAL_WRITE.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def clear(fd: int) -> None:
    """Give the memory of an unsealed memfd back."""
    os.ftruncate(fd, 0)


def map_private(fd: int, weights: Sequence[Weight]) -> list[Array]:
    """Map the memfd copy-on-write and give one array per weight, in order.

    The arrays are 64-byte aligned, C-contiguous, writable, and keep the mapping alive; a write to them
    is seen by this process alone.

    Args:
        fd: A memfd that `write` filled; it may be closed afterwards.
        weights: What `write` returned.

    Raises:
        ModelLoadError: the memfd is too small to hold these weights, or cannot be mapped.
    """
    size = os.fstat(fd).st_size
    end = max((_end(weight) for weight in weights), default=0)
    if end > size:
        raise ModelLoadError(f"the weights end at byte {end:,} of a memfd of {size:,} bytes")
    if not size:
        return [np.zeros(weight.shape, numpy_dtype(weight.dtype)) for weight in weights]
    try:
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"the weights memfd of {size:,} bytes cannot be mapped: {error}") from None
    whole = np.frombuffer(mapping, np.uint8)
    return [
        whole[weight.offset_bytes : _end(weight)].view(numpy_dtype(weight.dtype)).reshape(weight.shape)
        for weight in weights
    ]


def _end(weight: Weight) -> int:
    return weight.offset_bytes + numpy_dtype(weight.dtype).itemsize * row_items(weight.shape)
