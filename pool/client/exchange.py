"""Requests out and replies back: the connection, queue and deadlines of an `AsyncClient`. Client process.

One DEALER carries everything. The loop watches ZeroMQ's file descriptor itself (`zmq.asyncio` costs
three times as much per request), which is edge-triggered: it says once that *something* changed. So
every wake-up drains the socket until it is empty, and every send is followed by another look.

A request is a future in `_pending`, by id. It waits in `_unsent` until the loop's next turn, so that what
was asked for in this one is sent in bundles, and longer while there is no connection or the queue is
full. Whatever happens, a future gets a `Reply` and never an exception, so one that nobody waits for any
more goes without a word.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence

import zmq

from pool.client.connection import Connection, not_connected
from pool.client.core import ClientCore, Request
from pool.client.deadlines import Deadlines
from pool.client.reply import Reply
from pool.errors import Cancelled, DeadlineExceeded, PoolError, Unavailable, WireError, error_from_code

# Replies taken in one go before the loop runs something else: about 1 ms.
_DRAIN_CHUNK = 256

# Seconds. Loops count timers in milliseconds and may ring this much early.
_TIMER_SLACK = 0.001


class Exchange:
    """Sends requests and brings each its reply. Belongs to the loop that first uses it.

    Args:
        core: Makes messages of requests, and replies of messages.
        endpoints: Dialled all at once when there is something to send; the first that answers is used.
        connect_timeout: Longest to wait for one of them, in seconds.
    """

    def __init__(self, core: ClientCore, endpoints: Sequence[str], connect_timeout: float) -> None:
        self._core = core
        self._endpoints = endpoints
        self._connect_timeout = connect_timeout
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._connection: Connection | None = None
        self._dialled: list[Connection] = []  # of which the first to answer becomes the connection
        self._dial_timer: asyncio.TimerHandle | None = None
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._unsent: deque[Request] = deque()
        self._is_look_scheduled = False
        self._deadlines = Deadlines(self._pending)
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0

    async def reply_to(self, request: Request, timeout: float, deadline: float) -> Reply:
        """Send a request and wait for its reply, which may be one that this end made up.

        Args:
            request: As the core made it.
            timeout: What the caller allowed for its whole call, in seconds.
            deadline: The end of that, on the loop's clock.

        Raises:
            Cancelled: the client is closed.
        """
        loop = self.running_loop()
        id_ = request[0]
        future: asyncio.Future[Reply] = loop.create_future()
        self._pending[id_] = future
        if deadline != math.inf:
            self._set_deadline(deadline, id_, timeout)
        self._send(request)
        try:
            return await future
        except asyncio.CancelledError:
            # A late reply, and a request that was not sent yet, now find nobody and are dropped.
            self._pending.pop(id_, None)
            raise

    def running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop this runs in, which is the client's from the first time on.

        Raises:
            Cancelled: the client is closed.
            RuntimeError: it was another loop the first time.
        """
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

    def close(self) -> None:
        """Close the connection; requests under way are answered `Cancelled`."""
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
        self._deadlines.add(when, id_, timeout)
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
        where = self._connection.endpoint if self._connection else ", ".join(self._endpoints)
        for id_, timeout in self._deadlines.take_overdue(self._loop.time() + _TIMER_SLACK):
            self._answer(Reply(id_, error=DeadlineExceeded(f"no answer from {where} within {timeout:g} s")))
        when = self._deadlines.next()
        if when is not None:
            self._set_alarm(when)
