"""From a request's header to its rows in a slot, and from a slot back to replies. Runs in the front.

One `Generation` is a model as it is served now: a version, its arena, its batcher, its workers' weights.
It resolves request headers to `Route`s (once for each distinct header; `pool.front.endpoint` keeps
them), copies rows into slots, and cuts the outputs of a finished slot into replies. It does no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from pool import wire
from pool.config import ModelConfig
from pool.errors import (
    InternalError,
    InvalidInput,
    ModelError,
    Overloaded,
    PoolError,
    SignatureNotFound,
    TooLarge,
    WireError,
)
from pool.front.batcher import Batcher, Slot, Ticket
from pool.shm.arena import (
    UNKNOWN_ROWS_BYTES,
    Arena,
    InputRegion,
    Layout,
    OutputPlace,
    alignment_bytes,
    decode_outputs,
    plan_layout,
    slot_bytes_for,
)
from pool.shm.control import LoadReport
from pool.signature import ITEM_BYTES, Signature, TensorSpec, row_items
from pool.wire import PredictMeta, TensorMeta

# Distinct shapes (and output tables) remembered. Each is about a kB; a client that makes up shapes
# without end must not grow the front.
_REMEMBERED_MAX = 4096

# Slots when the config does not say: enough to queue while every worker has one running and one
# waiting, and otherwise as many as fit this budget, up to 16 (1,024 rows at the default batch size).
_ARENA_BUDGET_BYTES = 512 << 20
_SLOTS_MAX = 16

# Advice to a client that found no room. A slot is freed about every batch; 10 ms is a usual one.
RETRY_AFTER_MS = 10


class Sink(Protocol):
    """Where answers go: an endpoint, or an application that embeds the engine."""

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send each ticket its rows, `start` to `start + rows` of `slot`, cut as `reply` says."""

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """Send a result that is in no slot any more (joined from several)."""

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send an error."""


class Route:
    """What a request header resolves to; immutable, shared by all requests with that header.

    Attributes:
        generation: The model as served.
        signature: What runs.
        layout: How slots are cut for it.
        number: The layout's number: what batches share.
        capacity: Rows a slot holds in this layout.
        is_batched: Whether a request may have other than one row.
        inputs: For each tensor frame in the request's order: (offset in the slot, bytes of a row).
        regions: The same frames' `InputRegion`s.
        is_numeric: Whether every input has a fixed size, so that frames go into the slot directly.
        outputs: Indices of the outputs wanted, in the order wanted.
    """

    __slots__ = (
        "capacity",
        "generation",
        "inputs",
        "is_batched",
        "is_numeric",
        "layout",
        "number",
        "outputs",
        "regions",
        "signature",
    )

    def __init__(
        self,
        generation: Generation,
        signature: Signature,
        layout: Layout,
        order: Sequence[int],
        outputs: tuple[int, ...],
    ) -> None:
        self.generation = generation
        self.signature = signature
        self.layout = layout
        self.number = layout.number
        self.capacity = layout.capacity
        self.is_batched = signature.batched
        self.regions = [layout.descriptor.inputs[i] for i in order]
        self.inputs = [(region.offset, region.row_bytes) for region in self.regions]
        self.is_numeric = all(region.dtype != "string" for region in self.regions)
        self.outputs = outputs


class Reply:
    """How to cut the replies for one choice of outputs out of a finished slot.

    Attributes:
        head: First eight bytes of the reply header.
        bundle_head: The same for a bundle of replies.
        meta: Its msgpack part.
        flags: Its flags.
        row_shapes: Of the outputs, without the row axis.
        numeric: (offset, row bytes) of each output; None if one of them holds strings.
        row_bytes: Of all outputs together; 0 if one of them holds strings.
    """

    __slots__ = (
        "_batched",
        "_places",
        "bundle_head",
        "flags",
        "head",
        "meta",
        "numeric",
        "row_bytes",
        "row_shapes",
    )

    def __init__(
        self, version: int, signature: Signature, places: list[OutputPlace], outputs: tuple[int, ...]
    ) -> None:
        self._batched = signature.batched
        self._places = [places[i] for i in outputs]
        self.row_shapes = [place.shape[1:] if self._batched else place.shape for place in self._places]
        self.flags = 0 if self._batched else int(wire.Flag.WHOLE)
        self.head = wire.head(wire.Kind.RESULT, self.flags)
        self.bundle_head = wire.head(wire.Kind.RESULT, self.flags | wire.Flag.BUNDLE)
        self.meta = wire.encode_meta(
            wire.ResultMeta(
                version,
                tuple(
                    TensorMeta(signature.outputs[i].name, place.dtype, shape)
                    for i, place, shape in zip(outputs, self._places, self.row_shapes, strict=True)
                ),
            )
        )
        self.numeric: list[tuple[int, int]] | None = None
        self.row_bytes = 0
        if all(place.dtype != "string" for place in self._places):
            self.numeric = [
                (place.offset, ITEM_BYTES[place.dtype] * row_items(shape))
                for place, shape in zip(self._places, self.row_shapes, strict=True)
            ]
            self.row_bytes = sum(row_bytes for _, row_bytes in self.numeric)

    def payloads(self, memory: memoryview, start: int, rows: int) -> list[memoryview | bytes]:
        """The tensor frames of one reply; numeric ones alias `memory`."""
        if self.numeric is not None:
            return [memory[o + start * n : o + (start + rows) * n] for o, n in self.numeric]
        return [self._payload(place, memory, start, rows) for place in self._places]

    def _payload(self, place: OutputPlace, memory: memoryview, start: int, rows: int) -> memoryview | bytes:
        whole: memoryview = memory[place.offset : place.offset + place.size_bytes]
        shape = place.shape[1:] if self._batched else place.shape
        items = row_items(shape)
        if place.dtype != "string":
            size = ITEM_BYTES[place.dtype] * items
            return whole[start * size : (start + rows) * size]
        offsets, heap = wire.split_strings(whole, row_items(place.shape))
        ends = offsets[start * items : (start + rows) * items + 1]
        rebased: bytes = (ends - ends[0]).tobytes()
        return rebased + bytes(heap[int(ends[0]) : int(ends[-1])])

    def join(self, parts: list[tuple[int, list[bytes]]]) -> list[bytes]:
        """The tensor frames of a request whose rows ran in several batches.

        Args:
            parts: (rows, tensor frames) of each part, in the order of the request's rows.
        """
        joined = []
        for i, place in enumerate(self._places):
            if place.dtype == "string":
                items = row_items(place.shape[1:])
                joined.append(_join_strings([(rows * items, frames[i]) for rows, frames in parts]))
            else:
                joined.append(b"".join(frames[i] for _, frames in parts))
        return joined


def _join_strings(pieces: Sequence[tuple[int, bytes]]) -> bytes:
    strings: list[bytes] = []
    for count, piece in pieces:
        offsets, heap = wire.split_strings(piece, count)
        ends = offsets.tolist()
        strings += [bytes(heap[ends[i] : ends[i + 1]]) for i in range(count)]
    return wire.encode_strings(strings)


class Join:
    """A request split over several batches: a sink that gathers its parts and answers once.

    Args:
        whole: The request's ticket, as the real sink knows it; it is in no slot itself.
    """

    def __init__(self, whole: Ticket) -> None:
        self.whole = whole
        self.parts: list[tuple[Slot, Ticket]] = []
        self._results: dict[int, tuple[int, list[bytes]]] = {}
        self._row_shapes: list[tuple[int, ...]] | None = None

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Parts are done: copy their rows out of the slot; answer when they were the last."""
        for ticket in tickets:
            self._send_part(ticket, reply, slot)

    def _send_part(self, ticket: Ticket, reply: Reply, slot: Slot) -> None:
        memory = ticket.route.generation.views[slot.index]
        frames = [bytes(payload) for payload in reply.payloads(memory, ticket.start, ticket.rows)]
        if self._row_shapes not in (None, reply.row_shapes):
            self.send_error(
                ticket,
                ModelError(
                    f"rows of one request ran in several batches and gave row shapes {self._row_shapes} and "
                    f"{reply.row_shapes}, which do not join; send at most one batch of rows at a time"
                ),
            )
            return
        self._row_shapes = reply.row_shapes
        self._results[ticket.id] = (ticket.rows, frames)
        if len(self._results) == len(self.parts) and not self.whole.is_settled:
            self.whole.is_settled = True
            joined = reply.join([self._results[i] for i in range(len(self.parts))])
            self.whole.sink.send_frames(self.whole, reply, joined)

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """One part failed: so has the request. The other parts are not wanted any more."""
        batcher = ticket.route.generation.batcher
        for slot, part in self.parts:
            if part is not ticket and not part.is_settled:
                batcher.withdraw(slot, part)
        if not self.whole.is_settled:
            self.whole.is_settled = True
            self.whole.sink.send_error(self.whole, error)


class Generation:
    """A model as it is served: version, arena, batcher, routes.

    Args:
        model: Its name.
        config: Its settings.
        report: What the loader found.

    Raises:
        ConfigError: the arena cannot be allocated.
    """

    def __init__(self, model: str, config: ModelConfig, report: LoadReport) -> None:
        self.model = model
        self.config = config
        self.report = report
        self.version = report.version
        self.signatures = {signature.name: signature for signature in report.signatures}
        slots, slot_bytes = plan_arena(config, report.signatures)
        self.arena = Arena.create(slots, slot_bytes)
        self.views = [slot.data for slot in self.arena.slots]
        self.batcher = Batcher(slots, config.max_queue_delay_ms / 1e3)
        self._layouts: dict[tuple[str, tuple[tuple[int, ...], ...]], Layout] = {}
        self._layouts_made = 0
        self._replies: dict[tuple[int, bytes, tuple[int, ...]], Reply] = {}

    def close(self) -> None:
        """Give the arena's memory back; no worker may be running."""
        self.views = []
        self.arena.close()

    def describe(self) -> dict[str, Any]:
        """What a client must know to build requests (`docs/wire.md` 3.2)."""
        return {
            "model": self.model,
            "version": self.version,
            "signatures": [msgspec.to_builtins(signature) for signature in self.signatures.values()],
            "max_rows": self.config.max_batch_size * len(self.batcher.slots),
        }

    # -- resolving ----------------------------------------------------------------------------------

    def resolve(self, meta: PredictMeta) -> Route:
        """What requests with this header run and how their rows lie in a slot.

        Raises:
            SignatureNotFound · InvalidInput · TooLarge: the sentence names what was got and wanted.
        """
        signature = self.find_signature(meta.signature)
        position = {spec.name: i for i, spec in enumerate(signature.inputs)}
        ordered: list[TensorMeta | None] = [None] * len(signature.inputs)
        order = []
        for tensor in meta.inputs:
            _check_input(signature, signature.input(tensor.name), tensor)
            order.append(position[tensor.name])
            ordered[position[tensor.name]] = tensor
        given = [tensor for tensor in ordered if tensor is not None]
        if len(given) < len(ordered):
            missing = [s.name for s, t in zip(signature.inputs, ordered, strict=True) if t is None]
            raise InvalidInput(f"inputs {missing} are missing; signature {signature.name!r} wants them all")
        return Route(self, signature, self._layout(signature, given), order, _choose(signature, meta.outputs))

    def find_signature(self, name: str | None) -> Signature:
        """The signature of that name; for None the only one, or `serving_default`.

        Raises:
            SignatureNotFound: there is none; the sentence lists those there are.
        """
        if name is None:
            if len(self.signatures) == 1:
                return next(iter(self.signatures.values()))
            name = "serving_default"
        found = self.signatures.get(name)
        if found is None:
            names = ", ".join(repr(n) for n in sorted(self.signatures))
            raise SignatureNotFound(f"model {self.model!r} has no signature {name!r}; wanted {names}")
        return found

    def _layout(self, signature: Signature, inputs: list[TensorMeta]) -> Layout:
        key = (signature.name, tuple(tensor.shape for tensor in inputs))
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _REMEMBERED_MAX:
                self._layouts.clear()
            self._layouts_made += 1
            layout = self._layouts[key] = plan_layout(
                self._layouts_made,
                signature,
                inputs,
                _row_bytes(signature.outputs, signature.batched),
                self.arena.slot_bytes,
                self.config.max_batch_size,
                self.config.allowed_batch_sizes,
            )
        return layout

    # -- placing ------------------------------------------------------------------------------------

    def check_rows(self, route: Route, rows: int) -> None:
        """Refuse a number of rows that can never be placed.

        Raises:
            InvalidInput · TooLarge
        """
        if not route.signature.batched and rows != 1:
            raise InvalidInput(
                f"{rows} rows for signature {route.signature.name!r}, which is not batched "
                f"({route.signature.unbatched_reason}); wanted 1, with whole tensors"
            )
        most = route.layout.capacity * len(self.batcher.slots)
        if rows > most:
            raise TooLarge(f"request of {rows} rows; the arena of model {self.model!r} holds {most}")

    def overloaded(self, route: Route, rows: int) -> Overloaded:
        """The refusal of a request that finds no room."""
        layout = route.layout
        free = self.batcher.free_rows(layout.number, layout.capacity)
        return Overloaded(
            f"no room for {rows} rows: model {self.model!r} has {free} of "
            f"{layout.capacity * len(self.batcher.slots)} rows free",
            retry_after_ms=RETRY_AFTER_MS,
        )

    def place(self, ticket: Ticket, frames: Sequence[memoryview | bytes], now: float) -> None:
        """Copy a request's rows into slots and commit them, split over batches where one has no room.

        Args:
            ticket: In no slot yet; its `route` and `rows` are set.
            frames: Tensor payloads in the request's order (`docs/wire.md` 4).
            now: Monotonic seconds.

        Raises:
            WireError: a frame's size is not what the header says.
            InvalidInput · TooLarge · Overloaded: nothing of the request will run.
        """
        route: Route = ticket.route
        number, capacity = route.number, route.capacity
        self.check_rows(route, ticket.rows)
        columns = _read_columns(route, ticket.rows, frames)
        if self.batcher.free_rows(number, capacity) < ticket.rows:
            raise self.overloaded(route, ticket.rows)
        join: Join | None = None
        done = 0
        while join is None or done < ticket.rows:
            slot = self.batcher.open_slot(number, capacity)
            if slot is None:
                self._unplace(join)
                raise self.overloaded(route, ticket.rows)
            memory = self.arena.slots[slot.index]
            rows = min(ticket.rows - done, slot.capacity - slot.rows)
            for column in columns:
                rows = min(rows, column.fit(memory, slot.rows, done, rows))
            if rows == 0 and ticket.rows > 0:
                if slot.tickets:  # its string heap is full: go on in the next slot
                    self.batcher.close(slot)
                    continue
                self.batcher.abandon(slot)
                self._unplace(join)
                raise TooLarge(
                    f"row {done} of the request has more string bytes than a slot holds: raise max_rows_bytes"
                )
            for column in columns:
                column.write(memory, slot.rows, done, rows)
            if rows == ticket.rows:
                self.batcher.commit(slot, ticket, now)
                return
            if join is None:
                join = Join(ticket)
            part = Ticket(join, None, len(join.parts), route, rows, ticket.deadline, now)
            join.parts.append((slot, part))
            self.batcher.commit(slot, part, now)
            done += rows

    def place_all(
        self, tickets: Sequence[Ticket], frames: Sequence[memoryview | bytes], now: float
    ) -> list[tuple[Ticket, PoolError]]:
        """Place the requests of a bundle, one after the other: `place` for many at the price of one.

        Args:
            tickets: Of one route, batched and numeric; in no slot yet.
            frames: Tensor payloads of all their rows together, in the request's order.
            now: Monotonic seconds.

        Returns:
            Those refused, and why; they are in no slot.

        Raises:
            WireError: a frame's size is not what the header says; nothing was placed.
        """
        route: Route = tickets[0].route
        columns = _read_numeric(route, sum(ticket.rows for ticket in tickets), frames)
        number, capacity = route.number, route.capacity
        refused: list[tuple[Ticket, PoolError]] = []
        first = done = 0
        while first < len(tickets):
            slot = self.batcher.open_slot(number, capacity)
            if slot is None:
                refused += [(ticket, self.overloaded(route, ticket.rows)) for ticket in tickets[first:]]
                break
            room = slot.capacity - slot.rows
            rows, end = 0, first
            while end < len(tickets) and rows + tickets[end].rows <= room:
                rows += tickets[end].rows
                end += 1
            if end == first:  # the next one has to be split, or waits for an empty slot
                self.batcher.abandon(slot)
                ticket = tickets[first]
                spans = [column.span(done, ticket.rows) for column in columns]
                try:
                    self.place(ticket, spans, now)
                except PoolError as e:
                    refused.append((ticket, e))
                rows, end = ticket.rows, first + 1
            else:
                memory = self.arena.slots[slot.index]
                for column in columns:
                    column.write(memory, slot.rows, done, rows)
                for ticket in tickets[first:end]:
                    self.batcher.commit(slot, ticket, now)
            done += rows
            first = end
        return refused

    def _unplace(self, join: Join | None) -> None:
        if join is not None:
            join.whole.is_settled = True
            for slot, part in join.parts:
                self.batcher.withdraw(slot, part)

    # -- replying -----------------------------------------------------------------------------------

    def reply_for(self, route: Route, places: bytes) -> Reply:
        """How to cut the replies of `route` out of a slot whose run record holds `places`.

        Raises:
            InternalError: the record does not describe outputs within the slot.
        """
        key = (route.layout.number, places, route.outputs)
        reply = self._replies.get(key)
        if reply is None:
            try:
                decoded = decode_outputs(places)
            except ValueError as e:
                raise InternalError(f"run record of model {self.model!r} is not valid: {e}") from None
            ends = [place.offset + place.size_bytes for place in decoded]
            if len(decoded) != len(route.signature.outputs) or max(ends, default=0) > self.arena.slot_bytes:
                raise InternalError(f"run record of model {self.model!r} points outside its slot")
            if len(self._replies) >= _REMEMBERED_MAX:
                self._replies.clear()
            reply = Reply(self.version, route.signature, decoded, route.outputs)
            self._replies[key] = reply
        return reply


# -- columns: one input tensor of one request, on its way into slots --------------------------------


class _Column:
    """A numeric input: rows of a fixed size."""

    def __init__(self, region: InputRegion, payload: memoryview | bytes) -> None:
        self._offset = region.offset
        self._row_bytes = region.row_bytes
        self._rows = np.frombuffer(payload, np.uint8)

    def span(self, start: int, rows: int) -> memoryview:
        """The payload of some of the rows."""
        return self._rows[start * self._row_bytes : (start + rows) * self._row_bytes].data

    def fit(self, _memory: npt.NDArray[np.uint8], _at: int, _start: int, rows: int) -> int:
        """How many of `rows` rows from `_start` on find room in the slot's rows from `_at` on: all."""
        return rows

    def write(self, memory: npt.NDArray[np.uint8], at: int, start: int, rows: int) -> None:
        """Copy them."""
        n = self._row_bytes
        to = self._offset + at * n
        memory[to : to + rows * n] = self._rows[start * n : (start + rows) * n]


class _StringColumn:
    """A string input: offsets and a heap, both appended to those in the slot."""

    def __init__(self, region: InputRegion, rows: int, payload: memoryview | bytes) -> None:
        self._region = region
        self._items = row_items(region.shape)
        self._offsets, self._heap = wire.split_strings(payload, rows * self._items)

    def _slot_offsets(self, memory: npt.NDArray[np.uint8], at: int, rows: int) -> npt.NDArray[np.uint64]:
        start = self._region.offset + 8 * at * self._items
        view = memory[start : start + 8 * (rows * self._items + 1)].view("<u8")
        if at == 0:
            view[0] = 0
        return view

    def fit(self, memory: npt.NDArray[np.uint8], at: int, start: int, rows: int) -> int:
        """As `_Column.fit`; here the heap may be short."""
        room = self._region.heap_bytes - int(self._slot_offsets(memory, at, 0)[0])
        ends = self._offsets[(start + np.arange(rows + 1)) * self._items]
        return int(np.searchsorted(ends - ends[0], room, side="right")) - 1

    def write(self, memory: npt.NDArray[np.uint8], at: int, start: int, rows: int) -> None:
        """Append offsets, moved to where the heap ends now, and the bytes."""
        offsets = self._slot_offsets(memory, at, rows)
        mine = self._offsets[start * self._items : (start + rows) * self._items + 1]
        offsets[1:] = mine[1:] - mine[0] + offsets[0]
        to = self._region.heap_offset + int(offsets[0])
        heap = np.frombuffer(self._heap, np.uint8)[int(mine[0]) : int(mine[-1])]
        memory[to : to + len(heap)] = heap


def _read_numeric(route: Route, rows: int, frames: Sequence[memoryview | bytes]) -> list[_Column]:
    columns = _read_columns(route, rows, frames)
    assert all(isinstance(column, _Column) for column in columns), "a bundle of strings"
    return columns  # type: ignore[return-value]


def _read_columns(
    route: Route, rows: int, frames: Sequence[memoryview | bytes]
) -> list[_Column | _StringColumn]:
    if len(frames) != len(route.regions):
        raise WireError(f"{len(frames)} tensor frames; the header names {len(route.regions)}")
    columns: list[_Column | _StringColumn] = []
    for i, (region, frame) in enumerate(zip(route.regions, frames, strict=True)):
        if region.dtype == "string":
            columns.append(_StringColumn(region, rows, frame))
        elif len(frame) != rows * region.row_bytes:
            raise frame_size_error(route, i, len(frame), rows)
        else:
            columns.append(_Column(region, frame))
    return columns


def frame_size_error(route: Route, index: int, got: int, rows: int) -> WireError:
    """The refusal of a tensor frame whose size is not what the header says."""
    region = route.regions[index]
    return WireError(
        f"tensor frame {index} has {got} bytes; wanted {rows * region.row_bytes} "
        f"({rows} rows of {region.dtype} {list(region.shape)})"
    )


# -- checking ---------------------------------------------------------------------------------------


def _check_input(signature: Signature, spec: TensorSpec, tensor: TensorMeta) -> None:
    if tensor.dtype != spec.dtype:
        raise InvalidInput(f"input {spec.name!r} has dtype {tensor.dtype}; wanted {spec.dtype}")
    if spec.shape is None:
        return
    wanted = spec.shape[1:] if signature.batched else spec.shape
    if len(tensor.shape) != len(wanted) or any(
        want is not None and want != got for want, got in zip(wanted, tensor.shape, strict=True)
    ):
        what = "rows of shape" if signature.batched else "shape"
        axes = ["any" if n is None else n for n in wanted]
        raise InvalidInput(f"input {spec.name!r} has {what} {list(tensor.shape)}; wanted {axes}")


def _choose(signature: Signature, names: tuple[str, ...] | None) -> tuple[int, ...]:
    if names is None:
        return tuple(range(len(signature.outputs)))
    position = {spec.name: i for i, spec in enumerate(signature.outputs)}
    for name in names:
        if name not in position:
            wanted = ", ".join(repr(n) for n in position)
            raise InvalidInput(f"signature {signature.name!r} has no output {name!r}; wanted {wanted}")
    if len(set(names)) < len(names):
        raise InvalidInput(f"outputs {list(names)} name one twice")
    return tuple(position[name] for name in names)


# -- sizing -----------------------------------------------------------------------------------------


def _row_bytes(specs: Sequence[TensorSpec], batched: bool) -> int | None:
    """Bytes of one row (of the whole tensors if unbatched), or None if the specs leave it open."""
    total = 0
    for spec in specs:
        if spec.shape is None or spec.dtype == "string":
            return None
        items = 1
        for axis in spec.shape[1:] if batched else spec.shape:
            if axis is None:
                return None
            items *= axis
        total += items * ITEM_BYTES[spec.dtype]
    return total


def plan_arena(config: ModelConfig, signatures: Sequence[Signature]) -> tuple[int, int]:
    """Number of slots and bytes of each, from the config where it says, else from the signatures."""
    rows_bytes = config.max_rows_bytes
    if rows_bytes is None:
        rows_bytes = max(_rows_bytes(signature, config.max_batch_size) for signature in signatures)
    slot_bytes = slot_bytes_for(rows_bytes)
    # Each worker one running and one waiting, one filling, one being answered.
    least = 2 * config.workers + 2
    return config.slots or max(least, min(_SLOTS_MAX, _ARENA_BUDGET_BYTES // slot_bytes)), slot_bytes


def _rows_bytes(signature: Signature, max_batch_size: int) -> int:
    inputs = _row_bytes(signature.inputs, signature.batched)
    outputs = _row_bytes(signature.outputs, signature.batched)
    rows = max_batch_size if signature.batched else 1
    slack = alignment_bytes(len(signature.inputs), len(signature.outputs))
    if inputs is None:
        return UNKNOWN_ROWS_BYTES
    if outputs is None:
        return max(UNKNOWN_ROWS_BYTES, 2 * rows * inputs + slack)
    return rows * (inputs + outputs) + slack
