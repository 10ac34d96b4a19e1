"""Admission: every message that does not go a fast way. Runs in the front, on its event loop.

Requests with strings, of memory shared with their clients, with time lines, in bundles; those that do not fit
one slot or are not well-formed; questions and cancels. Each is answered, admitted or refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from pool import wire
from pool.errors import InternalError, InvalidInput, Overloaded, PoolError, TooLarge, WireError
from pool.front.bundles import Bundles
from pool.front.clients import Client
from pool.front.engine import Engine
from pool.front.logs import Log
from pool.front.metrics import ModelMetrics
from pool.front.outbound import Outbound, Refusal
from pool.front.parts import Parts
from pool.front.questions import Questions
from pool.front.regions import Loan, Regions, private
from pool.front.rooms import Room
from pool.front.route import Route
from pool.front.slots import LANES, Ticket
from pool.front.timelines import Timelines
from pool.wire import Flag, Header, Kind, PredictMeta

log = Log("pool.endpoint")

# A request in a bundle costs the front about a sixth of one alone.
_BUNDLE_DISCOUNT = 6

# Distinct request headers remembered; each is about 1 kB.
_ROUTES_MAX = 4096

# The first bytes of requests that may go a fast way, and their priorities.
UNSAID = LANES  # the model's own
PRIORITIES = {wire.head(Kind.PREDICT): UNSAID} | {
    wire.head(Kind.PREDICT, Flag.PRIORITY, priority): priority for priority in range(LANES)
}

_NOBLOCK = int(zmq.NOBLOCK)

# Plain numbers, because to join two members of a Python enum takes microseconds.
_BUNDLE, _PRIORITY, _REGION = map(int, (Flag.BUNDLE, Flag.PRIORITY, Flag.REGION))
_TIMELINE, _ROOM = map(int, (Flag.TIMELINE, Flag.ROOM))


# Refusals made in one go, by what makes their sentences differ.
Refusals = dict[tuple[Route, int, bool, "Client | None"], Refusal]


class Admission:
    """Takes messages: those of lines, and those of the socket whose header was received.

    Args:
        router: The endpoint's socket.
        engine: Runs the requests.
        max_frame_bytes: Largest tensor frame taken.
        outbound: Sends the replies.
        regions: Memory that clients share with the front.
        questions: Answers what is no prediction.

    Attributes:
        outbound: As above.
        routes: What request headers stand for, by their meta. The fast ways look here too.
        admitted: Predictions admitted, also those that went a fast way.
    """

    def __init__(
        self,
        router: zmq.Socket[bytes],
        engine: Engine,
        max_frame_bytes: int,
        outbound: Outbound,
        regions: Regions,
        questions: Questions,
    ) -> None:
        self._router = router
        self._engine = engine
        self._max_frame_bytes = max_frame_bytes
        self.outbound = outbound
        self._bundles = Bundles(outbound)
        self._timelines = Timelines(outbound)
        self._regions = regions
        self._questions = questions
        self.routes: dict[bytes, Route] = {}
        self._cancelled: dict[Client, set[int]] = {}
        self.admitted = 0

    @property
    def has_cancelled(self) -> bool:
        """Whether requests were withdrawn since `take_cancelled`."""
        return bool(self._cancelled)

    def take_cancelled(self) -> dict[Client, set[int]]:
        """The ids of requests that their clients have withdrawn since the last call."""
        cancelled, self._cancelled = self._cancelled, {}
        return cancelled

    def receive(self, client: Client, header: bytes, now: float) -> int:
        """A message of the socket: the rest of its frames is received, and it is taken.

        Returns:
            How many requests it stands for beyond the first, as far as the time they take goes.
        """
        return self.take(client, header, self._receive_frames(), now)

    def take(self, client: Client, header: bytes, frames: list[memoryview], now: float) -> int:
        """Any message: it is answered or admitted.

        Args:
            client: Whose it is.
            header: Its first frame.
            frames: The others; not kept.
            now: Monotonic seconds.

        Returns:
            As `receive`.
        """
        try:
            decoded = wire.decode_header(header)
        except PoolError as e:
            self.outbound.refuse(client, wire.peek_id(header) or 0, e, self._engine.unknown)
            return 0
        try:
            is_bundle = decoded.kind is Kind.PREDICT and decoded.flags & _BUNDLE
            if not is_bundle and decoded.kind is not Kind.CANCEL:
                client.check_access()
            loans: Sequence[Loan] = ()
            room: Room | None = None
            if is_bundle:
                return self._admit_bundle(client, decoded, frames, now) // _BUNDLE_DISCOUNT
            if decoded.kind is Kind.PREDICT:
                if decoded.flags & _ROOM:
                    room = self._take_room(frames)
                if decoded.flags & _REGION:
                    frames, loans = self._regions.resolve(frames)
                self._admit(client, decoded, frames, loans, room, now)
            elif frames:
                raise WireError(f"{decoded.kind.name} with {len(frames)} tensor frames; wanted none")
            elif decoded.kind is Kind.CANCEL:
                self._cancelled.setdefault(client, set()).add(decoded.id)
            else:
                self._questions.answer(client, decoded)
        except PoolError as e:
            self.outbound.refuse(client, decoded.id, e, self._metrics_of(decoded))
        except Exception as e:
            self.outbound.refuse(client, decoded.id, _defect(e), self._metrics_of(decoded))
        return 0

    def find_refusal(self, ticket: Ticket, now: float, refusals: Refusals) -> Refusal | None:
        """Why there is no room for a request; None if that has to be found out the general way.

        Args:
            ticket: In no slot.
            now: Monotonic seconds.
            refusals: Made for others; a new one is added.
        """
        route: Route = ticket.route
        generation = route.generation
        is_late = ticket.deadline - now < generation.batcher.expected_s
        is_over = not is_late and ticket.account.rows + ticket.rows > route.inflight_rows
        alike = (route, ticket.rows, is_late, ticket.client if is_over else None)
        refusal = refusals.get(alike)
        if refusal is None:
            try:
                generation.check_rows(route, ticket.rows)
                generation.check_room(ticket, now)
            except Overloaded as e:
                refusal = refusals[alike] = Refusal(e, generation.metrics)
            except PoolError:  # too large; or, without an error, in time after all, by a rounding error
                pass
        return refusal

    def _receive_frames(self) -> list[memoryview]:
        frames: list[memoryview] = []
        while self._router.get(zmq.RCVMORE):
            frame = self._router.recv(_NOBLOCK, copy=False).buffer
            if len(frames) <= wire.MAX_TENSORS:  # one too many is enough to refuse it
                frames.append(frame)
        return frames

    def _check_sizes(self, frames: Sequence[memoryview]) -> None:
        most = self._max_frame_bytes
        for i, frame in enumerate(frames):
            if len(frame) > most:
                raise TooLarge(f"tensor frame {i} has {len(frame)} bytes; the server takes at most {most}")

    def _metrics_of(self, header: Header) -> ModelMetrics | None:
        """What counts the refusal of this message; None if it is no prediction."""
        if header.kind is not Kind.PREDICT:
            return None
        route = self.routes.get(header.meta)
        if route is not None:
            return route.generation.metrics
        try:
            return self._engine.metrics_of(wire.decode_meta(PredictMeta, header.meta).model)
        except WireError:
            return self._engine.unknown

    def _find_route(self, meta: bytes) -> Route:
        route = self.routes.get(meta)
        if route is None:
            route = self._engine.resolve(wire.decode_meta(PredictMeta, meta))
            if len(self.routes) >= _ROUTES_MAX:
                self.routes.clear()
            self.routes[meta] = route
        return route

    def _take_room(self, frames: list[memoryview]) -> Room | None:
        """The room that the last frame refers to; it is taken off."""
        if not frames:
            raise WireError("no frame that says where the room is, which the header's flags announce")
        found = self._regions.find_room(frames.pop())
        return None if found is None else Room(self.outbound, self._regions, *found)

    def _admit(
        self,
        client: Client,
        header: Header,
        frames: list[memoryview],
        loans: Sequence[Loan],
        room: Room | None,
        now: float,
    ) -> None:
        self._check_sizes(frames)
        route = self._find_route(header.meta)
        deadline = now + (header.millis * 1e-3 or route.timeout_s)
        account, key = client.account(route.generation), _key(route, header)
        turn = self._engine.turn
        alone = self._bundles if header.flags & _REGION else self.outbound
        sink: Outbound | Bundles | Timelines | Room = room or alone
        if header.flags & _TIMELINE:  # in a turn of its own, which began after the message came
            turn, sink = self._engine.flush(route.generation, 0), self._timelines
        ticket = Ticket(sink, client, header.id, route, header.rows, deadline, turn, key, account)
        tensors: Sequence[memoryview | bytes] = frames
        if header.flags & _REGION and not route.is_numeric:
            tensors = private(frames, route.regions)
        route.generation.place(ticket, tensors, now, loans)
        self.admitted += 1
        self._engine.flush(route.generation, 1)

    def _admit_bundle(self, client: Client, header: Header, frames: list[memoryview], now: float) -> int:
        """Admit or refuse each request of a bundle; gives how many there were (`docs/wire.md` 3.9)."""
        table = frames[0] if frames else b""
        columns = wire.split_parts(table, header.rows)
        ids = columns[0]
        try:
            client.check_access()
            if header.flags & (_REGION | _ROOM):
                raise WireError("a bundle with references to a region; wanted tensors")
            self._check_sizes(frames[1:])
            route = self._find_route(header.meta)
            if not (route.is_batched and route.is_numeric):
                raise InvalidInput("a bundle of requests with string inputs, or to a signature not batched")
            account, turn = client.account(route.generation), self._engine.turn
            key = _key(route, header)
            parts = Parts(self._bundles, client, route, turn, key, account, table, columns, now)
            refused = route.generation.place_all(parts, frames[1:], now)
        except Exception as e:
            error = e if isinstance(e, PoolError) else _defect(e)
            metrics = self._metrics_of(header) or self._engine.unknown
            self.outbound.refuse_bundled(client, ids, error, metrics)
            return len(ids)
        admitted = len(ids)
        for error, of_these in refused:
            self.outbound.refuse_bundled(client, of_these, error, route.generation.metrics)
            admitted -= len(of_these)
        self.admitted += admitted
        self._engine.flush(route.generation, admitted)
        return len(ids)


def _defect(e: Exception) -> InternalError:
    """Log a defect, and give what its request is answered."""
    log.defect("cannot handle a message")
    return InternalError(f"{type(e).__name__} while handling the request")


def _key(route: Route, header: Header) -> int:
    """What the request shares with those it may run with."""
    return route.keys[header.priority] if header.flags & _PRIORITY else route.key
