"""From replies to messages on the ROUTER: what is copied, what leaves from the slot, what is dropped. Front.

What ZeroMQ holds for a client that does not read is bounded. Bytes are counted as they are sent; after
some of them a message is sent with a mark (`pool.front.outbox`), which tells when all up to it
has left. Beyond `max_unread_bytes` replies are dropped, until some have been read.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from pool import wire
from pool.errors import PoolError
from pool.front import logs
from pool.front.clients import Client, Clients
from pool.front.discretion import discreet
from pool.front.engine import Engine
from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.metrics import ModelMetrics
from pool.front.outbox import Outbox, Tracker
from pool.front.replies import Reply
from pool.front.slots import Slot, Ticket
from pool.wire import HEAD, PART, PART_BYTES, Flag, Header, Kind

Payload = memoryview | bytes | npt.NDArray[np.uint8]

# Replies at least this large are sent from the slot without a copy. Below it, ZeroMQ's bookkeeping for
# a foreign buffer (a message object, a trip through pyzmq's collector thread) costs more than the copy.
ZERO_COPY_BYTES = 256 << 10

# The same for one tensor among several.
_ZERO_COPY_TENSOR_BYTES = 64 << 10

# A mark costs about 5 µs, copying so much about 25. No more than `ZERO_COPY_BYTES`, so that what leaves
# without a copy has a mark of its own.
MARK_BYTES = 256 << 10

# What ZeroMQ adds to a message: up to four frames of 64 bytes, and what the allocator rounds up.
_MESSAGE_BYTES = 256

# Slots that one client's unread replies may keep from being used again; and of all slots, one in so many.
_PINNED_SLOTS = 4
_PINNED_SHARE = 2

_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_ERROR = wire.head(Kind.ERROR)
_ERROR_BUNDLE = wire.head(Kind.ERROR, Flag.BUNDLE)


access = Log(logs.ACCESS)


class Refusal:
    """An error that many requests are answered with, encoded once.

    Attributes:
        code: Of the error.
        metrics: Counts it; None for what is no prediction.
        millis: Of its advice, 0 for none.
        meta: Of its message.
    """

    __slots__ = ("code", "meta", "metrics", "millis")

    def __init__(self, error: PoolError, metrics: ModelMetrics | None) -> None:
        self.code = error.code
        self.metrics = metrics
        self.millis = error.retry_after_ms or 0
        sentence = discreet(error.code, error.message[: 2 * wire.MAX_MESSAGE_CHARS])
        self.meta = wire.encode_error_meta(type(error)(sentence))


class Outbound:
    """Sends replies. The sink of requests that came alone.

    Args:
        router: Where to.
        engine: Whose slots the answers lie in.
        clients: Told of those that turn out to be gone.
        max_unread_bytes: Most that ZeroMQ may hold for one client.
        mark_bytes: Sent to one client from one mark to the next; at most `MARK_BYTES`.
        on_sent: Called after something was sent.

    Attributes:
        replies: Sent.
        dropped: Not sent, because their client is gone or does not read.
        errors: Sent, by code.
    """

    def __init__(
        self,
        router: zmq.Socket[bytes],
        engine: Engine,
        clients: Clients,
        max_unread_bytes: int,
        mark_bytes: int,
        on_sent: Callable[[], None],
    ) -> None:
        # pyzmq's Python layer over send costs 0.65 µs a frame; what it would check does not apply here.
        self._send: Callable[..., Any] = super(zmq.Socket, router).send
        # That a frame is too small to be worth lending is for this module to say.
        router.copy_threshold = 0
        # pyzmq's collector starts at its first use. It takes descriptors, which may be used up by then.
        zmq.Frame(bytes(1), copy=False, copy_threshold=0)
        self._engine = engine
        self._clients = clients
        self._max_unread_bytes = max_unread_bytes
        self._mark_bytes = mark_bytes
        self._on_sent = on_sent
        self.replies = 0
        self.dropped = 0
        self.errors: dict[str, int] = {}

    # -- results (Sink) -----------------------------------------------------------------------------

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send rows of a finished slot, each ticket's in a message."""
        generation = tickets[0].route.generation
        generation.metrics.answered("OK", len(tickets))
        if not access.is_off:
            log_results(tickets, slot)
        numeric, reply_row_bytes = reply.numeric, reply.row_bytes
        head, meta, pack = reply.head, reply.meta, HEAD.pack
        if numeric is None:
            for ticket in tickets:
                header = pack(head, ticket.id, 0, ticket.rows) + meta
                payloads = reply.payloads(generation.views[slot.index], ticket.start, ticket.rows)
                self.send_message(ticket.client, header, payloads)
            return
        view, send = generation.views[slot.index], self._send
        added = _MESSAGE_BYTES + wire.FIXED_BYTES + len(meta)
        last = len(numeric) - 1
        assert last >= 0, "a message that does not end would swallow the next"
        sent = 0
        for ticket in tickets:
            rows, client = ticket.rows, ticket.client
            header = pack(head, ticket.id, 0, rows) + meta
            room = client.room_bytes - rows * reply_row_bytes - added
            if room < 0 and client.line is not None:
                start = ticket.start
                frames = [view[at + start * n : at + (start + rows) * n] for at, n in numeric]
                if client.line.send((header, *frames)):
                    self.replies += 1
                else:
                    self.dropped += 1
                continue
            if room < 0:
                self._send_rows(client, header, [], 1, generation, reply, slot, ticket.start, rows)
                continue
            try:
                send(client.identity, _MORE)
            except zmq.ZMQError as e:
                self._drop(client, e, 1)
                continue
            client.room_bytes = room
            send(header, _MORE)
            start = ticket.start
            for i, (offset, row_bytes) in enumerate(numeric):
                at = offset + start * row_bytes
                send(view[at : at + rows * row_bytes], _MORE if i < last else _NOBLOCK)
            sent += 1
        if sent:
            self.replies += sent
            self._on_sent()

    def send_bundle(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send the answers of tickets of one client, whose rows follow each other, in one message."""
        first, last = tickets[0], tickets[-1]
        rows = last.start + last.rows - first.start
        header = HEAD.pack(reply.bundle_head, 0, 0, rows) + reply.meta
        table = b"".join([ticket.table or PART.pack(ticket.id, 0, ticket.rows) for ticket in tickets])
        requests = len(table) // PART_BYTES
        generation = first.route.generation
        generation.metrics.answered("OK", requests)
        if not access.is_off:
            log_results([alone for ticket in tickets for alone in ticket.split()], slot)
        self._send_rows(first.client, header, [table], requests, generation, reply, slot, first.start, rows)

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """Send a result joined from several batches."""
        ticket.route.generation.metrics.answered("OK")
        if not access.is_off:
            log_results([ticket], None)
        header = Header(Kind.RESULT, ticket.id, reply.meta, rows=ticket.rows, flags=reply.flags)
        self.send_message(ticket.client, wire.encode_header(header), frames)

    def _send_rows(
        self,
        client: Client,
        header: bytes,
        frames: list[Payload],
        replies: int,
        generation: Generation,
        reply: Reply,
        slot: Slot,
        start: int,
        rows: int,
    ) -> None:
        """Send rows of numeric outputs behind `frames`: large ones from the slot, if it can be spared."""
        assert reply.numeric is not None, "rows of a fixed size"
        is_lent = (
            client.line is None  # which copies what it is given
            and rows * reply.row_bytes >= ZERO_COPY_BYTES
            and self._may_pin(client, generation, slot)
        )
        memory, view = generation.arena.slots[slot.index], generation.views[slot.index]
        for offset, row_bytes in reply.numeric:
            at, size = offset + start * row_bytes, rows * row_bytes
            frames.append(
                memory[at : at + size]
                if is_lent and size >= _ZERO_COPY_TENSOR_BYTES
                else view[at : at + size]
            )
        self.send_message(client, header, frames, replies, generation, slot)

    def _may_pin(self, client: Client, generation: Generation, slot: Slot) -> bool:
        """Whether a slot can be spared until this client has read from it.

        A client that does not read must not keep the arena from those that do.
        """
        if client.outbox is not None:
            client.outbox.look()
            if slot not in client.outbox.pinned and len(client.outbox.pinned) >= _PINNED_SLOTS:
                return False
        slots = generation.batcher.slots
        return slot.pins > 0 or sum(s.pins > 0 for s in slots) < len(slots) // _PINNED_SHARE

    # -- errors and answers to questions --------------------------------------------------------------

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send the typed error a request ends with."""
        self.refuse(ticket.client, ticket.id, error, ticket.route.generation.metrics)

    def refuse(self, client: Client, id_: int, error: PoolError, metrics: ModelMetrics | None) -> None:
        """Send an error, counted in `metrics` if it answers a prediction."""
        self.refuse_alike(client, id_, Refusal(error, metrics))

    def refuse_alike(self, client: Client, id_: int, refusal: Refusal) -> None:
        """Send an error that is encoded already."""
        self._count(refusal, 1)
        if not access.is_off:
            self._log_refusal(client, (id_,), refusal)
        self.send_message(client, HEAD.pack(_ERROR, id_, refusal.millis, 0) + refusal.meta, ())

    def refuse_bundled(
        self, client: Client, ids: Sequence[int], error: PoolError, metrics: ModelMetrics
    ) -> None:
        """Answer requests that came in bundles with one error, in one message."""
        if len(ids) == 1:
            self.refuse(client, ids[0], error, metrics)
            return
        refusal = Refusal(error, metrics)
        self._count(refusal, len(ids))
        if not access.is_off:
            self._log_refusal(client, ids, refusal)
        header = HEAD.pack(_ERROR_BUNDLE, 0, refusal.millis, 0) + refusal.meta
        self.send_message(client, header, [wire.encode_ids(ids)], len(ids))

    @staticmethod
    def _log_refusal(client: Client, ids: Sequence[int], refusal: Refusal) -> None:
        if refusal.metrics is None:
            return
        for id_ in ids:
            access.info(
                "request",
                model=refusal.metrics.model,
                code=refusal.code,
                client=client.identity.hex(),
                id=id_,
            )

    def _count(self, refusal: Refusal, replies: int) -> None:
        self.errors[refusal.code] = self.errors.get(refusal.code, 0) + replies
        if refusal.metrics is not None:
            refusal.metrics.answered(refusal.code, replies)

    def inform(self, client: Client, id_: int, document: dict[str, Any]) -> None:
        """Send the answer to a question."""
        header = wire.encode_header(Header(Kind.INFO, id_, wire.encode_info(document)))
        self.send_message(client, header, ())

    # -- messages -----------------------------------------------------------------------------------

    def send_message(
        self,
        client: Client,
        header: bytes,
        payloads: Sequence[Payload],
        replies: int = 1,
        generation: Generation | None = None,
        slot: Slot | None = None,
    ) -> None:
        """Send a message, with a mark if it is due; or drop it.

        Args:
            client: Where to.
            header: Its header frame.
            payloads: The other frames. Arrays are lent: views of `slot`. The others are copied.
            replies: How many it holds.
            generation: Whose slot it is.
            slot: What the arrays are views of.
        """
        frames: Sequence[Payload] = (header, *payloads)
        if client.line is not None:
            if client.line.send(frames):
                self.replies += replies
            else:
                self.dropped += replies
            return
        size = _MESSAGE_BYTES + sum(map(len, frames))
        room = client.room_bytes - size
        covered = self._mark_bytes - room  # since the last mark, this message included
        if room < 0 and not self._may_mark(client, covered):
            self.dropped += replies
            return
        send = self._send
        try:
            send(client.identity, _MORE)
        except zmq.ZMQError as e:
            self._drop(client, e, replies)
            return
        tracker: Tracker | None = None
        lent: Slot | None = None
        last = len(frames) - 1
        for i, frame in enumerate(frames):
            flags = _MORE if i < last else _NOBLOCK
            if isinstance(frame, np.ndarray):
                assert generation is not None, "an array is a view of a slot"
                assert slot is not None, "an array is a view of a slot"
                self._engine.pin(generation, slot, frame)
                tracker, lent = send(frame, flags, False, True), slot
            elif room < 0 and i == last:
                tracker = send(bytes(frame), flags, False, True)
            else:
                send(frame, flags)
        if room < 0:
            assert client.outbox is not None, "what is due may be marked"
            assert tracker is not None, "what is due is marked"
            client.outbox.mark(tracker, covered, lent)
            room = self._mark_bytes
        client.room_bytes = room
        self.replies += replies
        self._on_sent()

    def _may_mark(self, client: Client, size: int) -> bool:
        """Whether to send on, now that it is time for a mark."""
        if client.is_gone:
            return False
        if client.outbox is None:
            client.outbox = Outbox()
        outbox = client.outbox
        outbox.look()
        # One reply is always sent, however large.
        return not outbox.unread_bytes or outbox.unread_bytes + size <= self._max_unread_bytes

    def _drop(self, client: Client, e: zmq.ZMQError, replies: int) -> None:
        """The client is gone (EHOSTUNREACH), or does not read and has too many replies waiting (EAGAIN)."""
        if e.errno == errno.EHOSTUNREACH:
            self._clients.lose(client)
        elif e.errno != errno.EAGAIN:
            raise e
        self.dropped += replies
        self._on_sent()


def log_results(tickets: Sequence[Ticket], slot: Slot | None) -> None:
    """A line for each result: of what was split over batches (no `slot`), only when it came and its rows."""
    now = time.monotonic()
    for ticket in tickets:
        started = ticket.turn.started
        access.info(
            "request",
            model=ticket.route.generation.model,
            code="OK",
            client=ticket.client.identity.hex(),
            id=ticket.id,
            rows=ticket.rows,
            total_ms=(now - started) * 1e3,
            waited_ms=None if slot is None else (slot.dispatched_at - started) * 1e3,
            batch_rows=None if slot is None else slot.rows,
        )
