"""The arena: one memfd of equal slots that the front fills and the workers run in place.

Runs in the front (which creates it) and in every worker (which maps it). Little-endian throughout.

    arena   +--------+--------+--------+ … +----------+      slot_bytes is a multiple of 4096
            | slot 0 | slot 1 | slot 2 |   | slot n-1 |
            +--------+--------+--------+ … +----------+

    slot    0            descriptor: u32 length, then msgpack `BatchDescriptor`      written by the front
            4096         run record: u64 started_ns, u64 ended_ns,                   written by the worker
                         u32 piece_rows, u32 length, then msgpack list of `OutputPlace`
            8192         input regions, each 64-byte aligned                         written by the front
            …            outputs, each 64-byte aligned                               written by the worker

A numeric input region holds `capacity` rows one after the other. A string input region holds
`capacity * items + 1` uint64 offsets (the first is 0), then a heap. Outputs are laid out as wire
payloads (`docs/wire.md` 4) of the whole batch, where the worker finds room.

Who may touch a slot is the batcher's to say (`pool.front.states`); nothing here locks.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pool.errors import ConfigError, InternalError, TooLarge
from pool.shm.memory import reserve
from pool.signature import ITEM_BYTES, Signature, row_items
from pool.wire import TensorMeta

ALIGN_BYTES = 64  # a cache line, and what TensorFlow wants of memory it aliases
PAGE_BYTES = 4096
RUN_RECORD_OFFSET = PAGE_BYTES
TENSORS_OFFSET = 2 * PAGE_BYTES

_LENGTH = struct.Struct("<I")
_RUN_RECORD = struct.Struct("<QQII")
_BEGAN = struct.Struct("<Q")
_DESCRIPTOR_MAX_BYTES = PAGE_BYTES - _LENGTH.size
_OUTPUTS_MAX_BYTES = PAGE_BYTES - _RUN_RECORD.size

# What an unknown dimension may cost per slot unless the model's `max_rows_bytes` says otherwise:
# 64 rows of a 224x224x3 uint8 picture and some outputs.
UNKNOWN_ROWS_BYTES = 16 << 20


def align(offset: int) -> int:
    """The next multiple of 64."""
    return (offset + ALIGN_BYTES - 1) & -ALIGN_BYTES


def alignment_bytes(inputs: int, outputs: int) -> int:
    """The most that aligning this many tensors can cost (a string input has two parts and one offset)."""
    return (2 * inputs + outputs + 2) * ALIGN_BYTES


class InputRegion(msgspec.Struct, frozen=True, array_like=True):
    """Where one input tensor lies in a slot.

    Attributes:
        dtype: One of `pool.signature.DTYPES`.
        shape: Of one row; of the whole tensor if the batch is unbatched.
        offset: From the slot's start, in bytes.
        row_bytes: Bytes of one row; of one row's offsets for `string`.
        heap_offset: `string` only: where the heap starts, from the slot's start.
        heap_bytes: `string` only: its size.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    heap_offset: int = 0
    heap_bytes: int = 0


class BatchDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """What a worker must know to run a slot; the same for every batch of a layout.

    Attributes:
        layout: Number of the layout, unique within the arena; the key of the worker's cache.
        signature: Name of the signature to run.
        batched: Whether axis 0 is the row axis.
        inputs: In the signature's order.
        outputs_offset: Where output bytes may start.
    """

    layout: int
    signature: str
    batched: bool
    inputs: tuple[InputRegion, ...]
    outputs_offset: int


class OutputPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where the worker put one output: whole shape, offset from the slot's start, payload bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


_encode = msgspec.msgpack.Encoder().encode
_decode_descriptor = msgspec.msgpack.Decoder(BatchDescriptor).decode
decode_outputs = msgspec.msgpack.Decoder(list[OutputPlace]).decode


class Layout(msgspec.Struct, frozen=True):
    """How a slot is cut up for one signature and one set of row shapes.

    Attributes:
        descriptor: What the worker is told.
        descriptor_bytes: The same, encoded.
        capacity: Rows that fit.
    """

    descriptor: BatchDescriptor
    descriptor_bytes: bytes
    capacity: int

    @property
    def number(self) -> int:
        """Unique within the arena: what batches share (the batcher's key)."""
        return self.descriptor.layout


def plan_layout(
    number: int,
    signature: Signature,
    inputs: Sequence[TensorMeta],
    output_row_bytes: int | None,
    slot_bytes: int,
    max_batch_size: int,
    allowed_batch_sizes: Sequence[int] = (),
    seen_row_bytes: int = 0,
) -> Layout:
    """Cut a slot up for requests of these row shapes.

    Args:
        number: Of the layout, unique within the arena.
        signature: What will run.
        inputs: Dtype and row shape of each input, in the signature's order.
        output_row_bytes: Bytes of one row of all outputs; None when only a run can tell, and then
            as much room is kept for outputs as the inputs take, or as was seen.
        slot_bytes: Size of a slot, header pages included.
        max_batch_size: Most rows in a batch.
        allowed_batch_sizes: If any, the sizes that batches are padded up to, rising.
        seen_row_bytes: Bytes of one row of all outputs in runs so far; other shapes may give more.

    Raises:
        TooLarge: not even one row fits.
    """
    area = slot_bytes - TENSORS_OFFSET
    numeric = [t for t in inputs if t.dtype != "string"]
    strings = [t for t in inputs if t.dtype == "string"]
    # String bytes are unknown until they arrive. Their heaps share half the area, in equal parts.
    heaps = (area // 2) if strings else 0
    fixed = heaps + alignment_bytes(len(inputs), len(signature.outputs))
    row = sum(ITEM_BYTES[t.dtype] * row_items(t.shape) for t in numeric)
    row += sum(8 * row_items(t.shape) for t in strings)
    out = output_row_bytes if output_row_bytes is not None else max(row, seen_row_bytes, 8)
    most = max_batch_size if signature.batched else 1
    capacity = min(most, (area - fixed) // max(row + out, 1))
    if signature.batched and allowed_batch_sizes:  # a batch must still fit when padded
        capacity = max((size for size in allowed_batch_sizes if size <= capacity), default=0)
    if capacity < 1:
        raise TooLarge(
            f"one row needs {row + out} bytes of inputs and outputs; a slot has {max(area - fixed, 0)}: "
            f"raise max_rows_bytes"
        )
    regions = []
    at = TENSORS_OFFSET
    for t in inputs:
        at = align(at)
        if t.dtype == "string":
            row_bytes = 8 * row_items(t.shape)
            heap_offset = align(at + row_bytes * capacity + 8)
            heap_bytes = heaps // len(strings)
            regions.append(InputRegion(t.dtype, t.shape, at, row_bytes, heap_offset, heap_bytes))
            at = heap_offset + heap_bytes
        else:
            row_bytes = ITEM_BYTES[t.dtype] * row_items(t.shape)
            regions.append(InputRegion(t.dtype, t.shape, at, row_bytes))
            at += row_bytes * capacity
    descriptor = BatchDescriptor(number, signature.name, signature.batched, tuple(regions), align(at))
    encoded = _encode(descriptor)
    if len(encoded) > _DESCRIPTOR_MAX_BYTES:
        raise TooLarge(
            f"the shapes of the inputs take {len(encoded)} bytes to write down; "
            f"wanted at most {_DESCRIPTOR_MAX_BYTES}"
        )
    return Layout(descriptor, encoded, capacity)


def slot_bytes_for(rows_bytes: int) -> int:
    """Size of a slot whose rows, inputs and outputs together, take `rows_bytes`: whole pages."""
    return -(-(TENSORS_OFFSET + rows_bytes) // PAGE_BYTES) * PAGE_BYTES


class Arena:
    """A mapped arena. The front makes one with `create`, a worker opens it with `attach`.

    Attributes:
        fd: The memfd; owned (closed by `close`).
        slot_bytes: Size of one slot.
        slots: One writable view for each slot: uint8 [slot_bytes].
    """

    def __init__(self, fd: int, slots: int, slot_bytes: int) -> None:
        self.fd = fd
        self.slot_bytes = slot_bytes
        # One exporter, many views: the map is unmapped when the last of them is gone.
        whole = np.frombuffer(mmap.mmap(fd, slots * slot_bytes), np.uint8)
        self.slots: list[npt.NDArray[np.uint8]] = [
            whole[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)
        ]
        self._described: list[bytes] = [b""] * slots

    @staticmethod
    def make_memory(slots: int, slot_bytes: int) -> int:
        """A memfd for an arena, its memory reserved; the caller's. Takes long if it is large.

        Raises:
            ConfigError: the machine has not that much memory.
        """
        fd = os.memfd_create("pool-arena", os.MFD_CLOEXEC)
        try:
            reserve(fd, slots * slot_bytes)
        except (MemoryError, OSError) as e:
            os.close(fd)
            raise _no_memory(slots, slot_bytes, e) from None
        return fd

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Arena:
        """Make an arena, its memory reserved now: a full machine is an error here, not a SIGBUS under load.

        Raises:
            ConfigError: the machine has not that much memory.
        """
        fd = cls.make_memory(slots, slot_bytes)
        try:
            return cls(fd, slots, slot_bytes)
        except OSError as e:
            os.close(fd)
            raise _no_memory(slots, slot_bytes, e) from None

    @classmethod
    def attach(cls, fd: int, slots: int, slot_bytes: int) -> Arena:
        """Map an arena made by the front."""
        return cls(fd, slots, slot_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all slots."""
        return len(self.slots) * self.slot_bytes

    def close(self) -> None:
        """Close the memfd and drop the map (unmapped once no view of it is left)."""
        self.slots = []
        os.close(self.fd)

    # -- front --------------------------------------------------------------------------------------

    def describe(self, slot: int, layout: Layout) -> None:
        """Write what the worker must know; nothing to do if the slot had the same layout last."""
        encoded = layout.descriptor_bytes
        if self._described[slot] is not encoded:
            view = self.slots[slot].data
            _LENGTH.pack_into(view, 0, len(encoded))
            view[_LENGTH.size : _LENGTH.size + len(encoded)] = encoded
            self._described[slot] = encoded

    def read_began_s(self, slot: int) -> float:
        """When the worker started its run, in seconds of CLOCK_MONOTONIC; anything at all if it scribbled."""
        began_ns: int = _BEGAN.unpack_from(self.slots[slot].data, RUN_RECORD_OFFSET)[0]
        return began_ns * 1e-9

    def read_run_record(self, slot: int) -> tuple[int, int, int, bytes]:
        """What the worker wrote of its run (`write_run_record`).

        Equal bytes mean equal places; `decode_outputs` decodes them.

        Raises:
            InternalError: the record cannot be one (a worker scribbled over it).
        """
        view = self.slots[slot].data
        started_ns, ended_ns, piece_rows, length = _RUN_RECORD.unpack_from(view, RUN_RECORD_OFFSET)
        if length > _OUTPUTS_MAX_BYTES:
            raise InternalError(f"run record of {length} bytes; wanted at most {_OUTPUTS_MAX_BYTES}")
        at = RUN_RECORD_OFFSET + _RUN_RECORD.size
        return started_ns, ended_ns, piece_rows, bytes(view[at : at + length])

    # -- worker -------------------------------------------------------------------------------------

    def read_descriptor(self, slot: int) -> BatchDescriptor:
        """What the front wrote with `describe`."""
        view = self.slots[slot].data
        (length,) = _LENGTH.unpack_from(view, 0)
        return _decode_descriptor(view[_LENGTH.size : _LENGTH.size + length])

    def write_began(self, slot: int, began_ns: int) -> None:
        """Note that a run begins, for a front that shares this worker with others (`read_began_s`)."""
        _BEGAN.pack_into(self.slots[slot].data, RUN_RECORD_OFFSET, began_ns)

    def write_run_record(
        self, slot: int, started_ns: int, ended_ns: int, piece_rows: int, places: bytes
    ) -> None:
        """Write down a run.

        Args:
            slot: Whose batch it was.
            started_ns: When it began (CLOCK_MONOTONIC).
            ended_ns: And when it ended.
            piece_rows: Rows a call that have been found the best for such batches; 0 for all.
            places: Of the outputs, as of `encode_outputs`.
        """
        view = self.slots[slot].data
        _RUN_RECORD.pack_into(view, RUN_RECORD_OFFSET, started_ns, ended_ns, piece_rows, len(places))
        at = RUN_RECORD_OFFSET + _RUN_RECORD.size
        view[at : at + len(places)] = places


def encode_outputs(places: list[OutputPlace]) -> bytes:
    """The outputs' places as `Arena.write_run_record` takes them.

    Raises:
        TooLarge: there are too many outputs, of too high a rank, to write down.
    """
    encoded = _encode(places)
    if len(encoded) > _OUTPUTS_MAX_BYTES:
        raise TooLarge(
            f"the shapes of the outputs take {len(encoded)} bytes to write down; "
            f"wanted at most {_OUTPUTS_MAX_BYTES}"
        )
    return encoded


def _no_memory(slots: int, slot_bytes: int, reason: Exception) -> ConfigError:
    return ConfigError(
        f"arena of {slots} slots x {slot_bytes} bytes: {reason}; "
        f"lower slots, max_batch_size or max_rows_bytes"
    )
