"""The application's own requests: from arrays to rows in slots, and back to futures. Application's process.

What a client and the front do for a request without what lies between them. The arrays are checked and cast
by the client's `Route`, as they would be there; the rows are placed as `pool.front.endpoint` does it; a
finished batch is copied out once, and each request's future gets its rows of that.

What is asked for in one turn of the loop is looked at by the batcher together, in the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from pool import wire
from pool.client.conversion import Array, check_cast
from pool.client.core import ClientCore, ModelInfo, check_model, check_priority
from pool.client.reply import SLICED_BYTES, decode_outputs, make_plan
from pool.client.route import COPY_BYTES, Frame, remember
from pool.client.route import Route as Encoding
from pool.errors import Cancelled, PoolError, error_from_code
from pool.front.clients import Client
from pool.front.engine import Engine
from pool.front.generation import Generation
from pool.front.replies import Compound, Reply
from pool.front.route import Route
from pool.front.slots import Slot, Ticket
from pool.front.timelines import timeline_of, timeline_of_several
from pool.front.withdrawing import withdraw
from pool.signature import numpy_dtype
from pool.wire import Header, Kind, PredictMeta, ResultMeta, TimelineMeta


class Timed(dict[str, Array]):
    """Outputs, and the stages their rows went through."""

    def __init__(self, outputs: dict[str, Array], timeline: TimelineMeta) -> None:
        super().__init__(outputs)
        self.timeline = timeline


# A future never gets an exception: one that nobody waits for any more then goes without a word.
Answer = dict[str, Array] | PoolError
Future = asyncio.Future[Answer]

_Call = tuple[str, int | None, str | None, tuple[str, ...] | None]

# Of an output of fixed size: name, dtype, shape of a row, where it begins in the slot, bytes of a row.
_Column = tuple[str, "np.dtype[Any]", tuple[int, ...], int, int]

_ndarray = np.ndarray  # one look-up instead of two, for each request


class _Way:
    """One way of calling a model: how inputs are encoded, and where they go.

    Attributes:
        encoding: Checks and casts.
        routes: Of a sole input: by its row shape.
    """

    __slots__ = ("encoding", "routes")

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.routes: dict[tuple[int, ...], Route] = {}


class Calls:
    """Predictions, and the sink of their answers. Make it inside a running event loop.

    Args:
        engine: Runs them.
        cast: Which casts are made unasked (`pool.client.conversion.to_array`).

    Raises:
        InvalidInput: `cast` is not known.

    Attributes:
        requests: Admitted.
        replies: Answered with a result.
        errors: Not answered so, by code.
    """

    def __init__(self, engine: Engine, cast: str) -> None:
        self._engine = engine
        self._cast = check_cast(cast)
        self._core = ClientCore(cast=cast)
        self._loop = asyncio.get_running_loop()
        self._timelines = _Timelines(self)
        self._self = Client(b"", -1, 0)  # the application is one client among others
        self._ways: dict[_Call, _Way] = {}
        self._routes: dict[bytes, Route] = {}
        self._columns: dict[Reply, list[_Column]] = {}
        self._touched: dict[Generation, int] = {}  # with the requests placed there in this turn
        self._given_up: set[Future] = set()
        self.requests = 0
        self.replies = 0
        self.errors: dict[str, int] = {}
        engine.on_unserved.append(self._forget)

    # -- asking -------------------------------------------------------------------------------------

    def begin(
        self,
        model: str,
        inputs: Any,
        version: int | None,
        signature: str | None,
        outputs: tuple[str, ...] | None,
        cast: str | None,
        priority: int | None,
        patience: float,
        timeline: bool,
    ) -> Future:
        """Place a request; its future gets the answer, whatever that is.

        Args:
            model: And the others: as for `ClientCore.request`.
            inputs: Copied before this returns.
            version: Of the model.
            signature: Of the model.
            outputs: Names.
            cast: Overrides the calls' own.
            priority: 0 to 3.
            patience: Seconds the caller waits; `inf` for as long as the model's configuration says.
            timeline: Whether the answer is to be `Timed`.

        Raises:
            PoolError: it is refused; the same errors as of a server, for the same reasons.
        """
        way = self._ways.get((model, version, signature, outputs))
        if way is None:
            way = self._find_way((model, version, signature, outputs))
        encoding = way.encoding
        route: Route | None = None
        frames: list[Frame]
        array = inputs
        if type(array) is dict and len(array) == 1:
            array = array.get(encoding.sole_name)
        if type(array) is _ndarray and array.dtype is encoding.sole_dtype:
            shape = array.shape
            route = way.routes.get(shape[1:])
            if route is not None:
                if shape and shape[0] <= encoding.max_rows and array.nbytes <= COPY_BYTES:
                    rows, frames = shape[0], [array.tobytes()]
                else:
                    route = None
        if route is None:
            rows, pattern, frames = encoding.encode(inputs, self._cast if cast is None else check_cast(cast))
            route = self._find_route(pattern.meta)
            if encoding.sole_dtype is not None:
                remember(way.routes, route.regions[0].shape, route)
        key = route.key if priority is None else route.keys[check_priority(priority)]
        if patience == inf:
            patience = route.timeout_s
        return self._place(route, key, rows, frames, patience, timeline)

    def _find_way(self, call: _Call) -> _Way:
        model, version, _, _ = call
        encoding = self._core.route(*call)
        if encoding is None:
            check_model(model, version)
            self.learn(model, version)
            encoding = self._core.route(*call)
            assert encoding is not None, "just learnt"
        way = _Way(encoding)
        remember(self._ways, call, way)
        return way

    def _find_route(self, meta: bytes) -> Route:
        route = self._routes.get(meta)
        if route is None:
            route = self._engine.resolve(wire.decode_meta(PredictMeta, meta))
            remember(self._routes, meta, route)
        return route

    def learn(self, model: str, version: int | None) -> ModelInfo:
        """What a model takes and gives.

        Raises:
            ModelNotFound · VersionNotFound · Unavailable: it is not served.
        """
        document = self._engine.find(model, version).describe()
        document["max_frame_bytes"] = self._engine.config.server.max_message_bytes
        return self._core.learn(model, version, document)

    def _forget(self) -> None:
        for model in {call[0] for call in self._ways}:
            self._core.forget(model)
        self._ways.clear()
        self._routes.clear()
        self._columns.clear()
        accounts = self._self.accounts
        self._self.accounts = {with_: account for with_, account in accounts.items() if account.rows}

    def _place(
        self, route: Route, key: int, rows: int, frames: list[Frame], patience: float, timeline: bool
    ) -> Future:
        """As `Endpoint` does: straight into the open slot if it has room, else the general way."""
        future: Future = self._loop.create_future()
        now = time.monotonic()
        generation = route.generation
        account = self._self.accounts.get(generation) or self._self.account(generation)
        turn = self._engine.turn
        sink: Calls | _Timelines = self
        if timeline:  # in a turn of its own, which begins now
            turn, sink = self._engine.flush(generation, self._touched.pop(generation, 0)), self._timelines
        elif not self._touched:
            turn.started = turn.ended = now
        ticket = Ticket(sink, self._self, future, route, rows, now + patience, turn, key, account)
        slot: Slot | None = None
        if (
            route.is_direct
            and (rows == 1 or (rows > 0 and route.is_batched))
            and patience >= generation.batcher.expected_s
            and account.rows + rows <= route.inflight_rows
            and not generation.poison
        ):
            slot = generation.open_slot(key, route.capacity)
            if slot is not None and rows > slot.capacity - slot.rows:
                generation.batcher.abandon(slot)
                slot = None
        if slot is None:
            try:
                generation.place(ticket, frames, now)
            except PoolError as e:
                self._count(generation, e.code)
                raise
        else:
            view, start = generation.views[slot.index], slot.rows
            for (offset, row_bytes), frame in zip(route.inputs, frames, strict=True):
                at = offset + start * row_bytes
                view[at : at + rows * row_bytes] = frame
            generation.batcher.commit(slot, ticket, now)
        self.requests += 1
        if not self._touched:
            self._loop.call_soon(self._flush)
        placed = self._touched.get(generation, 0) + 1
        if slot is not None and slot.rows == slot.capacity:  # a full batch need not wait for the next turn
            self._engine.flush(generation, placed)
            placed = 0
        self._touched[generation] = placed
        return future

    def _flush(self) -> None:
        touched, self._touched = self._touched, {}
        for generation, admitted in touched.items():
            if admitted:
                self._engine.flush(generation, admitted)

    # -- answers (Sink) -----------------------------------------------------------------------------

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Copy rows out of a finished slot, and give each future its own."""
        generation = tickets[0].route.generation
        self.answered(generation, len(tickets))
        view = generation.views[slot.index]
        if reply.numeric is None or reply.flags:
            for ticket in tickets:
                payloads = reply.payloads(view, ticket.start, ticket.rows)
                _answer(ticket.id, _decode(reply, ticket.rows, payloads))
            return
        columns = self._columns.get(reply)
        if columns is None:
            columns = _columns(reply)
            remember(self._columns, reply, columns)
        first, last = tickets[0].start, tickets[-1].start + tickets[-1].rows
        if (last - first) * reply.row_bytes > SLICED_BYTES:
            for ticket in tickets:
                _answer(ticket.id, _copy(view, columns, ticket.start, ticket.start + ticket.rows))
            return
        # Slices of one array: a caller that keeps a single one of them keeps at most so much.
        arrays = list(_copy(view, columns, first, last).items())
        for ticket in tickets:
            start = ticket.start - first
            end = start + ticket.rows
            future: Future = ticket.id
            if not future.done():  # done: cancelled, and not withdrawn yet
                future.set_result({name: array[start:end] for name, array in arrays})

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """A result joined from several batches."""
        self.answered(ticket.route.generation, 1)
        _answer(ticket.id, _decode(reply, ticket.rows, frames))

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Many may share an error. Each gets one of its own: whoever raises it writes a traceback into it."""
        self._count(ticket.route.generation, error.code)
        own = error_from_code(error.code, error.message, retry_after_ms=error.retry_after_ms)
        _answer(ticket.id, own)

    def answered(self, generation: Generation, count: int) -> None:
        """Count results."""
        self.replies += count
        generation.metrics.answered("OK", count)

    def _count(self, generation: Generation, code: str) -> None:
        generation.metrics.answered(code)
        self.errors[code] = self.errors.get(code, 0) + 1

    # -- what is not wanted any more ----------------------------------------------------------------

    def give_up(self, future: Future) -> None:
        """Nobody waits for it any more: its rows are withdrawn, in the next turn, with all others."""
        if not self._given_up:
            self._loop.call_soon(self._withdraw)
        self._given_up.add(future)

    def _withdraw(self) -> None:
        given_up, self._given_up = self._given_up, set()
        for ticket in withdraw(self._engine, {self._self: given_up}):
            self._count(ticket.route.generation, Cancelled.code)

    def close(self) -> None:
        """Answer all that is under way `Cancelled`."""
        self._engine.on_unserved.remove(self._forget)
        self._touched.clear()
        requests = [
            part.sink.whole if isinstance(part.sink, Compound) else part
            for _, part in self._engine.unsettled()
        ]
        requests += [execution.whole for execution in self._engine.pipelines.executions]
        self._given_up |= {request.id for request in requests if request.client is self._self}
        for future in self._given_up:
            if not future.done():
                future.set_result(Cancelled("the pool was closed"))
        self._withdraw()


class _Timelines:
    """The sink of requests that ask for their time line. They are rare and need not be fast.

    Args:
        calls: Counts the answers.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.send_error = calls.send_error

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Give each future its rows, with the stages they went through."""
        for ticket in tickets:
            payloads = reply.payloads(ticket.route.generation.views[slot.index], ticket.start, ticket.rows)
            self._send(ticket, _decode(reply, ticket.rows, payloads), timeline_of(ticket, slot))

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """A result joined from several batches."""
        self._send(ticket, _decode(reply, ticket.rows, frames), timeline_of_several(ticket))

    def _send(self, ticket: Ticket, outputs: dict[str, Array], timeline: TimelineMeta) -> None:
        self._calls.answered(ticket.route.generation, 1)
        _answer(ticket.id, Timed(outputs, timeline))


def _answer(future: Future, answer: Answer) -> None:
    if not future.done():  # done: cancelled, and not withdrawn yet
        future.set_result(answer)


def _decode(reply: Reply, rows: int, payloads: Sequence[memoryview | bytes]) -> dict[str, Array]:
    """Any result; the payloads are copied."""
    plan = make_plan(Header(Kind.RESULT, 0, reply.meta, rows=rows, flags=reply.flags))
    return decode_outputs(plan, [b"", *map(bytes, payloads)])


def _columns(reply: Reply) -> list[_Column]:
    assert reply.numeric is not None, "rows of a fixed size"
    tensors = wire.decode_meta(ResultMeta, reply.meta).outputs
    return [
        (tensor.name, numpy_dtype(tensor.dtype), tensor.shape, offset, row_bytes)
        for tensor, (offset, row_bytes) in zip(tensors, reply.numeric, strict=True)
    ]


def _copy(view: memoryview, columns: list[_Column], start: int, end: int) -> dict[str, Array]:
    """Rows of a slot, as arrays of their own."""
    return {
        name: np.ndarray((end - start, *shape), dtype, bytearray(view[offset + start * n : offset + end * n]))
        for name, dtype, shape, offset, n in columns
    }
