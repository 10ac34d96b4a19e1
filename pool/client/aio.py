"""`AsyncClient`: the asyncio shell over the core. Client process; runs on asyncio's loop and on uvloop.

One DEALER carries everything. The loop watches ZeroMQ's file descriptor itself (`zmq.asyncio` costs
three times as much per request), which is edge-triggered: it says once that *something* changed. So
every wake-up drains the socket until it is empty, and every send is followed by another look.

A request is a future in `_pending`, by id. It waits in `_unsent` until the loop's next turn, so that what
was asked for in this one is sent in bundles, and longer while there is no connection or the queue is
full. Deadlines are a heap with one timer for the earliest: a timer per
request costs more than sending it. Whatever happens, a future gets a `Reply` and never an exception,
so one that nobody waits for any more goes without a word.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import zmq

from pool.client.connection import Connection, endpoints_of, not_connected
from pool.client.conversion import Array
from pool.client.core import (
    ClientCore,
    ModelInfo,
    Reply,
    Request,
    check_timeout,
    read_flag,
    read_models,
    timeout_to_ms,
)
from pool.errors import Cancelled, DeadlineExceeded, PoolError, Unavailable, WireError, error_from_code

# Replies taken in one go before the loop runs something else: about 1 ms.
_DRAIN_CHUNK = 256

# Deadlines of answered requests stay in the heap until they outnumber the others and this many.
_STALE_DEADLINES = 256

# Seconds. Loops count timers in milliseconds and may ring this much early.
_TIMER_SLACK = 0.001


class AsyncClient:
    """An asyncio client of a pool server. Any number of tasks of one loop may share one.

    Args:
        endpoint: `ipc:///path` or `tcp://host:port` of the server; a list of those is tried all at
            once and the first in it that answers is used; None for `default_endpoint()`.
        timeout: Longest a call may take, in seconds, unless it says otherwise; `math.inf` for ever.
        connect_timeout: Longest to wait for a server to be there, in seconds.
        cast: `"safe"` makes lossless casts of inputs only (int32 to int64, float32 to float64);
            `"same_kind"` also float64 to float32 and the like.

    Raises:
        ConfigError: an endpoint is not well formed.
        InvalidInput: `cast` is neither.

    Nothing is connected until the first call, whose loop is the client's from then on. Use it as an
    async context manager, or await `close`. Arrays passed in must not change until the call returns.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | None = None,
        *,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        cast: str = "safe",
    ) -> None:
        self._endpoints = endpoints_of(endpoint)
        self._timeout = check_timeout(timeout)
        self._timeout_ms = timeout_to_ms(timeout)
        self._connect_timeout = check_timeout(connect_timeout)
        self._core = ClientCore(cast=cast)
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._connection: Connection | None = None
        self._dialled: list[Connection] = []  # of which the first to answer becomes the connection
        self._dial_timer: asyncio.TimerHandle | None = None
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._unsent: deque[Request] = deque()
        self._is_look_scheduled = False
        self._deadlines: list[tuple[float, int, float]] = []  # heap: when, id, the timeout it came from
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0

    # -- calls -------------------------------------------------------------------------------------

    async def predict(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        signature: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        cast: str | None = None,
    ) -> dict[str, Array]:
        """Run a model on a batch of rows; cancelling the call gives the request up.

        Args:
            model: Name of the model.
            inputs: Name -> array of shape [rows, ...]; a bare array if the model has one input. A
                single example needs its row axis (`x[None]`). Strings are `bytes` or `str`.
            version: None for the version the server prefers.
            signature: None for `serving_default`, or the only one.
            outputs: Names of those wanted; None for all.
            timeout: Seconds for this call; None for the client's own.
            cast: For this call; None for the client's own.

        Returns:
            Name -> array of shape [rows, ...], writable and the caller's own. Strings are object
            arrays of `bytes`.

        Raises:
            InvalidInput: an input has a wrong name, dtype, rank or shape (nothing was sent);
                TooLarge if it has too many rows.
            ModelNotFound, VersionNotFound, SignatureNotFound: there is no such thing to call.
            ModelError: the model raised. WorkerLost: its process died.
            Overloaded: no room; try again after `retry_after_ms`.
            DeadlineExceeded: the timeout passed first.
            Unavailable: no server at the endpoint, or it went away.
            Cancelled: the client was closed.
            WireError: what answered is not a pool server of this protocol.
            InternalError: a defect in the server.
        """
        timeout_ms = self._timeout_ms
        if timeout is None:
            timeout = self._timeout
        else:
            timeout_ms = timeout_to_ms(check_timeout(timeout))
        request = self._core.request(
            model,
            inputs,
            version=version,
            signature=signature,
            outputs=outputs,
            timeout_ms=timeout_ms,
            cast=cast,
        )
        while request is None:
            began = self._running_loop().time()
            await self._learn(model, version, timeout)
            timeout = check_timeout(timeout - (self._running_loop().time() - began))
            request = self._core.request(
                model,
                inputs,
                version=version,
                signature=signature,
                outputs=outputs,
                timeout_ms=timeout_to_ms(timeout),
                cast=cast,
            )
        reply = await self._exchange(request, timeout)
        if reply.error is not None:
            self._core.note_refusal(model, reply.error)
        return reply.take_outputs()

    async def signature(
        self, model: str, version: int | None = None, *, timeout: float | None = None
    ) -> ModelInfo:
        """What a model takes and gives, asked of the server anew.

        Raises:
            ModelNotFound, VersionNotFound: there is no such model.
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._learn(model, version, self._timeout if timeout is None else check_timeout(timeout))

    async def models(self, *, timeout: float | None = None) -> dict[str, dict[str, Any]]:
        """The models served: name -> `version`, `ready`, `signatures` (names).

        Raises:
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return read_models(await self._ask(self._core.models_request(), timeout))

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The server's status document: what `pool status --json` prints.

        Raises:
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._ask(self._core.status_request(), timeout)

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether a server answers; False if none does within the timeout.

        The timeout is `connect_timeout` unless given.

        Raises:
            Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._ask_flag(self._core.live_request(), "live", timeout)

    async def ready(self, model: str | None = None, *, timeout: float | None = None) -> bool:
        """Whether the model, or with None every model, can answer now; False if no server answers.

        The timeout is `connect_timeout` unless given.

        Raises:
            ModelNotFound: the server has no such model.
            Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._ask_flag(self._core.ready_request(model), "ready", timeout)

    async def close(self) -> None:
        """Close the connection; calls under way raise `Cancelled`."""
        if self._closed:
            return
        self._closed = True
        self._hang_up(Cancelled("the client was closed"))
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._deadlines.clear()
        if self._context is not None:
            self._context.term()  # its sockets are closed and linger for nothing: does not block
            self._context = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- one request, one reply --------------------------------------------------------------------

    async def _learn(self, model: str, version: int | None, timeout: float) -> ModelInfo:
        reply = await self._exchange(self._core.signature_request(model, version), timeout)
        return self._core.learn(model, version, reply.take_document())

    async def _ask(self, request: Request, timeout: float | None) -> dict[str, Any]:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        return (await self._exchange(request, timeout)).take_document()

    async def _ask_flag(self, request: Request, flag: str, timeout: float | None) -> bool:
        try:
            document = await self._ask(request, self._connect_timeout if timeout is None else timeout)
        except (Unavailable, DeadlineExceeded):
            return False
        return read_flag(document, flag)

    async def _exchange(self, request: Request, timeout: float) -> Reply:
        loop = self._running_loop()
        id_ = request[0]
        future: asyncio.Future[Reply] = loop.create_future()
        self._pending[id_] = future
        if timeout != math.inf:
            self._set_deadline(loop.time() + timeout, id_, timeout)
        self._send(request)
        try:
            return await future
        except asyncio.CancelledError:
            # A late reply, and a request that was not sent yet, now find nobody and are dropped.
            self._pending.pop(id_, None)
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError(
                    "this AsyncClient belongs to another event loop; wanted one client per loop"
                )
            self._loop = loop
        if self._closed:
            raise Cancelled("the client is closed")
        return loop

    def _answer(self, reply: Reply) -> None:
        future = self._pending.pop(reply.id, None)
        if future is not None and not future.done():  # done: cancelled, but its task has not run yet
            future.set_result(reply)

    # -- sending -----------------------------------------------------------------------------------

    def _send(self, request: Request) -> None:
        self._unsent.append(request)
        if self._connection is not None:
            self._schedule_look()
        elif not self._dialled:
            self._dial()

    def _send_unsent(self, connection: Connection) -> None:
        pending = self._pending
        wanted = [request for request in self._unsent if request[0] in pending]
        self._unsent.clear()
        sent = 0
        try:
            for frames, count in self._core.bundle(wanted):
                connection.send(frames)
                sent += count
        except zmq.Again:
            self._unsent.extend(wanted[sent:])
        self._schedule_look()

    # -- receiving ---------------------------------------------------------------------------------

    def _schedule_look(self) -> None:
        """Look again soon: once for all sends of this turn of the loop, any of which may swallow the edge."""
        if not self._is_look_scheduled:
            self._is_look_scheduled = True
            assert self._loop is not None
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_look_scheduled = False
        connection = self._connection
        if connection is None:
            return
        if self._unsent and connection.has_room():
            self._send_unsent(connection)
        if connection.has_message():
            self._on_readable(connection)

    def _on_readable(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        try:
            taken = 0
            while taken < _DRAIN_CHUNK:
                replies = self._core.receive_all(connection.receive())
                for reply in replies:
                    self._answer(reply)
                taken += len(replies)
            self._schedule_look()
        except zmq.Again:
            if self._unsent:
                self._send_unsent(connection)
        except WireError as e:
            self._hang_up(e)

    def _on_monitor(self, connection: Connection) -> None:
        if not connection.is_broken():
            return
        try:
            while True:  # what the server still sent before it went away counts
                for reply in self._core.receive_all(connection.receive()):
                    self._answer(reply)
        except zmq.Again:
            self._hang_up(Unavailable(f"the server at {connection.endpoint} went away before it answered"))
        except WireError as e:
            self._hang_up(e)

    # -- connections -------------------------------------------------------------------------------

    def _dial(self) -> None:
        assert self._loop is not None
        if self._context is None:
            self._context = zmq.Context()
        try:
            for endpoint in self._endpoints:
                self._dialled.append(Connection(self._context, endpoint))
        except Unavailable as e:
            self._hang_up(e)
            return
        for connection in self._dialled:
            self._loop.add_reader(connection.monitor.fileno(), self._on_dialled, connection)
            self._loop.call_soon(self._on_dialled, connection)
        self._dial_timer = self._loop.call_later(self._connect_timeout, self._give_up_dialling)

    def _on_dialled(self, connection: Connection) -> None:
        if connection not in self._dialled or not connection.is_connected():
            return
        assert self._loop is not None
        self._dialled.remove(connection)
        self._stop_dialling()
        self._connection = connection
        self._loop.add_reader(connection.socket.fileno(), self._on_readable, connection)
        self._loop.add_reader(connection.monitor.fileno(), self._on_monitor, connection)
        self._loop.call_soon(self._on_monitor, connection)
        self._send_unsent(connection)

    def _give_up_dialling(self) -> None:
        self._hang_up(not_connected(self._endpoints, self._connect_timeout, math.inf))

    def _stop_dialling(self) -> None:
        if self._dial_timer is not None:
            self._dial_timer.cancel()
            self._dial_timer = None
        for connection in self._dialled:
            self._drop(connection)
        self._dialled.clear()

    def _drop(self, connection: Connection) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.remove_reader(connection.socket.fileno())
            self._loop.remove_reader(connection.monitor.fileno())
        connection.close()

    def _hang_up(self, error: PoolError) -> None:
        """Drop every connection and answer every request under way with the error."""
        self._stop_dialling()
        if self._connection is not None:
            self._drop(self._connection)
            self._connection = None
        self._unsent.clear()
        for id_ in list(self._pending):
            self._answer(Reply(id_, error=error_from_code(error.code, error.message)))

    # -- deadlines ---------------------------------------------------------------------------------

    def _set_deadline(self, when: float, id_: int, timeout: float) -> None:
        deadlines = self._deadlines
        if len(deadlines) > 2 * len(self._pending) + _STALE_DEADLINES:
            deadlines[:] = [each for each in deadlines if each[1] in self._pending]
            heapq.heapify(deadlines)
        heapq.heappush(deadlines, (when, id_, timeout))
        if self._alarm is None or when < self._alarm_at:
            self._set_alarm(when)

    def _set_alarm(self, when: float) -> None:
        assert self._loop is not None
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = when
        self._alarm = self._loop.call_at(when, self._on_alarm)

    def _on_alarm(self) -> None:
        assert self._loop is not None
        self._alarm = None
        now = self._loop.time() + _TIMER_SLACK
        deadlines = self._deadlines
        while deadlines:
            when, id_, timeout = deadlines[0]
            if id_ in self._pending:
                if when > now:
                    self._set_alarm(when)
                    return
                where = self._connection.endpoint if self._connection else ", ".join(self._endpoints)
                self._answer(
                    Reply(id_, error=DeadlineExceeded(f"no answer from {where} within {timeout:g} s"))
                )
            heapq.heappop(deadlines)
