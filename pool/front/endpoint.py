"""The endpoint: one ROUTER socket over an engine. Runs in the front, on its event loop.

The hot path is `_drain`: header look-up, tensor frames received straight into the open slot, one ticket.
Everything that is not a well-formed numeric PREDICT with room in the open slot goes the slow way.

ZeroMQ's descriptor is edge-triggered: it signals a change, not a state. So after it signalled, and after
anything was sent, the socket is drained until it says EAGAIN; a bounded number of messages a turn, so
that neither workers nor timers wait behind a flood (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zmq

from pool import wire
from pool.config import ServerConfig
from pool.errors import InternalError, InvalidInput, PoolError, TooLarge, WireError
from pool.front.binding import bind
from pool.front.bundles import Bundles
from pool.front.columns import frame_size_error
from pool.front.engine import Engine
from pool.front.generation import Generation
from pool.front.replies import Reply
from pool.front.route import Route
from pool.front.slots import Slot, Ticket
from pool.wire import FIXED_BYTES, HEAD, HEAD_BYTES, PART, Flag, Header, Kind, PredictMeta, SignatureMeta

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("pool.endpoint")

# Messages a turn of the loop. 256 take about 1 ms: the most a worker's answer waits for the front.
_DRAIN_MAX = 256

# A request in a bundle costs the front about a sixth of one alone.
_BUNDLE_DISCOUNT = 6

# Replies at least this large are sent from the slot without a copy. Below it, ZeroMQ's bookkeeping for
# a foreign buffer (a message object, a trip through pyzmq's collector thread) costs more than the copy.
ZERO_COPY_BYTES = 256 << 10

# Messages waiting for one client. One that does not read loses its replies beyond these.
_SEND_HIGH_WATER = 20_000

# Distinct request headers remembered; each is about 1 kB.
_ROUTES_MAX = 4096

_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_PREDICT = wire.head(Kind.PREDICT)


class Endpoint:
    """The server's socket.

    Args:
        engine: Runs the requests.
        config: The `[server]` table.
        endpoints: Where to bind, resolved (`pool.endpoints`).
    """

    def __init__(self, engine: Engine, config: ServerConfig, endpoints: Sequence[str]) -> None:
        self._engine = engine
        self._config = config
        self.endpoints = tuple(endpoints)
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        # A client that is gone or does not read is an error here, not silence.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.SNDHWM, _SEND_HIGH_WATER)
        # ZeroMQ ends the connection of whoever sends more than this. So that a client that goes a little
        # too far is told rather than cut off, it is left room beyond the limit.
        self._router.setsockopt(zmq.MAXMSGSIZE, 2 * config.max_message_bytes)
        # pyzmq's Python layer over send costs 0.65 µs a frame; what it would check does not apply here.
        self._send: Callable[..., Any] = super(zmq.Socket, self._router).send
        self._bundles = Bundles(self)
        self._socket_files: list[str] = []
        self._routes: dict[bytes, Route] = {}
        engine.on_unserved = self._routes.clear
        self._fd = -1
        self._is_scheduled = False
        self.requests = 0
        self.replies = 0
        self.dropped = 0
        self.errors: dict[str, int] = {}
        self._started_at = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Bind and start to answer.

        Raises:
            ConfigError: an address cannot be bound; the sentence says which and why.
        """
        for endpoint in self.endpoints:
            path = bind(self._router, endpoint, self._config.ipc_permissions)
            if path is not None:
                self._socket_files.append(path)
        self._fd = int(self._router.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._again()

    def close(self) -> None:
        """Send what ZeroMQ still holds (for at most 1 s), unbind and remove the socket files."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        self._router.close(linger=1000)
        for path in self._socket_files:
            with suppress(FileNotFoundError):
                os.unlink(path)
        self._context.term()

    # -- in -----------------------------------------------------------------------------------------

    def _again(self) -> None:
        """Look at the socket in the next turn of the loop: its descriptor may not signal again."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._is_scheduled = False
        router = self._router
        if router.closed:
            return
        recv, recv_into, get = router.recv, router.recv_into, router.get
        more, noblock, unpack, fixed = zmq.RCVMORE, _NOBLOCK, HEAD.unpack_from, FIXED_BYTES
        routes, monotonic = self._routes, time.monotonic
        touched: Generation | None = None
        admitted = 0
        now = monotonic()
        budget = _DRAIN_MAX
        while budget > 0:
            budget -= 1
            try:
                client = recv(noblock)
            except zmq.Again:
                break
            header = recv(noblock)
            route = routes.get(header[fixed:])
            if route is None or header[:HEAD_BYTES] != _PREDICT or not route.is_numeric:
                budget -= self._receive_slowly(client, header, now)
                continue
            generation = route.generation
            if generation is not touched:
                if touched is not None:
                    self._engine.flush(touched, now)
                touched = generation
            _, id_, timeout_ms, rows = unpack(header)
            if rows != 1 and (rows == 0 or not route.is_batched):
                self._receive_slowly(client, header, now)
                continue
            batcher = generation.batcher
            patience = timeout_ms * 1e-3 or route.timeout_s
            account = generation.accounts.get(client) or generation.account(client)
            if patience < batcher.expected_s or account.rows + rows > route.inflight_rows:
                self._receive_slowly(client, header, now)
                continue
            slot = batcher.open_slot(route.key, route.capacity)
            if slot is None or rows > slot.capacity - slot.rows:
                if slot is not None:
                    batcher.abandon(slot)
                self._receive_slowly(client, header, now)
                continue
            start = slot.rows
            view = generation.views[slot.index]
            fault: PoolError | None = None
            for offset, row_bytes in route.inputs:
                if not get(more):
                    fault = WireError(f"fewer tensor frames than the {len(route.inputs)} the header names")
                    break
                at = offset + start * row_bytes
                want = rows * row_bytes
                got = recv_into(view[at : at + want], flags=noblock)
                if got != want:
                    fault = frame_size_error(route, route.inputs.index((offset, row_bytes)), got, rows)
                    break
            if fault is None and get(more):
                fault = WireError(f"more tensor frames than the {len(route.inputs)} the header names")
            if fault is None and generation.poison:
                spans = [view[at + start * n : at + (start + rows) * n] for at, n in route.inputs]
                fault = generation.find_poison(route, spans, now)
            if fault is not None:
                self._skip_frames()
                batcher.abandon(slot)
                self._refuse(client, id_, fault)
                continue
            admitted += 1
            ticket = Ticket(self, client, id_, route, rows, now + patience, now, route.key, account)
            batcher.commit(slot, ticket, now)
            if slot.rows == slot.capacity:  # a full batch need not wait for the end of the drain
                now = monotonic()
                self._engine.flush(generation, now)
        else:
            self._again()
        if touched is not None:
            self.requests += admitted
            self._engine.flush(touched, now)

    def _skip_frames(self) -> None:
        while self._router.get(zmq.RCVMORE):
            self._router.recv(_NOBLOCK)

    def _receive_frames(self) -> list[memoryview]:
        frames: list[memoryview] = []
        while self._router.get(zmq.RCVMORE):
            frame = self._router.recv(_NOBLOCK, copy=False).buffer
            if len(frames) <= wire.MAX_TENSORS:  # one too many is enough to refuse it
                frames.append(frame)
        return frames

    def _check_sizes(self, frames: Sequence[memoryview]) -> None:
        most = self._config.max_message_bytes
        for i, frame in enumerate(frames):
            if len(frame) > most:
                raise TooLarge(f"tensor frame {i} has {len(frame)} bytes; the server takes at most {most}")

    def _receive_slowly(self, client: bytes, header: bytes, now: float) -> int:
        """Any message: the rest of its frames is received, and it is answered or admitted.

        Returns:
            How many requests it stands for beyond the first, as far as the time they take goes.
        """
        frames = self._receive_frames()
        try:
            decoded = wire.decode_header(header)
        except PoolError as e:
            self._refuse(client, wire.peek_id(header) or 0, e)
            return 0
        try:
            if decoded.kind is Kind.PREDICT and decoded.flags & Flag.BUNDLE:
                return self._admit_bundle(client, decoded, frames, now) // _BUNDLE_DISCOUNT
            if decoded.kind is Kind.PREDICT:
                self._admit(client, decoded, frames, now)
            elif frames:
                raise WireError(f"{decoded.kind.name} with {len(frames)} tensor frames; wanted none")
            else:
                self._inform(client, decoded)
        except PoolError as e:
            self._refuse(client, decoded.id, e)
        except Exception as e:
            log.exception("cannot handle a message")
            self._refuse(client, decoded.id, InternalError(f"{type(e).__name__} while handling the request"))
        return 0

    def _find_route(self, meta: bytes) -> Route:
        route = self._routes.get(meta)
        if route is None:
            route = self._engine.resolve(wire.decode_meta(PredictMeta, meta))
            if len(self._routes) >= _ROUTES_MAX:
                self._routes.clear()
            self._routes[meta] = route
        return route

    def _admit_bundle(self, client: bytes, header: Header, frames: list[memoryview], now: float) -> int:
        """Admit or refuse each request of a bundle; gives how many there were (`docs/wire.md` 3.9)."""
        parts = wire.split_parts(frames[0] if frames else b"", header.rows)
        try:
            self._check_sizes(frames[1:])
            route = self._find_route(header.meta)
            if not (route.is_batched and route.is_numeric):
                raise InvalidInput("a bundle of requests with string inputs, or to a signature not batched")
            key, account = route.key, route.generation.account(client)
            tickets = [
                Ticket(
                    self._bundles,
                    client,
                    id_,
                    route,
                    rows,
                    now + (millis * 1e-3 or route.timeout_s),
                    now,
                    key,
                    account,
                )
                for id_, millis, rows in parts
            ]
            refused = route.generation.place_all(tickets, frames[1:], now)
        except PoolError as e:
            for id_, _, _ in parts:
                self._refuse(client, id_, e)
            return len(parts)
        for ticket, error in refused:
            self._refuse(client, ticket.id, error)
        self.requests += len(parts) - len(refused)
        self._engine.flush(route.generation, now)
        return len(parts)

    def _admit(self, client: bytes, header: Header, frames: list[memoryview], now: float) -> None:
        self._check_sizes(frames)
        route = self._find_route(header.meta)
        deadline = now + (header.millis * 1e-3 or route.timeout_s)
        account = route.generation.account(client)
        ticket = Ticket(self, client, header.id, route, header.rows, deadline, now, route.key, account)
        route.generation.place(ticket, frames, now)
        self.requests += 1
        self._engine.flush(route.generation, now)

    # -- questions ----------------------------------------------------------------------------------

    def _inform(self, client: bytes, header: Header) -> None:
        engine = self._engine
        document: dict[str, Any]
        match header.kind:
            case Kind.LIVE:
                document = {"live": True}
            case Kind.READY:
                name = wire.decode_meta(SignatureMeta, header.meta).model
                models = engine.readiness()
                if name:
                    models = {name: models[engine.known(name)]}
                document = {"ready": all(models.values()), "models": models}
            case Kind.MODELS:
                document = {"models": engine.describe_models()}
            case Kind.SIGNATURE:
                wanted = wire.decode_meta(SignatureMeta, header.meta)
                document = engine.find(wanted.model, wanted.version).describe()
                document["max_frame_bytes"] = self._config.max_message_bytes
            case Kind.STATUS:
                task = self._loop.create_task(self._send_status(client, header.id))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            case _:
                raise WireError(f"{header.kind.name} is a reply, not a request")
        self._reply(client, header.id, document)

    async def _send_status(self, client: bytes, id_: int) -> None:
        document = await self._engine.status()
        document["front"] |= {
            "uptime_s": time.monotonic() - self._started_at,
            "endpoints": list(self.endpoints),
            "requests": self.requests,
            "replies": self.replies,
            "dropped_replies": self.dropped,
            "errors": self.errors,
        }
        if not self._router.closed:
            self._reply(client, id_, document)

    def _reply(self, client: bytes, id_: int, document: dict[str, Any]) -> None:
        self._send_payloads(
            client, wire.encode_header(Header(Kind.INFO, id_, wire.encode_info(document))), ()
        )

    # -- out (Sink) ---------------------------------------------------------------------------------

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send rows of a finished slot: small answers are copied, large ones leave from the slot itself."""
        generation = tickets[0].route.generation
        numeric, row_bytes_all = reply.numeric, reply.row_bytes
        head, meta, pack = reply.head, reply.meta, HEAD.pack
        view, send = generation.views[slot.index], self._send
        last = len(reply.row_shapes) - 1
        header_flags = _MORE if last >= 0 else _NOBLOCK
        sent = 0
        for ticket in tickets:
            rows = ticket.rows
            header = pack(head, ticket.id, 0, rows) + meta
            if numeric is None or rows * row_bytes_all >= ZERO_COPY_BYTES:
                payloads = self._payloads(generation, reply, slot, ticket.start, rows)
                self._send_payloads(ticket.client, header, payloads)
                continue
            try:
                send(ticket.client, _MORE)
            except zmq.ZMQError as e:
                self._drop(e)
                continue
            send(header, header_flags)
            start = ticket.start
            for i, (offset, row_bytes) in enumerate(numeric):
                at = offset + start * row_bytes
                send(view[at : at + rows * row_bytes], _MORE if i < last else _NOBLOCK)
            sent += 1
        self.replies += sent
        self._again()

    def send_bundle(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send the answers of tickets of one client, whose rows follow each other, in one message."""
        first, last = tickets[0], tickets[-1]
        rows = last.start + last.rows - first.start
        header = HEAD.pack(reply.bundle_head, 0, 0, rows) + reply.meta
        pack = PART.pack
        table = b"".join([pack(ticket.id, 0, ticket.rows) for ticket in tickets])
        payloads = self._payloads(first.route.generation, reply, slot, first.start, rows)
        self._send_payloads(first.client, header, [table, *payloads], len(tickets))

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """Send a result joined from several batches."""
        header = Header(Kind.RESULT, ticket.id, reply.meta, rows=ticket.rows, flags=reply.flags)
        self._send_payloads(ticket.client, wire.encode_header(header), frames)

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send the typed error a request ends with."""
        self._refuse(ticket.client, ticket.id, error)

    def _payloads(
        self, generation: Generation, reply: Reply, slot: Slot, start: int, rows: int
    ) -> list[memoryview | bytes | npt.NDArray[np.uint8]]:
        """The tensor frames for some rows: views of the slot, pinned if they are to be sent as they are."""
        if reply.numeric is None or rows * reply.row_bytes < ZERO_COPY_BYTES:
            return list(reply.payloads(generation.views[slot.index], start, rows))
        memory = generation.arena.slots[slot.index]
        payloads: list[memoryview | bytes | npt.NDArray[np.uint8]] = []
        for offset, row_bytes in reply.numeric:
            at = offset + start * row_bytes
            payload = memory[at : at + rows * row_bytes]
            self._engine.pin(generation, slot, payload)
            payloads.append(payload)
        return payloads

    def _send_payloads(
        self,
        client: bytes,
        header: bytes,
        payloads: Sequence[memoryview | bytes | npt.NDArray[np.uint8]],
        replies: int = 1,
    ) -> None:
        send = self._send
        try:
            send(client, _MORE)
        except zmq.ZMQError as e:
            self._drop(e, replies)
            return
        last = len(payloads) - 1
        send(header, _MORE if last >= 0 else _NOBLOCK)
        for i, payload in enumerate(payloads):
            flags = _MORE if i < last else _NOBLOCK
            # pyzmq itself copies what is below its own threshold (64 KiB), pinned or not.
            send(payload, flags, not isinstance(payload, np.ndarray))
        self.replies += replies
        self._again()

    def _refuse(self, client: bytes, id_: int, error: PoolError) -> None:
        self.errors[error.code] = self.errors.get(error.code, 0) + 1
        self._send_payloads(client, wire.encode_error(id_, error), ())

    def _drop(self, e: zmq.ZMQError, replies: int = 1) -> None:
        """The client is gone (EHOSTUNREACH) or does not read (EAGAIN): nobody waits for this reply."""
        if e.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
            raise e
        self.dropped += replies
