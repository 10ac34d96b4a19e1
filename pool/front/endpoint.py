"""The endpoint: one ROUTER socket over an engine. Runs in the front, on its event loop.

The hot path is `_receive`: header look-up, tensor frames received straight into the open slot, one
ticket. Everything that is not a well-formed numeric PREDICT with room in the open slot goes the slow way
(`pool.front.admission`).

ZeroMQ's descriptor is edge-triggered: it signals a change, not a state. So after it signalled, and after
anything was sent, the socket is drained until it says EAGAIN; a bounded number of messages a turn, so
that neither workers nor timers wait behind a flood (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import zmq

from pool.config import ServerConfig
from pool.errors import Cancelled, PoolError, WireError
from pool.front.access import Access
from pool.front.admission import PRIORITIES, UNSAID, Admission, Refusals
from pool.front.binding import bind, listen_shared
from pool.front.clients import Client, Clients
from pool.front.columns import frame_size_error
from pool.front.connections import Connections
from pool.front.doorway import Doorway
from pool.front.engine import Engine
from pool.front.gate import Gate
from pool.front.generation import Generation
from pool.front.lines import Lines
from pool.front.logs import Log
from pool.front.outbound import MARK_BYTES, Outbound, Refusal
from pool.front.questions import Questions
from pool.front.regions import Regions
from pool.front.slots import Ticket
from pool.front.withdrawing import withdraw
from pool.packets import LINE_MAGIC
from pool.wire import FIXED_BYTES, HEAD, HEAD_BYTES, REGION_MAGIC, ROOM_MAGIC

log = Log("pool.endpoint")

# Messages a turn of the loop. 256 take about 1 ms: the most a worker's answer waits for the front.
_DRAIN_MAX = 256

# How many times a drain looks whether there is a message before it takes one. To be told by an exception that
# there is none costs 5 µs, to look 1: most drains find one message or none, and the others many.
_LOOKS = 2

# Messages waiting for one client, however small. One that does not read loses its replies beyond these.
_SEND_HIGH_WATER = 20_000

# Seconds. The kernel notices that a client's machine is gone; a client that is merely slow is not cut off.
# ZeroMQ's own heartbeats would do that: a peer whose queue is full does not answer them, nor one that
# speaks ZMTP 3.0; and they would go to local clients too, whose end the kernel tells at once.
_TCP_KEEPALIVE_IDLE_S, _TCP_KEEPALIVE_INTERVAL_S, _TCP_KEEPALIVE_COUNT = 10, 5, 3

_NOBLOCK = int(zmq.NOBLOCK)


class Endpoint:
    """The server's socket.

    Args:
        engine: Runs the requests.
        config: The `[server]` table.
        endpoints: Where to bind, resolved (`pool.endpoints`).
        describe: More of the front's part of the status document.
        passed: Sockets that listen there already, by endpoint (`pool.front.activation`).
        front: Its number among the fronts that listen at the same ports, from 0; None if there is but one.

    Attributes:
        endpoints: Where it listens, as asked for.
        bound: By endpoint: what that turned out to be.
        ask_status: Gives the status document; `status` unless somebody else knows more.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        endpoints: Sequence[str],
        describe: Callable[[], dict[str, Any]],
        passed: Mapping[str, int] | None = None,
        front: int | None = None,
    ) -> None:
        self._engine = engine
        self._describe_more = describe
        self._front = front
        self._config = config
        self.endpoints = tuple(endpoints)
        self._passed = dict(passed or {})
        self.bound: dict[str, str] = {}
        self._loop = asyncio.get_running_loop()
        # One I/O thread: `pool.front.clients` rests on the order in which it tells of things.
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        # A client that is gone or does not read is an error here, not silence.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.SNDHWM, _SEND_HIGH_WATER)
        # ZeroMQ ends the connection of whoever sends more than this. So that a client that goes a little
        # too far is told rather than cut off, it is left room beyond the limit.
        self._router.setsockopt(zmq.MAXMSGSIZE, 2 * config.max_message_bytes)
        self._router.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._router.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _TCP_KEEPALIVE_IDLE_S)
        self._router.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _TCP_KEEPALIVE_INTERVAL_S)
        self._router.setsockopt(zmq.TCP_KEEPALIVE_CNT, _TCP_KEEPALIVE_COUNT)
        mark_bytes = min(MARK_BYTES, config.max_unread_bytes // 4)
        self._clients = Clients(mark_bytes)
        self._outbound = Outbound(
            self._router, engine, self._clients, config.max_unread_bytes, mark_bytes, self._again
        )
        self._access = Access(config)
        self._regions = Regions()
        self.ask_status: Callable[[], Awaitable[dict[str, Any]]] = self.status
        self._questions = Questions(engine, config, self._outbound, lambda: self.ask_status())
        self._admission = Admission(
            self._router, engine, config.max_message_bytes, self._outbound, self._regions, self._questions
        )
        self._lines = Lines(engine, self._clients, self._admission, config.max_unread_bytes, self._look_after)
        self._gate = Gate(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._doorway = Doorway(
            {
                REGION_MAGIC: self._regions.take,
                ROOM_MAGIC: self._regions.take,
                LINE_MAGIC: self._lines.take,
            },
            self._access.is_allowed,
            self._gate.has_room,
        )
        self._connections: Connections | None = None
        engine.on_unserved.append(self._forget_routes)
        self._fd = -1
        self._is_scheduled = False
        self._started_at = time.monotonic()

    def open(self) -> None:
        """Bind and start to answer.

        Raises:
            ConfigError: an address cannot be bound; the sentence says which and why.
        """
        self._connections = Connections(
            self._router, self._clients, self._gate, self._access.bar, self._withdraw
        )
        self._access.open(self._context)
        for endpoint in sorted(self.endpoints, key=lambda e: e.startswith("tcp://")):
            self._access.secure(self._router, endpoint)
            passed = self._passed.pop(endpoint, None)
            is_lent = passed is not None
            if not is_lent and self._front is not None and endpoint.startswith("tcp://"):
                passed = listen_shared(endpoint, is_first=self._front == 0)
            bind(self._router, endpoint, self._config, passed)
            if endpoint.startswith("ipc://"):
                self._gate.add(endpoint.removeprefix("ipc://"), is_lent=is_lent)
            bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
            self._access.check_bound(endpoint, bound)
            self.bound[endpoint] = bound
            self._doorway.listen(endpoint)
        self._fd = int(self._router.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._again()

    def close(self) -> None:
        """Send what lines and ZeroMQ still hold (for at most 1 s each), unbind, remove the socket files."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        self._engine.on_unserved.remove(self._forget_routes)
        self._questions.close()
        self._doorway.close()
        self._lines.close()
        self._regions.close()
        if self._connections is not None:
            self._connections.close()
        self._router.close(linger=1000)
        self._gate.remove()
        self._access.close()
        self._context.term()

    @property
    def requests(self) -> int:
        """Predictions admitted."""
        return self._admission.admitted

    def describe(self) -> dict[str, Any]:
        """The endpoint's part of the status document (`docs/operations.md` 8)."""
        return {
            "uptime_s": time.monotonic() - self._started_at,
            "endpoints": list(self.endpoints),
            "clients": len(self._clients),
            "requests": self.requests,
            "replies": self._outbound.replies,
            "dropped_replies": self._outbound.dropped,
            "errors": self._outbound.errors,
            "lines": self._clients.lines,
            "regions": self._regions.describe(),
            "authorized_keys": self._access.authorized,
            "refused_connections": self._access.refused,
            **self._describe_more(),
        }

    async def status(self) -> dict[str, Any]:
        """The status document (`docs/operations.md` 8)."""
        document = await self._engine.status()
        document["front"] |= self.describe()
        return document

    def apply(self, config: ServerConfig) -> None:
        """Take over what of a new configuration can be changed while the socket is open."""
        self._access.apply(config)

    def _forget_routes(self) -> None:
        self._admission.routes.clear()
        self._clients.forget_idle_accounts()

    # -- the fast way -------------------------------------------------------------------------------

    def _again(self) -> None:
        """Look at the socket in the next turn of the loop: its descriptor may not signal again."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._is_scheduled = False
        if self._router.closed:
            return
        try:
            self._receive()
        except Exception:
            # What is left of a message must not be taken for another; and nothing else may call again.
            log.defect("cannot handle a message")
            self._skip_frames()
            self._again()
        self._look_after()

    def _receive(self) -> None:
        """Take what has come, a drain's worth at most."""
        router = self._router
        recv, recv_into, get = router.recv, router.recv_into, router.get
        more, noblock, unpack, fixed = zmq.RCVMORE, _NOBLOCK, HEAD.unpack_from, FIXED_BYTES
        events, readable = zmq.EVENTS, int(zmq.POLLIN)
        routes, numbered, priorities, monotonic = (
            self._admission.routes,
            self._clients.numbered,
            PRIORITIES,
            time.monotonic,
        )
        refusals: Refusals = {}
        touched: Generation | None = None
        admitted = flushed = 0
        turn = self._engine.turn
        now = turn.started = turn.ended = monotonic()
        budget = _DRAIN_MAX
        few = budget - _LOOKS
        try:
            while budget > 0:
                if budget > few and not int(get(events)) & readable:
                    break
                budget -= 1
                try:
                    identity = recv(noblock)
                except zmq.Again:
                    break
                client = numbered.get(identity)
                if client is not None:
                    header = recv(noblock)
                else:
                    client, header = self._meet(identity)
                    if client is None:
                        self._skip_frames()
                        continue
                    if client.barred:
                        self._admission.receive(client, header, now)
                        continue
                route = routes.get(header[fixed:])
                priority = priorities.get(header[:HEAD_BYTES])
                if route is None or priority is None or not route.is_direct:
                    budget -= self._admission.receive(client, header, now)
                    turn = self._engine.turn
                    continue
                generation = route.generation
                if generation is not touched:
                    if touched is not None:
                        turn = self._engine.flush(touched, admitted - flushed)
                        flushed = admitted
                    touched = generation
                _, id_, timeout_ms, rows = unpack(header)
                if rows != 1 and (rows == 0 or not route.is_batched):
                    self._admission.receive(client, header, now)
                    turn = self._engine.turn
                    continue
                batcher = generation.batcher
                key = route.key if priority == UNSAID else route.keys[priority]
                patience = timeout_ms * 1e-3 or route.timeout_s
                account = client.accounts.get(generation) or client.account(generation)
                slot = None
                if patience >= batcher.expected_s and account.rows + rows <= route.inflight_rows:
                    slot = generation.open_slot(key, route.capacity)
                if slot is None:
                    ticket = Ticket(
                        self._outbound, client, id_, route, rows, now + patience, turn, key, account
                    )
                    self._refuse_overload(ticket, header, now, refusals)
                    turn = self._engine.turn
                    continue
                if rows > slot.capacity - slot.rows:
                    batcher.abandon(slot)
                    self._admission.receive(client, header, now)
                    turn = self._engine.turn
                    continue
                start = slot.rows
                view = generation.views[slot.index]
                fault: PoolError | None = None
                for offset, row_bytes in route.inputs:
                    if not get(more):
                        fault = WireError(
                            f"fewer tensor frames than the {len(route.inputs)} the header names"
                        )
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
                    self._outbound.refuse(client, id_, fault, generation.metrics)
                    continue
                admitted += 1
                ticket = Ticket(self._outbound, client, id_, route, rows, now + patience, turn, key, account)
                batcher.commit(slot, ticket, now)
                if slot.rows == slot.capacity:  # a full batch need not wait for the end of the drain
                    turn = self._engine.flush(generation, admitted - flushed)
                    now, flushed = turn.started, admitted
            else:
                self._again()
        finally:
            if touched is not None:
                self._admission.admitted += admitted
                self._engine.flush(touched, admitted - flushed)

    def _meet(self, identity: bytes) -> tuple[Client | None, bytes]:
        """The header of a message, and the client it is from if that is still there."""
        assert self._connections is not None, "the endpoint is open"
        frame = self._router.recv(_NOBLOCK, copy=False)
        return self._connections.meet(identity, frame), frame.bytes

    def _refuse_overload(self, ticket: Ticket, header: bytes, now: float, refusals: Refusals) -> None:
        """Refuse a request that there is no room for, with the sentence made for another one like it."""
        refusal = self._admission.find_refusal(ticket, now, refusals)
        if refusal is None:
            self._admission.receive(ticket.client, header, now)
            return
        self._skip_frames()
        self._outbound.refuse_alike(ticket.client, ticket.id, refusal)

    def _skip_frames(self) -> None:
        router = self._router
        nothing = bytearray()
        while router.get(zmq.RCVMORE):
            router.recv_into(nothing, flags=_NOBLOCK)

    # -- what is not wanted any more ------------------------------------------------------------------

    def _look_after(self) -> None:
        """Messages were taken, or clients lost."""
        if (self._admission.has_cancelled or self._clients.gone) and not self._router.closed:
            self._withdraw()

    def _withdraw(self) -> None:
        """See to the cancels of a drain, and to the clients that have left meanwhile."""
        cancelled = self._admission.take_cancelled()
        gone = self._clients.take_gone()
        if cancelled or any(client.has_rows for client in gone):
            refusal = Refusal(Cancelled("withdrawn by its client"), None)
            for ticket in withdraw(self._engine, cancelled):
                ticket.route.generation.metrics.answered(refusal.code)
                self._outbound.refuse_alike(ticket.client, ticket.id, refusal)
