"""Requests out and replies back: the connection, queue and deadlines of an `AsyncClient`. Client process.

One connection carries everything. The loop watches ZeroMQ's file descriptor itself (`zmq.asyncio` costs
three times as much per request), which is edge-triggered: it says once that *something* changed. So
every wake-up drains the socket until it is empty, and every send is followed by another look. (A
connection's line is an ordinary socket beside it, drained in the same breath.)

A request is a future in `_pending`, by id. It waits in `_unsent` until the loop's next turn, so that what
was asked for in this one is sent in bundles, and longer while there is no connection or the queue is
full. Whatever happens, a future gets a `Reply` and never an exception, so one that nobody waits for any
more goes without a word. Where the request was sent, its server is told: once a turn of the loop, for all
requests that were given up in it.

A server that says `Unavailable` while there is another endpoint takes no more requests: its connection is
retired. It stays open until the requests sent over it are answered; those that follow go elsewhere.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import zmq

from pool.client.connection import Connection
from pool.client.core import ClientCore, Request
from pool.client.curve import Keys
from pool.client.deadlines import Deadlines
from pool.client.dial import Dial, Preference, not_connected
from pool.client.line import Line
from pool.client.region import IDLE_S
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
        preference: The endpoints, dialled when there is something to send.
        keys: For those that are secured; None for none.
        connect_timeout: Longest to wait for one of them, in seconds.
        is_local: As of `Connection`.
    """

    def __init__(
        self,
        core: ClientCore,
        preference: Preference,
        keys: Keys | None,
        connect_timeout: float,
        is_local: bool = True,
    ) -> None:
        self._core = core
        self._keys = keys
        self._preference = preference
        self._connect_timeout = connect_timeout
        self._is_local = is_local
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._connection: Connection | None = None
        self._line: Line | None = None  # of a connection that is, or was, the one above; listened to
        self._retired: dict[Connection, set[int]] = {}  # with the requests sent over them, by id
        self._dial: Dial | None = None
        self._dial_timers: list[asyncio.TimerHandle] = []
        self._trim_timer: asyncio.TimerHandle | None = None
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._unsent: deque[Request] = deque()
        self._withdrawn: list[int] = []  # given up since the last look, whether or not they were sent
        self._is_look_scheduled = False
        self._deadlines = Deadlines(self._pending)
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._closing: asyncio.Future[None] | None = None  # for those who pause

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
        id_ = request.id
        future: asyncio.Future[Reply] = loop.create_future()
        self._pending[id_] = future
        if deadline != math.inf:
            self._set_deadline(deadline, id_, timeout)
        self._send(request)
        try:
            return await future
        except asyncio.CancelledError:
            # A late reply, and a request that was not sent yet, now find nobody and are dropped.
            if self._pending.pop(id_, None) is not None:
                self._withdraw(id_)
            raise

    async def pause(self, seconds: float) -> None:
        """Sleep for at least so long; not longer than until the client is closed."""
        if self._closing is None:
            self._closing = self.running_loop().create_future()
        await asyncio.wait((self._closing,), timeout=seconds + _TIMER_SLACK)

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
        self._stop_dialling()
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        for connection in (self._connection, *self._retired):
            if connection is not None:
                self._drop(connection)
        self._connection = None
        self._retired.clear()
        self._unsent.clear()
        self._withdrawn.clear()
        self._fail(list(self._pending), Cancelled("the client was closed"))
        if self._closing is not None and not self._closing.get_loop().is_closed():
            self._closing.set_result(None)
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

    def _fail(self, ids: Iterable[int], error: PoolError) -> None:
        for id_ in ids:
            self._answer(Reply(id_, error=error_from_code(error.code, error.message)))

    def _fail_unsent(self, error: PoolError) -> None:
        ids = [request.id for request in self._unsent]
        self._unsent.clear()
        self._fail(ids, error)

    # -- sending -----------------------------------------------------------------------------------

    def _send(self, request: Request) -> None:
        self._unsent.append(request)
        if self._connection is not None:
            self._schedule_look()
        elif self._dial is None:
            self._start_dial()

    def _send_unsent(self, connection: Connection) -> None:
        self._send_withdrawals()  # first: while it can still be told what was sent, and over which connection
        pending = self._pending
        wanted: list[Request] = []
        for request in self._unsent:
            future = pending.get(request.id)
            if future is None:
                continue
            if future.done():  # cancelled, but its task has not run yet
                del pending[request.id]
            else:
                wanted.append(request)
        self._unsent.clear()
        sent = 0
        try:
            for frames, count in self._core.bundle(wanted):
                connection.send(frames)
                sent += count
        except zmq.Again:
            self._unsent.extend(wanted[sent:])
        if connection.line is not None and connection.line is not self._line:
            assert self._loop is not None
            self._line = connection.line
            self._loop.add_reader(self._line.fileno(), self._on_readable, connection)
        self._schedule_look()

    def _withdraw(self, id_: int) -> None:
        self._withdrawn.append(id_)
        self._schedule_look()

    def _send_withdrawals(self) -> None:
        """Tell the servers which of their requests nobody waits for any more, as far as they take it now."""
        if not self._withdrawn:
            return
        unsent = {request.id for request in self._unsent}
        withdrawn = [id_ for id_ in self._withdrawn if id_ not in unsent]
        self._withdrawn.clear()
        for id_ in withdrawn:
            connection = self._connection_of(id_)
            if connection is not None:
                self._retired.get(connection, set()).discard(id_)
                with suppress(zmq.Again):
                    connection.cancel(self._core.cancel(id_))

    def _connection_of(self, id_: int) -> Connection | None:
        """The connection that a request was sent over, if that still stands."""
        for connection, owed in self._retired.items():
            if id_ in owed:
                return connection
        return self._connection

    # -- receiving ---------------------------------------------------------------------------------

    def _schedule_look(self) -> None:
        """Look again soon: once for all sends of this turn of the loop, any of which may swallow the edge."""
        if not self._is_look_scheduled:
            self._is_look_scheduled = True
            assert self._loop is not None
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_look_scheduled = False
        self._send_withdrawals()
        connection = self._connection
        if connection is not None and self._unsent and connection.has_room():
            self._send_unsent(connection)
        for connection in (self._connection, *self._retired):
            if connection is not None and self._is_ours(connection) and connection.has_message():
                self._on_readable(connection)
        self._release_retired()

    def _on_readable(self, connection: Connection) -> None:
        if not self._is_ours(connection):
            return
        try:
            taken = 0
            while taken < _DRAIN_CHUNK:
                taken += self._take_replies(connection)
            self._schedule_look()
        except zmq.Again:
            if connection.line is not None and connection.line.is_lost:
                self._on_monitor(connection)
            elif self._unsent and connection is self._connection:
                self._send_unsent(connection)
        except WireError as e:
            self._hang_up(connection, e)
        self._release_retired()

    def _on_monitor(self, connection: Connection) -> None:
        if not self._is_ours(connection) or not connection.is_broken():
            return
        try:
            while True:  # what the server still sent before it went away counts
                self._take_replies(connection)
        except zmq.Again:
            gone = Unavailable(f"the server at {connection.endpoint} went away before it answered")
            self._hang_up(connection, gone)
        except WireError as e:
            self._hang_up(connection, e)

    def _take_replies(self, connection: Connection) -> int:
        """Hand out the replies of the next message; their number.

        Raises:
            zmq.Again: there is no message.
            WireError: the message is of no use, nor is the connection any more.
        """
        replies = self._core.receive_all(connection.receive())
        is_unavailable = False
        for reply in replies:
            self._answer(reply)
            if reply.error is not None:
                is_unavailable |= isinstance(reply.error, Unavailable)
        if connection in self._retired:
            self._retired[connection].difference_update([reply.id for reply in replies])
        if is_unavailable:
            self._leave(connection)
        return len(replies)

    # -- connections -------------------------------------------------------------------------------

    def _start_dial(self) -> None:
        assert self._loop is not None
        if self._context is None:
            self._context = zmq.Context()
        try:
            now = self._loop.time()
            self._dial = Dial(self._context, self._preference, self._keys, now, self._is_local)
        except Unavailable as e:
            self._fail_unsent(e)
            return
        for connection in self._dial.connections:
            self._loop.add_reader(connection.monitor.fileno(), self._on_dialled)
        self._loop.call_soon(self._on_dialled)
        self._dial_timers.append(self._loop.call_later(self._connect_timeout, self._give_up_dialling))
        if self._dial.decides_at != math.inf:
            when = self._dial.decides_at + _TIMER_SLACK
            self._dial_timers.append(self._loop.call_at(when, self._on_dialled))

    def _on_dialled(self) -> None:
        assert self._loop is not None
        if self._dial is None:
            return
        connection = self._dial.take(self._loop.time())
        if connection is None:
            if self._dial.is_refused:
                self._give_up_dialling()
            return
        self._stop_dialling()
        self._connection = connection
        self._loop.add_reader(connection.socket.fileno(), self._on_readable, connection)
        self._loop.add_reader(connection.monitor.fileno(), self._on_monitor, connection)
        self._loop.call_soon(self._on_monitor, connection)
        self._trim()
        self._send_unsent(connection)

    def _trim(self) -> None:
        """Look now and then whether the connection's shared memory is still of use."""
        assert self._loop is not None
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        if self._connection is not None:
            self._connection.regions.trim()
            self._trim_timer = self._loop.call_later(IDLE_S, self._trim)

    def _give_up_dialling(self) -> None:
        assert self._dial is not None, "its timer is cancelled with it"
        error = not_connected(self._dial, self._connect_timeout, math.inf)
        self._stop_dialling()
        self._fail_unsent(error)

    def _stop_dialling(self) -> None:
        for timer in self._dial_timers:
            timer.cancel()
        self._dial_timers.clear()
        if self._dial is not None:
            for connection in self._dial.connections:
                self._drop(connection)
            self._dial = None

    def _is_ours(self, connection: Connection) -> bool:
        return connection is self._connection or connection in self._retired

    def _leave(self, connection: Connection) -> None:
        """Send what is asked for from now on elsewhere, if there is an elsewhere."""
        assert self._loop is not None
        now = self._loop.time()
        self._preference.avoid(connection.endpoint, now)
        if connection is self._connection and self._preference.has_better(connection.endpoint, now):
            self._send_withdrawals()
            self._retire(connection)
            if self._unsent:
                self._start_dial()

    def _retire(self, connection: Connection) -> None:
        owed = self._pending.keys() - {request.id for request in self._unsent}
        self._retired[connection] = owed.difference(*self._retired.values())
        self._connection = None

    def _release_retired(self) -> None:
        """Close retired connections over which nothing is to come any more."""
        for connection in [each for each, owed in self._retired.items() if not owed]:
            del self._retired[connection]
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.remove_reader(connection.socket.fileno())
            self._loop.remove_reader(connection.monitor.fileno())
            if connection.line is not None:
                self._loop.remove_reader(connection.line.fileno())
        connection.close()

    def _hang_up(self, connection: Connection, error: PoolError) -> None:
        """Drop a connection, and answer the requests sent over it with the error."""
        assert self._loop is not None
        self._preference.avoid(connection.endpoint, self._loop.time())
        self._send_withdrawals()
        if connection is self._connection:
            self._retire(connection)
        owed = self._retired.pop(connection)
        self._drop(connection)
        self._fail(owed, error)
        if self._unsent and self._connection is None and self._dial is None:
            self._start_dial()

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
        for id_, timeout in self._deadlines.take_overdue(self._loop.time() + _TIMER_SLACK):
            connection = self._connection_of(id_)
            where = connection.endpoint if connection else ", ".join(self._preference.endpoints)
            self._answer(Reply(id_, error=DeadlineExceeded(f"no answer from {where} within {timeout:g} s")))
            self._withdraw(id_)
        when = self._deadlines.next()
        if when is not None:
            self._set_alarm(when)
