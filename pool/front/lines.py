"""Lines: clients on this machine that talk past ZeroMQ. Runs in the front, on its event loop.

A ZeroMQ message wakes a thread at either end before it is read, and to wake one costs more than to carry the
message: with one small request at a time, that is most of the time an answer takes. A *line* is a Unix
socket of type SOCK_SEQPACKET (`docs/wire.md` 8) that the loop reads itself.

Each line is a client of its own to everything behind it: to admission, accounts, cancels, replies. What the
kernel does not take of a reply because its client does not read waits here, and beyond `max_unread_bytes` is
dropped.

As in the endpoint there is a fast way: rows of numbers that fit the open slot are put there and run. Whatever
is not that goes the general way, which also says what is wrong with it (`pool.front.admission`).
"""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pool import packets, wire
from pool.errors import PoolError, Unavailable, WireError
from pool.front.admission import PRIORITIES, UNSAID, Admission, Refusals
from pool.front.clients import Client, Clients
from pool.front.doorway import Visitor
from pool.front.engine import Engine
from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.route import Route
from pool.front.slots import Ticket
from pool.wire import FIXED_BYTES, HEAD, HEAD_BYTES

log = Log("pool.lines")

# Each has one descriptor, so all take an eighth of the 1,024 that a process has unless told otherwise.
# Whoever gets none talks through ZeroMQ.
_LINES_MAX = 128
# Of one client process, so that it leaves some to others. `pool.Client` has one for each thread that calls.
_LINES_OF_ONE_MAX = 64

# Of the kernel, for one line: room for a packet, as it counts.
_SEND_BUFFER_BYTES = packets.PACKET_MAX_BYTES + 16_384

# Messages of one line a turn of the loop: about 1 ms, as `pool.front.endpoint` has it for all of ZeroMQ's.
_DRAIN_MAX = 64

# Seconds. What waits for clients to read is sent for so long when the server stops, as ZeroMQ does it.
_LINGER_S = 1.0

# What a packet that waits takes beside its bytes: two objects, and a place in the queue.
_PACKET_BYTES = 256


class Line:
    """One line, and what waits for its client to read.

    Args:
        visitor: Whose it is; its connection is owned from now on.
        lines: Told of what comes.
        max_unread_bytes: Most that may wait.
    """

    __slots__ = ("_lines", "_max_unread_bytes", "_unread", "_unread_bytes", "client", "is_open", "visitor")

    def __init__(self, visitor: Visitor, lines: Lines, max_unread_bytes: int) -> None:
        self.visitor = visitor
        self.client: Client
        self.is_open = True
        self._lines = lines
        self._max_unread_bytes = max_unread_bytes
        self._unread: deque[bytes | memoryview] = deque()  # packets
        self._unread_bytes = 0

    @property
    def is_behind(self) -> bool:
        """Whether something waits for the client to read."""
        return bool(self._unread)

    def send(self, frames: Sequence[Any]) -> bool:
        """Send a message, or have it wait; False if it was dropped.

        Args:
            frames: Copied before this returns.
        """
        if not self.is_open:
            return False
        table = packets.make_table(frames)
        if not self._unread:
            size = len(table) + sum(map(len, frames))
            if size <= packets.PACKET_MAX_BYTES:
                try:
                    self.visitor.sock.sendmsg((table, *frames))
                    return True
                except BlockingIOError:
                    pass
                except OSError:
                    self._lines.end(self)
                    return False
        message = memoryview(b"".join((table, *frames)))
        step = packets.PACKET_MAX_BYTES
        parts = [message[at : at + step] for at in range(0, len(message), step)]
        size = len(message) + _PACKET_BYTES * len(parts)
        # One reply always waits, however large.
        if self._unread and self._unread_bytes + size > self._max_unread_bytes:
            return False
        was_empty = not self._unread
        self._unread.extend(parts)
        self._unread_bytes += size
        if was_empty:
            self.flush()
            if self._unread and self.is_open:
                self._lines.watch(self)
        return self.is_open

    def flush(self) -> None:
        """Send of what waits as much as the kernel takes."""
        sock, unread = self.visitor.sock, self._unread
        try:
            while unread:
                sock.send(unread[0])
                self._unread_bytes -= _PACKET_BYTES + len(unread.popleft())
        except BlockingIOError:
            return
        except OSError:
            self._lines.end(self)
            return
        self._lines.unwatch(self)


class Lines:
    """All lines.

    Args:
        engine: Runs the requests.
        clients: Told of those that come and go.
        admission: Takes the messages.
        max_unread_bytes: Most that may wait for one client to read.
        look_after: Called after messages were taken, or clients were lost.
    """

    def __init__(
        self,
        engine: Engine,
        clients: Clients,
        admission: Admission,
        max_unread_bytes: int,
        look_after: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._clients = clients
        self._admission = admission
        self._max_unread_bytes = max_unread_bytes
        self._look_after = look_after
        self._loop = asyncio.get_running_loop()
        self._lines: set[Line] = set()
        # A packet is read, and its rows are copied into a slot, before the next one is. One byte more than
        # any may have, to see that it has no more.
        self._buffer = memoryview(bytearray(packets.REQUEST_MAX_BYTES + 1))

    def take(self, visitor: Visitor, data: bytes, fds: list[int]) -> None:
        """A client asks for a line: have it.

        Args:
            visitor: Who asks.
            data: The packet.
            fds: The descriptors that came along.

        Raises:
            PoolError: it is not asked for as it should be, or there are too many; the sentence says which.
            OSError: the client is gone.
        """
        if len(data) != packets.HELLO.size or fds:
            raise WireError(
                f"{len(data)} bytes and {len(fds)} descriptors; wanted {packets.HELLO.size} and 0"
            )
        _, version = packets.HELLO.unpack(data)
        if version != packets.LINE_VERSION:
            raise WireError(f"a line of version {version}; wanted {packets.LINE_VERSION}")
        of_this = sum(line.visitor.pid == visitor.pid for line in self._lines)
        if len(self._lines) >= _LINES_MAX or of_this >= _LINES_OF_ONE_MAX:
            raise Unavailable(
                f"{of_this} lines of this process and {len(self._lines)} in all; "
                f"wanted at most {_LINES_OF_ONE_MAX} and {_LINES_MAX}"
            )
        most_bytes = packets.REQUEST_MAX_BYTES
        # A packet that the kernel never takes would be waited for in vain. Most machines have room for it.
        if visitor.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < _SEND_BUFFER_BYTES:
            visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        visitor.sock.send(packets.WELCOME.pack(packets.LINE_MAGIC, packets.LINE_VERSION, most_bytes))
        line = Line(visitor, self, self._max_unread_bytes)
        line.client = self._clients.came(line, f"line:{visitor.uid}:-1:{visitor.pid}")
        self._lines.add(line)
        self._loop.add_reader(visitor.sock.fileno(), self._on_readable, line)

    def close(self) -> None:
        """Send what waits, for at most 1 s, and end all of them; what the kernel has is still read."""
        until = time.monotonic() + _LINGER_S
        waiting = {line.visitor.sock.fileno(): line for line in self._lines if line.is_behind}
        poll = select.poll()
        for fd in waiting:
            poll.register(fd, select.POLLOUT)
        while waiting and (left := until - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1e3):
                line = waiting[fd]
                line.flush()
                if not (line.is_open and line.is_behind):
                    del waiting[fd]
                    poll.unregister(fd)
        for line in list(self._lines):
            self.end(line)

    def _on_readable(self, line: Line) -> None:
        """Take what has come, a drain's worth at most; the loop calls again as long as there is more.

        The first request is run at once, for it may be alone. Those behind it are run together.
        """
        refusals: Refusals = {}
        turn = self._engine.turn
        turn.started = turn.ended = now = time.monotonic()
        touched: Generation | None = None
        placed = 0
        for number in range(_DRAIN_MAX):
            try:
                size = line.visitor.sock.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                size = 0
            if size == 0:
                self.end(line)
                break
            try:
                if size > packets.REQUEST_MAX_BYTES:
                    raise WireError(f"a packet of more than {packets.REQUEST_MAX_BYTES} bytes")
                frame, *tensors = packets.split(self._buffer[:size])
                header = bytes(frame)
                route = self._admission.routes.get(header[FIXED_BYTES:])
                admitted = None
                if route is not None:
                    admitted = self._place(line.client, route, header, tensors, now, refusals)
                if admitted is None:
                    self._admission.take(line.client, header, tensors, now)
            except PoolError as e:
                log.debug("a line is ended", client=line.client.address, reason=e.message)
                line.send([wire.encode_error(0, e)])
                self.end(line)
                break
            except Exception:
                log.defect("cannot handle a message")
                self.end(line)
                break
            if not admitted:
                continue
            assert route is not None, "what was admitted has a route"
            if touched is not None and touched is not route.generation:
                self._engine.flush(touched, placed)
                placed = 0
            touched = route.generation
            placed += 1
            if number == 0:
                now = self._engine.flush(touched, placed).started
                touched, placed = None, 0
        if touched is not None:
            self._engine.flush(touched, placed)
        self._look_after()

    def _place(
        self,
        client: Client,
        route: Route,
        header: bytes,
        tensors: Sequence[memoryview],
        now: float,
        refusals: Refusals,
    ) -> bool | None:
        """The fast way: put the rows of a request into the open slot, or refuse it for want of room.

        Returns:
            Whether it was admitted; None if it has to go the general way.
        """
        priority = PRIORITIES.get(header[:HEAD_BYTES])
        if priority is None or not route.is_direct or len(tensors) != len(route.inputs):
            return None
        generation = route.generation
        _, id_, timeout_ms, rows = HEAD.unpack_from(header)
        if generation.poison or (rows != 1 and (rows == 0 or not route.is_batched)):
            return None
        admission, batcher = self._admission, generation.batcher
        patience = timeout_ms * 1e-3 or route.timeout_s
        account = client.accounts.get(generation) or client.account(generation)
        key = route.key if priority == UNSAID else route.keys[priority]
        slot = None
        if patience >= batcher.expected_s and account.rows + rows <= route.inflight_rows:
            slot = generation.open_slot(key, route.capacity)
        turn = self._engine.turn
        ticket = Ticket(admission.outbound, client, id_, route, rows, now + patience, turn, key, account)
        if slot is None:
            refusal = admission.find_refusal(ticket, now, refusals)
            if refusal is None:
                return None
            admission.outbound.refuse_alike(client, id_, refusal)
            return False
        view, start = generation.views[slot.index], slot.rows
        fits = rows <= slot.capacity - start
        if fits:
            for (offset, row_bytes), tensor in zip(route.inputs, tensors, strict=True):
                if len(tensor) != rows * row_bytes:
                    fits = False
                    break
                at = offset + start * row_bytes
                view[at : at + rows * row_bytes] = tensor
        if not fits:
            batcher.abandon(slot)
            return None
        batcher.commit(slot, ticket, now)
        admission.admitted += 1
        return True

    # -- what lines tell ------------------------------------------------------------------------------

    def watch(self, line: Line) -> None:
        """Have it flushed when its client reads."""
        self._loop.add_writer(line.visitor.sock.fileno(), line.flush)

    def unwatch(self, line: Line) -> None:
        """Nothing waits any more."""
        self._loop.remove_writer(line.visitor.sock.fileno())

    def end(self, line: Line) -> None:
        """Nothing more is sent over it or taken from it; its client is lost."""
        if not line.is_open:
            return
        line.is_open = False
        sock = line.visitor.sock
        self._loop.remove_reader(sock.fileno())
        self._loop.remove_writer(sock.fileno())
        with suppress(OSError):
            sock.close()
        self._lines.discard(line)
        self._clients.lose(line.client)
        self._loop.call_soon(self._look_after)
