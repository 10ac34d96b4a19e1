"""Runs the slots of one arena on one model. In the worker; `loop` has the doorbell.

A RUN names a slot. The worker aliases the slot's input regions as the framework's tensors, runs the
signature and writes the outputs behind the inputs. What was bound for a (slot, layout, rows) is kept: the
tensors alias the memory, so the next such batch costs one call, or one for each piece where pieces are
faster (`split`). A model that raises costs a MODEL_ERROR message, never the process.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pool.backends import Array, BoundCall, Model
from pool.errors import ModelError, TooLarge
from pool.shm.arena import (
    ALIGN_BYTES,
    Arena,
    BatchDescriptor,
    InputRegion,
    OutputPlace,
    align,
    encode_outputs,
)
from pool.shm.doorbell import Message, Ring
from pool.shm.loans import Borrowed, Place, read_places
from pool.signature import ITEM_BYTES, Signature, dtype_name, numpy_dtype, row_items
from pool.wire import encode_strings
from pool.worker.split import WHOLE, Split

# Bound calls kept. 32 slots x 64 batch sizes are 2,048 for one layout; an entry is a few kB of tensor
# handles. When more shapes than this come by, all are dropped and built again on demand.
_BOUND_MAX = 4096


class _Plan:
    """What is known of a layout, and how its batches are cut into pieces; None if they never are."""

    __slots__ = ("descriptor", "split")

    def __init__(self, descriptor: BatchDescriptor, split: Split | None) -> None:
        self.descriptor = descriptor
        self.split = split


class _Bound:
    """Calls bound to one slot region, and where their outputs went last time.

    Attributes:
        descriptor: Of the batch.
        call: Runs it; None when the inputs must be read anew each time (strings).
        cuts: First row and end of each piece.
        shapes: Of the outputs of the first piece, then of the second, and so on.
        targets: Where they go.
        places: The same of whole outputs, encoded.
    """

    __slots__ = ("call", "cuts", "descriptor", "places", "shapes", "targets")

    def __init__(
        self, descriptor: BatchDescriptor, call: BoundCall | None, cuts: list[tuple[int, int]]
    ) -> None:
        self.descriptor = descriptor
        self.call = call
        self.cuts = cuts
        self.shapes: list[tuple[int, ...]] = []
        self.targets: list[Array] = []
        self.places = b""


class _Uneven(Exception):
    """The outputs of pieces do not make up that of a batch."""


class Runner:
    """Runs the slots of one arena on one model.

    Args:
        model: The loaded replica.
        arena: Mapped; a slot named by a RUN message is the worker's until it answers.
        signatures: By name, as the loader settled them.
        allowed_batch_sizes: Sizes to pad batches up to, rising; empty for none.
        borrowed: Regions of clients.
        split_s: Longest run of a batch that pieces are tried with; 0 for never.
    """

    def __init__(
        self,
        model: Model,
        arena: Arena,
        signatures: dict[str, Signature],
        allowed_batch_sizes: tuple[int, ...],
        borrowed: Borrowed,
        split_s: float = 0.0,
    ) -> None:
        self._model = model
        self._borrowed = borrowed
        self._arena = arena
        self._signatures = signatures
        self._allowed = allowed_batch_sizes
        self._split_s = split_s
        self._plans: dict[int, _Plan] = {}  # by layout
        # By slot, layout, rows with padding, rows a call, and where the inputs lie if not in the slot.
        self._bound: dict[tuple[int, int, int, int, tuple[Place, ...]], _Bound] = {}

    def run(self, message: Message) -> Message:
        """Run one batch; gives the answer to ring back. Never raises for what a model does."""
        started_ns = time.monotonic_ns()
        slot, rows = message.slot, message.rows
        kind, text = Ring.DONE, ""
        try:
            plan = self._plan(slot, message.layout)
            descriptor, split = plan.descriptor, plan.split
            padded = self._padded(rows, descriptor)
            lent: tuple[Place, ...] = ()
            if message.kind == Ring.RUN_LENT:
                assert padded == rows, "rows that nobody has lent"
                lent = read_places(self._arena.slots[slot], len(descriptor.inputs))
            elif padded > rows:
                self._pad(slot, descriptor, rows, padded)
            size = split.choose(padded) if split is not None else WHOLE
            try:
                places = self._run(slot, descriptor, rows, padded, size, lent)
            except _Uneven:
                assert split is not None, "pieces without a split"
                split.forbid()
                places = self._run(slot, descriptor, rows, padded, WHOLE, lent)
            ended_ns = time.monotonic_ns()
            best = WHOLE
            if split is not None:
                split.learn(padded, size, (ended_ns - started_ns) * 1e-9)
                best = split.best
            self._arena.write_run_record(slot, started_ns, ended_ns, best, places)
        except ModelError as e:
            kind, text = Ring.MODEL_ERROR, e.message
        except TooLarge as e:
            kind, text = Ring.TOO_LARGE, e.message
        except Exception as e:
            kind, text = Ring.MODEL_ERROR, f"{type(e).__name__}: {e}"
        return Message(kind, slot, rows, message.generation, message.layout, text)

    def _run(
        self,
        slot: int,
        descriptor: BatchDescriptor,
        rows: int,
        padded: int,
        size: int,
        lent: tuple[Place, ...],
    ) -> bytes:
        """Run a batch, so many rows a call, and write its outputs; gives their encoded places.

        Raises:
            _Uneven: the pieces do not make up a batch.
        """
        bound = self._bound.get((slot, descriptor.layout, padded, size, lent))
        if bound is None:
            bound = self._bind(slot, descriptor, padded, size, lent)
        if bound.call is not None:
            outputs = bound.call()
        else:
            arrays = self._inputs(slot, descriptor, rows, padded, ())
            outputs = self._model.bind(descriptor.signature, arrays)()
        return self._write(slot, bound, outputs, padded)

    def give_back(self, number: int) -> None:
        """Let go of a client's region."""
        for key in [key for key in self._bound if any(place.number == number for place in key[4])]:
            del self._bound[key]
        self._borrowed.give_back(number)

    def close(self) -> None:
        """Forget the arena and all that lies in it: its front has ended."""
        self._bound.clear()
        self._plans.clear()
        self._borrowed.close()
        self._arena.close()

    def _padded(self, rows: int, descriptor: BatchDescriptor) -> int:
        if not descriptor.batched:
            return rows
        if rows == 0 and not _has_strings(descriptor):
            rows = 1  # many operations refuse an empty batch: run a row of zeros, whose outputs nobody reads
        if rows == 0:  # strings have no such neutral value
            return 0
        at = bisect_left(self._allowed, rows)
        return self._allowed[at] if at < len(self._allowed) else rows

    def _plan(self, slot: int, layout: int) -> _Plan:
        found = self._plans.get(layout)
        if found is None:
            descriptor = self._arena.read_descriptor(slot)
            assert descriptor.layout == layout, "doorbell and slot disagree on the layout"
            if len(self._plans) >= _BOUND_MAX:
                self._plans.clear()
            found = self._plans[layout] = _Plan(descriptor, self._split(descriptor))
        return found

    def _split(self, descriptor: BatchDescriptor) -> Split | None:
        if not self._split_s or not descriptor.batched or _has_strings(descriptor):
            return None
        return Split(partial(_may_be_cut, descriptor, self._allowed), self._split_s)

    def _bind(
        self, slot: int, descriptor: BatchDescriptor, padded: int, size: int, lent: tuple[Place, ...]
    ) -> _Bound:
        if len(self._bound) >= _BOUND_MAX:
            self._bound.clear()
        step = size or max(padded, 1)
        cuts = [(at, min(at + step, padded)) for at in range(0, padded, step)]
        if _has_strings(descriptor):
            bound = _Bound(descriptor, None, cuts)
        else:
            arrays = self._inputs(slot, descriptor, padded, padded, lent)
            bind = self._model.bind
            if size == WHOLE:
                call = bind(descriptor.signature, arrays)
            else:
                call = _one_by_one(
                    [bind(descriptor.signature, [array[a:b] for array in arrays]) for a, b in cuts]
                )
            bound = _Bound(descriptor, call, cuts)
        self._bound[slot, descriptor.layout, padded, size, lent] = bound
        return bound

    def _inputs(
        self, slot: int, descriptor: BatchDescriptor, rows: int, padded: int, lent: tuple[Place, ...]
    ) -> list[Array]:
        """The batch's inputs: [padded, *row shape], or the whole shape if unbatched.

        Numeric arrays are views of the slot, or of the regions in which they lie; strings are read from the
        slot's first `rows` rows and padded here.
        """
        memory = self._arena.slots[slot]
        arrays: list[Array] = []
        for i, region in enumerate(descriptor.inputs):
            if region.dtype == "string":
                shape = (rows, *region.shape) if descriptor.batched else region.shape
                strings = _read_strings(memory, region, shape)
                if padded > rows > 0:
                    strings = np.concatenate([strings, np.repeat(strings[:1], padded - rows, axis=0)])
                arrays.append(strings)
            else:
                shape = (padded, *region.shape) if descriptor.batched else region.shape
                size = ITEM_BYTES[region.dtype] * row_items(shape)
                view = memory[region.offset : region.offset + size]
                if lent:
                    number, at = lent[i]
                    view = self._borrowed.memory(number)[at : at + size]
                arrays.append(view.view(numpy_dtype(region.dtype)).reshape(shape))
        return arrays

    def _pad(self, slot: int, descriptor: BatchDescriptor, rows: int, padded: int) -> None:
        """Repeat the first row in the rows added: real values, so that no model trips over them."""
        memory = self._arena.slots[slot]
        for region in descriptor.inputs:
            if region.dtype != "string" and region.row_bytes:
                table = memory[region.offset : region.offset + padded * region.row_bytes]
                by_row = table.reshape(padded, region.row_bytes)
                by_row[rows:] = by_row[0] if rows else 0

    def _write(self, slot: int, bound: _Bound, outputs: list[Array], rows: int) -> bytes:
        """Copy the outputs behind the inputs; gives their encoded places."""
        if len(outputs) == len(bound.targets):
            for target, shape, output in zip(bound.targets, bound.shapes, outputs, strict=True):
                if output.shape != shape or output.dtype != target.dtype:
                    break
                target[...] = output
            else:
                return bound.places
        return self._place(slot, bound, outputs, rows)

    def _place(self, slot: int, bound: _Bound, outputs: list[Array], rows: int) -> bytes:
        """As `_write`, finding room for outputs not seen before and remembering it."""
        memory = self._arena.slots[slot]
        descriptor = bound.descriptor
        signature = self._signatures[descriptor.signature]
        at = descriptor.outputs_offset
        if len(bound.cuts) > 1:
            outputs = _joined(outputs, bound.cuts)
        places: list[OutputPlace] = []
        targets: list[Array] = []
        total = sum(_payload_bytes(output) for output in outputs)
        for spec, output in zip(signature.outputs, outputs, strict=True):
            name = dtype_name(output.dtype)
            if name is None:
                raise ModelError(f"output {spec.name!r} has dtype {output.dtype}, which has no wire form")
            if descriptor.batched and (output.ndim == 0 or output.shape[0] != rows):
                raise ModelError(
                    f"output {spec.name!r} has shape {list(output.shape)} for a batch of {rows} rows; "
                    f"wanted {rows} rows"
                )
            at = align(at)
            size = _payload_bytes(output)
            if at + size > len(memory):
                raise TooLarge(
                    f"outputs of {rows} rows take {total} bytes; the slot has "
                    f"{max(len(memory) - descriptor.outputs_offset, 0)}: raise max_rows_bytes"
                )
            if name == "string":
                payload = encode_strings([_as_bytes(item) for item in output.reshape(-1).tolist()])
                memory[at : at + size] = np.frombuffer(payload, np.uint8)
            else:
                target = memory[at : at + size].view(output.dtype).reshape(output.shape)
                target[...] = output
                targets.append(target)
            places.append(OutputPlace(name, output.shape, at, size))
            at += size
        encoded = encode_outputs(places)
        if len(targets) == len(outputs):  # strings change size from run to run
            if len(bound.cuts) > 1:
                targets = [target[a:b] for a, b in bound.cuts for target in targets]
            bound.targets, bound.places = targets, encoded
            bound.shapes = [target.shape for target in targets]
        return encoded


class SharedRunner(Runner):
    """A Runner of a worker that several fronts share: it notes when it begins.

    A batch may lie behind one of another front. If the worker dies of that, or takes too long for it, the
    note says that this one is innocent.
    """

    def run(self, message: Message) -> Message:
        """As a Runner."""
        self._arena.write_began(message.slot, time.monotonic_ns())
        return super().run(message)


def _has_strings(descriptor: BatchDescriptor) -> bool:
    return any(region.dtype == "string" for region in descriptor.inputs)


def _may_be_cut(descriptor: BatchDescriptor, allowed: tuple[int, ...], size: int) -> bool:
    """Whether all pieces of so many rows begin aligned, and the model may see them and what is left over."""
    if any(size * region.row_bytes % ALIGN_BYTES for region in descriptor.inputs):
        return False
    return not allowed or (size in allowed and not any(rows % size for rows in allowed if rows > size))


def _one_by_one(calls: list[BoundCall]) -> BoundCall:
    """A call of all of them; gives the outputs of the first, then those of the second, and so on."""

    def run() -> list[Array]:
        return [output for call in calls for output in call()]

    return run


def _joined(outputs: list[Array], cuts: list[tuple[int, int]]) -> list[Array]:
    """Whole outputs from those of pieces.

    Raises:
        _Uneven: they differ in more than what a batch has more rows of.
    """
    count = len(outputs) // len(cuts)
    joined = []
    for index in range(count):
        parts = outputs[index::count]
        first = parts[0]
        for part, (begin, end) in zip(parts, cuts, strict=True):
            if part.dtype != first.dtype or part.shape != (end - begin, *first.shape[1:]):
                raise _Uneven
        joined.append(np.concatenate(parts))
    return joined


def _as_bytes(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def _payload_bytes(output: Array) -> int:
    if output.dtype != object:
        return output.nbytes
    return 8 * (output.size + 1) + sum(len(_as_bytes(item)) for item in output.reshape(-1).tolist())


def _read_strings(memory: npt.NDArray[np.uint8], region: InputRegion, shape: tuple[int, ...]) -> Array:
    items = row_items(shape)
    ends = memory[region.offset : region.offset + 8 * (items + 1)].view("<u8").tolist()
    heap = memory.data[region.heap_offset : region.heap_offset + region.heap_bytes]
    strings = np.empty(items, object)
    for i in range(items):
        strings[i] = bytes(heap[ends[i] : ends[i + 1]])
    return strings.reshape(shape)
