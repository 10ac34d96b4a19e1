"""One connection to one endpoint, and how it is heard to break. Client process.

ZeroMQ reconnects in silence, and a request that was under way then has no reply, ever. So each
connection watches its own socket's monitor; one that broke is closed and replaced, never used again.

The monitor also tells when a server is there. ZMQ_IMMEDIATE, the usual way to learn that, is not used:
when a connection ends it drops the replies that were received but not read yet (libzmq 4.3.5).

On the server's machine a connection gets a line beside its socket (`pool.client.line`). Messages go over
whichever takes them, replies come back the same way, and where one breaks both are given up.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import zmq

from pool import wire
from pool.client.curve import Keys
from pool.client.line import Approach, Line
from pool.client.region import SHARE_BYTES, Regions
from pool.client.route import Frame
from pool.endpoints import MAX_FRONTS, front_endpoint, side_path
from pool.errors import Unavailable, WireError
from pool.wire import Flag, Kind

# From here, to have ZeroMQ keep hold of a frame (a trip through pyzmq's collector thread) costs less than a
# copy of it, which also has the kernel find and clear new pages each time.
ZERO_COPY_BYTES = 256 << 10

_monitor_numbers = itertools.count(1)

_RESULT = bytes((Kind.RESULT,))
_ERROR_BUNDLE_HEAD = wire.head(Kind.ERROR, Flag.BUNDLE)

# Plain numbers, because to join two members of a Python enum takes as long as to queue a frame.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

# Seconds. The kernel notices that a server's machine is gone; a server that is merely slow is not cut off.
_TCP_KEEPALIVE_IDLE_S, _TCP_KEEPALIVE_INTERVAL_S, _TCP_KEEPALIVE_COUNT = 10, 5, 3

# A server that is starting is met soon after it listens, without burning CPU while it is not there.
_RECONNECT_MS, _RECONNECT_MAX_MS = 20, 200

# The socket comes first once in so many times, or a line that is never empty would keep its replies waiting.
_SOCKET_EVERY = 64

# What poll(2) takes; whoever wants to wait for longer waits again.
_LONGEST_WAIT_MS = 2**31 - 1

_EVENT = struct.Struct("=HI")  # which, and its value

# How a handshake may end other than well.
_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_FAILURES = (*_REFUSALS, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | functools.reduce(operator.or_, _FAILURES)


def choose_front(endpoint: str) -> str:
    """Which front of a server to meet: at `ipc://` each has a socket file, beside that of the first.

    Any of them, so that clients are spread over all. One that a dead front left is passed over; if there are
    no others, it is the endpoint itself. (At `tcp://` the kernel chooses.)
    """
    if not endpoint.startswith("ipc://"):
        return endpoint
    found = [front_endpoint(endpoint, number) for number in range(MAX_FRONTS)]
    found = [each for each in found if os.path.exists(each.removeprefix("ipc://"))]
    while found:
        chosen = found.pop(random.randrange(len(found)))
        if chosen == endpoint or _listens(chosen):
            return chosen
    return endpoint


def _listens(endpoint: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(endpoint.removeprefix("ipc://"))
        except BlockingIOError:  # it is only busy
            return True
        except OSError:
            return False
        return True


class Connection:
    """A DEALER socket and its monitor, and perhaps a line.

    Args:
        context: Of the sockets.
        endpoint: Where to connect: to any front there.
        keys: For `tcp://` endpoints; None for none.
        is_local: Whether messages may go past ZeroMQ to a server on this machine: large tensors by memory
            shared with it, the rest over a line.

    Attributes:
        endpoint: Where it leads.
        socket: The DEALER; carries messages of `docs/wire.md`.
        monitor: Readable when something happened to the connection: ask `is_connected` then, and once
            that was true, `is_broken`.
        regions: The memory shared with the server.
        line: Where messages go past ZeroMQ; None as long as they do not.
        is_refused: Whether the server turned this client away, after which ZeroMQ does not try again.
        obstacle: What kept the last handshake from succeeding, in words; empty if nothing is known.

    Raises:
        Unavailable: no socket could be made (file descriptors used up).
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: Keys | None = None,
        is_local: bool = True,
    ) -> None:
        self.endpoint = endpoint
        address = choose_front(endpoint)
        side = side_path(address) if is_local else None
        self.regions = Regions(side)
        self.line: Line | None = None
        self._approach = Approach(side)
        self._poll: select.poll | None = None
        self._looks = 0
        # Whether `wait` found nothing in ZeroMQ's sockets, and nothing was done with them since: then their
        # descriptors tell of whatever comes, and to look at these costs less than to ask the sockets.
        self._is_quiet = False
        self.is_refused = False
        self.obstacle = ""
        self._is_tcp = endpoint.startswith("tcp://")
        self._has_keys = keys is not None and self._is_tcp
        try:
            self.socket = context.socket(zmq.DEALER)
        except zmq.ContextTerminated:
            raise
        except zmq.ZMQError as e:
            raise Unavailable(f"no connection to {endpoint}: {e}") from e
        try:
            self._set_up(endpoint)
            if keys is not None and self._has_keys:
                keys.put_on(self.socket)
            monitor_address = f"inproc://pool-monitor-{next(_monitor_numbers)}"
            self.monitor = self.socket.get_monitor_socket(_EVENTS, monitor_address)
            self.monitor.linger = 0
            self._stands = False
            self.socket.connect(address)
            # pyzmq's Python layer over send costs 0.65 µs a frame; what it would check does not apply here.
            self._send: Callable[..., Any] = super(zmq.Socket, self.socket).send
        except zmq.ZMQError as e:
            self.socket.close()
            if isinstance(e, zmq.ContextTerminated):
                raise
            raise Unavailable(f"no connection to {endpoint}: {e}") from e

    def _set_up(self, endpoint: str) -> None:
        socket = self.socket
        socket.linger = 0  # whoever closes a connection has given up on what it carried
        # As many replies as there were requests; a limit would only fill the server's memory.
        socket.rcvhwm = 0
        socket.reconnect_ivl = _RECONNECT_MS
        socket.reconnect_ivl_max = _RECONNECT_MAX_MS
        if endpoint.startswith("tcp://["):
            socket.ipv6 = True
        if self._is_tcp:
            socket.tcp_keepalive = 1
            socket.tcp_keepalive_idle = _TCP_KEEPALIVE_IDLE_S
            socket.tcp_keepalive_intvl = _TCP_KEEPALIVE_INTERVAL_S
            socket.tcp_keepalive_cnt = _TCP_KEEPALIVE_COUNT

    def is_connected(self) -> bool:
        """Whether a server is there, as far as the monitor told. To be asked until it is true."""
        for event, value in self._news():
            # An attempt that fails in its handshake is reported as a disconnection too; the last word counts.
            self._stands = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event in _FAILURES:
                self.is_refused = event in _REFUSALS
                self.obstacle = self._explain(event, value)
        return self._stands

    def _explain(self, event: int, value: int) -> str:
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "it does not know this client's key (secret_key)"
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if value != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                return "it speaks another protocol"
            return "it has no keys" if self._has_keys else "it wants keys (server_key and secret_key)"
        if self._has_keys:
            return "server_key may not be its key"
        return "it may want keys (server_key and secret_key)" if self._is_tcp else ""

    def is_broken(self) -> bool:
        """Whether a connection that was once established has ended since; reconnected or not."""
        if self.line is not None and self.line.is_lost:
            return True
        if self._is_quiet and not self._look(0):
            return not self._stands
        for event, _ in self._news():
            if event == zmq.EVENT_DISCONNECTED:
                self._stands = False
        return not self._stands

    def _news(self) -> Iterator[tuple[int, int]]:
        """Events and their values."""
        while _events(self.monitor) & zmq.POLLIN:
            description, _address = self.monitor.recv_multipart(zmq.NOBLOCK)
            yield _EVENT.unpack(description)

    def has_room(self) -> bool:
        """Whether `send` would take a message."""
        self._is_quiet = False  # a reply that came may not be told of any more
        return bool(_events(self.socket) & zmq.POLLOUT)

    def has_message(self) -> bool:
        """Whether `receive` has something to give that came through ZeroMQ."""
        has_message = bool(_events(self.socket) & zmq.POLLIN)
        self._is_quiet &= not has_message
        return has_message

    def send(self, frames: Sequence[Frame]) -> None:
        """Queue one message without blocking.

        Frames of `ZERO_COPY_BYTES` and more are not copied: what they alias must not change until it is sent.

        Raises:
            zmq.Again: the queue is full; none of it was sent.
        """
        size = sum(map(len, frames))
        if size < SHARE_BYTES:
            if not self._hand_over(frames, size):
                self._queue(frames)
            return
        placed = self.regions.place(frames)
        if placed is not frames:
            size = sum(map(len, placed))
        if self._hand_over(placed, size):
            return
        try:
            self._queue(placed)
        except zmq.Again:
            self.regions.answered(placed)
            raise

    def cancel(self, frames: Sequence[Frame]) -> None:
        """Queue a message that withdraws a request, whichever way that went: to the other it says nothing.

        Raises:
            zmq.Again: the queue is full.
        """
        if self.line is not None:
            self.line.send(frames, sum(map(len, frames)))
        self._queue(frames)

    def _hand_over(self, frames: Sequence[Frame], size: int) -> bool:
        """Send a message over the line, if there is one and room in it."""
        if self.line is not None:
            return self.line.send(frames, size)
        if not self._approach.is_over:
            self.line = self._approach.step()
            if self.line is not None:
                self._poll = select.poll()
                for each in (self.line, self.socket, self.monitor):
                    self._poll.register(each.fileno(), select.POLLIN)
                return self.line.send(frames, size)
        return False

    def _queue(self, frames: Sequence[Frame]) -> None:
        self._is_quiet = False
        send = self._send
        for frame in frames[:-1]:
            send(frame, _MORE, len(frame) < ZERO_COPY_BYTES)
        send(frames[-1], _NOBLOCK, len(frames[-1]) < ZERO_COPY_BYTES)

    def receive(self) -> list[Frame]:
        """Take one message from the queue without blocking: the header as `bytes`, tensors as `zmq.Frame`.

        Raises:
            zmq.Again: there is none.
            WireError: a RESULT without a tensor, a bundle without a table, or no message at all; the
                connection is of no more use.
        """
        if self.line is not None:
            self._looks += 1
            if self._looks % _SOCKET_EVERY or not self.has_message():
                message = self.line.receive()
                if message is not None:
                    return list(self.regions.answered(message)) if self.regions.live else message
                if self._is_quiet and not self.line.is_lost:
                    raise zmq.Again  # `wait` comes before any news of ZeroMQ
                if not self.has_message():  # to be told by an exception costs five times as much
                    raise zmq.Again
        # A header arrives as bytes, the cheap way, which cannot tell whether more follows. It says itself:
        # a RESULT has at least one tensor (`docs/wire.md` 3.6), a bundle of ERRORs has a table (3.9), and
        # nothing else has any. Frames, which do know, cost 0.4 µs more each, and asking the socket 0.7 µs.
        receive = self.socket.recv
        header = receive(_NOBLOCK)
        if header[3:4] != _RESULT and header[: wire.HEAD_BYTES] != _ERROR_BUNDLE_HEAD:
            frames: list[Frame] = [header]
            if self.regions.live:
                self.regions.answered(frames)
            return frames
        frames = [header]
        try:
            while True:
                frame = receive(_NOBLOCK, False)
                frames.append(frame)
                if not frame.more:
                    return list(self.regions.answered(frames)) if self.regions.live else frames
        except zmq.Again:
            raise WireError("the server sent a RESULT without tensors or a bundle without a table") from None

    def wait(self, timeout_ms: int) -> None:
        """Wait until `receive` or `is_broken` may have news, or for so long (-1: for ever).

        Raises:
            zmq.ContextTerminated: the context is closed.
        """
        if self._poll is None:
            zmq.zmq_poll([(self.socket, zmq.POLLIN), (self.monitor, zmq.POLLIN)], timeout_ms)
            return
        if not self._is_quiet:  # descriptors tell of changes only: first to be asked what there is already
            self._is_quiet = not (self.has_message() or _events(self.monitor) & zmq.POLLIN)
        if self._is_quiet:
            self._look(min(timeout_ms, _LONGEST_WAIT_MS))

    def _look(self, timeout_ms: int) -> bool:
        """Wait for news of line or sockets, which were quiet; whether there are any."""
        assert self._poll is not None
        assert self.line is not None
        ready = self._poll.poll(timeout_ms)
        if ready and (len(ready) > 1 or ready[0][0] != self.line.fileno()):
            self._is_quiet = False
        return bool(ready)

    def receive_within(self, timeout_s: float) -> list[Frame] | None:
        """As `receive`, waiting so long for a message; None if none came.

        Raises:
            WireError: as `receive`.
        """
        until = time.monotonic() + timeout_s
        while True:
            try:
                return self.receive()
            except zmq.Again:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self.wait(math.ceil(left * 1e3))

    def descriptors(self) -> list[int]:
        """What to watch for news, where nothing was left to read."""
        self._is_quiet = False  # whoever watches them sees what `wait` does not
        line = [] if self.line is None else [self.line.fileno()]
        return [*line, self.socket.fileno(), self.monitor.fileno()]

    def close(self) -> None:
        """Close both sockets, and take the shared memory back; what was queued is dropped."""
        if self.socket.closed:
            return
        self.regions.close()
        self._approach.close()
        if self.line is not None:
            self.line.close()
        # First: an event that nobody can take any more blocks ZeroMQ's thread, and so all other connections.
        with suppress(zmq.ContextTerminated):
            self.socket.disable_monitor()
        self.socket.close()
        self.monitor.close()


def _events(socket: zmq.Socket[bytes]) -> int:
    return cast(int, socket.get(zmq.EVENTS))
