"""The endpoint: one ROUTER socket over an engine. Runs in the front, on its event loop.

The hot path is `_receive`: header look-up, tensor frames received straight into the open slot, one
ticket. Everything that is not a well-formed numeric PREDICT with room in the open slot goes the slow way.

ZeroMQ's descriptor is edge-triggered: it signals a change, not a state. So after it signalled, and after
anything was sent, the socket is drained until it says EAGAIN; a bounded number of messages a turn, so
that neither workers nor timers wait behind a flood (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from pool import wire
from pool.config import ServerConfig
from pool.errors import Cancelled, InternalError, InvalidInput, Overloaded, PoolError, TooLarge, WireError
from pool.front.access import Access
from pool.front.binding import bind
from pool.front.bundles import Bundles
from pool.front.clients import Client, Clients
from pool.front.columns import frame_size_error
from pool.front.connections import Connections
from pool.front.engine import Engine
from pool.front.gate import Gate
from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.metrics import ModelMetrics
from pool.front.outbound import MARK_BYTES, Outbound, Refusal
from pool.front.questions import Questions
from pool.front.regions import Regions, private
from pool.front.route import Route
from pool.front.slots import LANES, Ticket
from pool.front.timelines import Timelines
from pool.front.withdrawing import withdraw
from pool.wire import FIXED_BYTES, HEAD, HEAD_BYTES, Flag, Header, Kind, PredictMeta

log = Log("pool.endpoint")

# Messages a turn of the loop. 256 take about 1 ms: the most a worker's answer waits for the front.
_DRAIN_MAX = 256

# A request in a bundle costs the front about a sixth of one alone.
_BUNDLE_DISCOUNT = 6

# Messages waiting for one client, however small. One that does not read loses its replies beyond these.
_SEND_HIGH_WATER = 20_000

# Seconds. The kernel notices that a client's machine is gone; a client that is merely slow is not cut off.
# ZeroMQ's own heartbeats would do that: a peer whose queue is full does not answer them, nor one that
# speaks ZMTP 3.0; and they would go to local clients too, whose end the kernel tells at once.
_TCP_KEEPALIVE_IDLE_S, _TCP_KEEPALIVE_INTERVAL_S, _TCP_KEEPALIVE_COUNT = 10, 5, 3

# Distinct request headers remembered; each is about 1 kB.
_ROUTES_MAX = 4096

_NOBLOCK = int(zmq.NOBLOCK)

_REGION = int(Flag.REGION)

# The first bytes of requests that may go the fast way, and their priorities.
_UNSAID = LANES  # the model's own
_PRIORITIES = {wire.head(Kind.PREDICT): _UNSAID} | {
    wire.head(Kind.PREDICT, Flag.PRIORITY, priority): priority for priority in range(LANES)
}

# Refusals of one drain, by what makes their sentences differ.
_Refusals = dict[tuple[Route, int, bool, Client | None], Refusal]


class Endpoint:
    """The server's socket.

    Args:
        engine: Runs the requests.
        config: The `[server]` table.
        endpoints: Where to bind, resolved (`pool.endpoints`).
        describe: More of the front's part of the status document.
        passed: Sockets that listen there already, by endpoint (`pool.front.activation`).

    Attributes:
        requests: Predictions admitted.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        endpoints: Sequence[str],
        describe: Callable[[], dict[str, Any]],
        passed: Mapping[str, int] | None = None,
    ) -> None:
        self._engine = engine
        self._describe_more = describe
        self._config = config
        self.endpoints = tuple(endpoints)
        self._passed = dict(passed or {})
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
        self._bundles = Bundles(self._outbound)
        self._timelines = Timelines(self._outbound)
        self._access = Access(config)
        self._regions = Regions(self._access.is_allowed)
        self._questions = Questions(engine, config, self._outbound, self.describe)
        self._connections: Connections | None = None
        self._cancelled: dict[Client, set[int]] = {}
        self._gate = Gate(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._routes: dict[bytes, Route] = {}
        engine.on_unserved.append(self._forget_routes)
        self._fd = -1
        self._is_scheduled = False
        self.requests = 0
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
            path = bind(self._router, endpoint, self._config, self._passed.pop(endpoint, None))
            if path is not None:
                self._gate.add(path)
            self._access.check_bound(endpoint, self._router.getsockopt_string(zmq.LAST_ENDPOINT))
            self._regions.listen(endpoint)
        self._fd = int(self._router.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._again()

    def close(self) -> None:
        """Send what ZeroMQ still holds (for at most 1 s), unbind and remove the socket files."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        self._engine.on_unserved.remove(self._forget_routes)
        self._questions.close()
        self._regions.close()
        if self._connections is not None:
            self._connections.close()
        self._router.close(linger=1000)
        self._gate.remove()
        self._access.close()
        self._context.term()

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
            "regions": self._regions.describe(),
            "authorized_keys": self._access.authorized,
            "refused_connections": self._access.refused,
            **self._describe_more(),
        }

    def apply(self, config: ServerConfig) -> None:
        """Take over what of a new configuration can be changed while the socket is open."""
        self._access.apply(config)

    def _forget_routes(self) -> None:
        self._routes.clear()
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
        if self._cancelled or self._clients.gone:
            self._withdraw()

    def _receive(self) -> None:
        """Take what has come, a drain's worth at most."""
        router = self._router
        recv, recv_into, get = router.recv, router.recv_into, router.get
        more, noblock, unpack, fixed = zmq.RCVMORE, _NOBLOCK, HEAD.unpack_from, FIXED_BYTES
        routes, numbered, priorities, monotonic = (
            self._routes,
            self._clients.numbered,
            _PRIORITIES,
            time.monotonic,
        )
        refusals: _Refusals = {}
        touched: Generation | None = None
        admitted = flushed = 0
        turn = self._engine.turn
        now = turn.started = turn.ended = monotonic()
        budget = _DRAIN_MAX
        try:
            while budget > 0:
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
                        self._receive_slowly(client, header, now)
                        continue
                route = routes.get(header[fixed:])
                priority = priorities.get(header[:HEAD_BYTES])
                if route is None or priority is None or not route.is_numeric:
                    budget -= self._receive_slowly(client, header, now)
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
                    self._receive_slowly(client, header, now)
                    turn = self._engine.turn
                    continue
                batcher = generation.batcher
                key = route.key if priority == _UNSAID else route.keys[priority]
                patience = timeout_ms * 1e-3 or route.timeout_s
                account = client.accounts.get(generation) or client.account(generation)
                slot = None
                if patience >= batcher.expected_s and account.rows + rows <= route.inflight_rows:
                    slot = batcher.open_slot(key, route.capacity)
                if slot is None:
                    ticket = Ticket(
                        self._outbound, client, id_, route, rows, now + patience, turn, key, account
                    )
                    self._refuse_overload(ticket, header, now, refusals)
                    turn = self._engine.turn
                    continue
                if rows > slot.capacity - slot.rows:
                    batcher.abandon(slot)
                    self._receive_slowly(client, header, now)
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
                self.requests += admitted
                self._engine.flush(touched, admitted - flushed)

    def _meet(self, identity: bytes) -> tuple[Client | None, bytes]:
        """The header of a message, and the client it is from if that is still there."""
        assert self._connections is not None, "the endpoint is open"
        frame = self._router.recv(_NOBLOCK, copy=False)
        return self._connections.meet(identity, frame), frame.bytes

    def _refuse_overload(self, ticket: Ticket, header: bytes, now: float, refusals: _Refusals) -> None:
        """Refuse a request that there is no room for, with the sentence made for another one like it."""
        route: Route = ticket.route
        client: Client = ticket.client
        is_late = ticket.deadline - now < route.generation.batcher.expected_s
        is_over = not is_late and ticket.account.rows + ticket.rows > route.inflight_rows
        alike = (route, ticket.rows, is_late, client if is_over else None)
        refusal = refusals.get(alike)
        if refusal is None:
            try:
                route.generation.check_rows(route, ticket.rows)
                route.generation.check_room(ticket, now)
            except Overloaded as e:
                refusal = refusals[alike] = Refusal(e, route.generation.metrics)
            except PoolError:
                pass
        if refusal is None:  # too large; or, by a rounding error, in time after all
            self._receive_slowly(client, header, now)
            return
        self._skip_frames()
        self._outbound.refuse_alike(client, ticket.id, refusal)

    def _skip_frames(self) -> None:
        router = self._router
        nothing = bytearray()
        while router.get(zmq.RCVMORE):
            router.recv_into(nothing, flags=_NOBLOCK)

    # -- the slow way -------------------------------------------------------------------------------

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

    def _receive_slowly(self, client: Client, header: bytes, now: float) -> int:
        """Any message: the rest of its frames is received, and it is answered or admitted.

        Returns:
            How many requests it stands for beyond the first, as far as the time they take goes.
        """
        frames = self._receive_frames()
        try:
            decoded = wire.decode_header(header)
        except PoolError as e:
            self._outbound.refuse(client, wire.peek_id(header) or 0, e, self._engine.unknown)
            return 0
        try:
            is_bundle = decoded.kind is Kind.PREDICT and decoded.flags & Flag.BUNDLE
            if not is_bundle and decoded.kind is not Kind.CANCEL:
                client.check_access()
            if decoded.flags & _REGION and decoded.kind is Kind.PREDICT:
                frames = self._regions.resolve(decoded, frames)
            if is_bundle:
                return self._admit_bundle(client, decoded, frames, now) // _BUNDLE_DISCOUNT
            if decoded.kind is Kind.PREDICT:
                self._admit(client, decoded, frames, now)
            elif frames:
                raise WireError(f"{decoded.kind.name} with {len(frames)} tensor frames; wanted none")
            elif decoded.kind is Kind.CANCEL:
                self._cancelled.setdefault(client, set()).add(decoded.id)
            else:
                self._questions.answer(client, decoded)
        except PoolError as e:
            self._outbound.refuse(client, decoded.id, e, self._metrics_of(decoded))
        except Exception as e:
            log.defect("cannot handle a message")
            defect = InternalError(f"{type(e).__name__} while handling the request")
            self._outbound.refuse(client, decoded.id, defect, self._metrics_of(decoded))
        return 0

    def _metrics_of(self, header: Header) -> ModelMetrics | None:
        """What counts the refusal of this message; None if it is no prediction."""
        if header.kind is not Kind.PREDICT:
            return None
        route = self._routes.get(header.meta)
        if route is not None:
            return route.generation.metrics
        try:
            model = self._engine.models.get(wire.decode_meta(PredictMeta, header.meta).model)
        except WireError:
            model = None
        return self._engine.unknown if model is None else model.metrics

    def _find_route(self, meta: bytes) -> Route:
        route = self._routes.get(meta)
        if route is None:
            route = self._engine.resolve(wire.decode_meta(PredictMeta, meta))
            if len(self._routes) >= _ROUTES_MAX:
                self._routes.clear()
            self._routes[meta] = route
        return route

    def _admit(self, client: Client, header: Header, frames: list[memoryview], now: float) -> None:
        self._check_sizes(frames)
        route = self._find_route(header.meta)
        deadline = now + (header.millis * 1e-3 or route.timeout_s)
        account, key = client.account(route.generation), _key(route, header)
        turn = self._engine.turn
        sink: Outbound | Timelines = self._outbound
        if header.flags & Flag.TIMELINE:  # in a turn of its own, which began after the message came
            turn, sink = self._engine.flush(route.generation, 0), self._timelines
        ticket = Ticket(sink, client, header.id, route, header.rows, deadline, turn, key, account)
        tensors: Sequence[memoryview | bytes] = frames
        if header.flags & _REGION and not route.is_numeric:
            tensors = private(frames, route.regions)
        route.generation.place(ticket, tensors, now)
        self.requests += 1
        self._engine.flush(route.generation, 1)

    def _admit_bundle(self, client: Client, header: Header, frames: list[memoryview], now: float) -> int:
        """Admit or refuse each request of a bundle; gives how many there were (`docs/wire.md` 3.9)."""
        parts = wire.split_parts(frames[0] if frames else b"", header.rows)
        try:
            client.check_access()
            self._check_sizes(frames[1:])
            route = self._find_route(header.meta)
            if not (route.is_batched and route.is_numeric):
                raise InvalidInput("a bundle of requests with string inputs, or to a signature not batched")
            key, account, sink = _key(route, header), client.account(route.generation), self._bundles
            turn = self._engine.turn
            tickets = [
                Ticket(
                    sink,
                    client,
                    id_,
                    route,
                    rows,
                    now + (millis * 1e-3 or route.timeout_s),
                    turn,
                    key,
                    account,
                )
                for id_, millis, rows in parts
            ]
            refused = route.generation.place_all(tickets, frames[1:], now)
        except PoolError as e:
            metrics = self._metrics_of(header) or self._engine.unknown
            self._outbound.refuse_bundled(client, [id_ for id_, _, _ in parts], e, metrics)
            return len(parts)
        admitted = len(parts)
        for error, alike in refused:
            self._outbound.refuse_bundled(
                client, [ticket.id for ticket in alike], error, route.generation.metrics
            )
            admitted -= len(alike)
        self.requests += admitted
        self._engine.flush(route.generation, admitted)
        return len(parts)

    # -- what is not wanted any more ------------------------------------------------------------------

    def _withdraw(self) -> None:
        """See to the cancels of a drain, and to the clients that have left meanwhile."""
        cancelled, self._cancelled = self._cancelled, {}
        gone = self._clients.take_gone()
        if cancelled or any(client.has_rows for client in gone):
            refusal = Refusal(Cancelled("withdrawn by its client"), None)
            for ticket in withdraw(self._engine, cancelled):
                ticket.route.generation.metrics.answered(refusal.code)
                self._outbound.refuse_alike(ticket.client, ticket.id, refusal)


def _key(route: Route, header: Header) -> int:
    """What the request shares with those it may run with."""
    return route.keys[header.priority] if header.flags & Flag.PRIORITY else route.key
