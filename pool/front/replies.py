"""From a finished slot to replies: which bytes go to whom, and joining what was split. Runs in the front.

It does no I/O: a `Sink` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from pool import wire
from pool.errors import InternalError, ModelError, PoolError, TooLarge, WireError
from pool.front.logs import Log
from pool.front.slots import Slot, Ticket
from pool.shm.arena import OutputPlace
from pool.signature import ITEM_BYTES, Signature, row_items
from pool.wire import TensorMeta

log = Log("pool.replies")


class Sink(Protocol):
    """Where answers go: an endpoint, or an application that embeds the engine."""

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send each ticket its rows, `start` to `start + rows` of `slot`, cut as `reply` says."""

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """Send a result that is in no slot any more (joined from several)."""

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send an error."""


class Reply:
    """How to cut the replies for one choice of outputs out of a finished slot.

    Args:
        version: Of the model.
        signature: What ran.
        places: Of its outputs.
        outputs: Which of them are wanted, by place.

    Raises:
        TooLarge: no message can hold so many outputs, or their names and shapes.

    Attributes:
        head: First eight bytes of the reply header.
        bundle_head: The same for a bundle of replies.
        meta: Its msgpack part.
        flags: Its flags.
        dtypes: Of the outputs.
        row_shapes: Of the outputs, without the row axis.
        numeric: (offset, row bytes) of each output; None if one of them holds strings.
        row_bytes: Of all outputs together; 0 if one of them holds strings.
    """

    __slots__ = (
        "_batched",
        "_places",
        "bundle_head",
        "dtypes",
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
        self.dtypes = [place.dtype for place in self._places]
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
        if len(outputs) > wire.MAX_TENSORS or len(self.meta) > wire.MAX_RESULT_META_BYTES:
            raise TooLarge(
                f"{len(outputs)} outputs, whose names and shapes take {len(self.meta)} bytes; an answer "
                f"holds at most {wire.MAX_TENSORS}, and {wire.MAX_RESULT_META_BYTES} bytes: "
                "ask for fewer outputs"
            )
        self.numeric: list[tuple[int, int]] | None = None
        self.row_bytes = 0
        if all(place.dtype != "string" for place in self._places):
            self.numeric = [
                (place.offset, ITEM_BYTES[place.dtype] * row_items(shape))
                for place, shape in zip(self._places, self.row_shapes, strict=True)
            ]
            self.row_bytes = sum(row_bytes for _, row_bytes in self.numeric)

    def check(self, memory: memoryview) -> None:
        """Make sure that what a worker wrote can be cut; of numbers, everything can.

        Args:
            memory: The whole slot.

        Raises:
            InternalError: it cannot (a worker scribbled over it).
        """
        if self.numeric is not None:
            return
        for place in self._places:
            if place.dtype == "string":
                try:
                    wire.split_strings(
                        memory[place.offset : place.offset + place.size_bytes], row_items(place.shape)
                    )
                except WireError as e:
                    raise InternalError(e.message) from None

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


class Compound(ABC):
    """A request whose rows lie in slots as tickets of their own; it is the sink of those.

    Attributes:
        whole: The request's ticket, as the real sink knows it; it is in no slot itself.
    """

    whole: Ticket

    @abstractmethod
    def withdraw(self) -> None:
        """No part is wanted any more, nor any answer."""


class Join(Compound):
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
        try:
            for ticket in tickets:
                self._send_part(ticket, reply, slot)
        except Exception as e:  # whoever waits for it must hear of it, and the batch's others must not
            log.defect("cannot join an answer")
            self._fail(InternalError(f"{type(e).__name__} while joining the answer"))

    def _send_part(self, ticket: Ticket, reply: Reply, slot: Slot) -> None:
        memory = ticket.route.generation.views[slot.index]
        frames = [bytes(payload) for payload in reply.payloads(memory, ticket.start, ticket.rows)]
        if self._row_shapes not in (None, reply.row_shapes):
            self._fail(
                ModelError(
                    f"rows of one request ran in several batches and gave row shapes {self._row_shapes} and "
                    f"{reply.row_shapes}, which do not join; send at most one batch of rows at a time"
                ),
            )
            return
        self._row_shapes = reply.row_shapes
        self._results[ticket.id] = (ticket.rows, frames)
        if len(self._results) == len(self.parts) and not self.whole.is_settled:
            joined = reply.join([self._results[i] for i in range(len(self.parts))])
            self.whole.sink.send_frames(self.whole, reply, joined)
            self.whole.is_settled = True
            self._let_go()

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """One part failed: so has the request. The other parts are not wanted any more."""
        assert ticket.is_settled, "whoever answers for a part settles it first"
        self._fail(error)

    def _fail(self, error: PoolError) -> None:
        was_settled = self.whole.is_settled
        self.withdraw()
        if not was_settled:
            self.whole.sink.send_error(self.whole, error)

    def withdraw(self) -> None:
        """No part is wanted any more, nor any answer."""
        self.whole.is_settled = True
        batcher = self.whole.route.generation.batcher
        for slot, part in self.parts:
            if not part.is_settled:
                batcher.withdraw(slot, part)
        self._let_go()

    def _let_go(self) -> None:
        """Parts and join hold each other: without this, only the garbage collector would free the results."""
        self.parts = []
        self._results = {}
