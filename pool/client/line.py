"""A line to a front on this machine: messages go over it past ZeroMQ. Client process.

A ZeroMQ message takes two threads more than the two ends have, and to wake each costs more than to carry the
message. A *line* is a Unix socket between client and front (`docs/wire.md` 8): an answer to one small
request comes in about three quarters of the time.

Nothing here is needed for an answer. Where there is no line, no room in it, or the message is too large for
it, that goes through ZeroMQ.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from pool import packets, wire
from pool.client.route import Frame
from pool.errors import PoolError, WireError

# What a packet of this size takes of the kernel's buffer beside its bytes, at most.
_OVERHEAD_BYTES = 4_096

_HELLO = packets.HELLO.pack(packets.LINE_MAGIC, packets.LINE_VERSION)
_WELCOME_MAX_BYTES = wire.MAX_HEADER_BYTES  # of what answers it: a welcome, or an error


class Line:
    """One line; of use when `is_welcome` was true.

    Args:
        path: Of the socket beside the endpoint's.

    Attributes:
        is_lost: Whether its front has ended it; requests that went over it have no answer any more.

    Raises:
        OSError: nobody listens there, or no socket can be made.
    """

    def __init__(self, path: str) -> None:
        self.is_lost = False
        self._most_bytes = 0
        self._buffer = memoryview(bytearray(packets.PACKET_MAX_BYTES))
        self._begun = bytearray()  # a message of which more is to come
        self._missing = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, packets.REQUEST_MAX_BYTES)
            self._sock.connect(path)
            self._sock.send(_HELLO)
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Readable when `receive` has something to tell."""
        return self._sock.fileno()

    def is_welcome(self) -> bool:
        """Whether the front takes messages over it by now.

        Raises:
            PoolError: it does not, and will not.
            OSError: it is gone.
        """
        try:
            data = self._sock.recv(_WELCOME_MAX_BYTES)
        except BlockingIOError:
            return False
        if len(data) != packets.WELCOME.size:
            raise wire.decode_error(wire.decode_header(data))
        magic, version, most_bytes = packets.WELCOME.unpack(data)
        if magic != packets.LINE_MAGIC or version != packets.LINE_VERSION:
            raise WireError(f"welcome {magic!r} of version {version}")
        room = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _OVERHEAD_BYTES
        self._most_bytes = min(most_bytes, room)
        return True

    def send(self, frames: Sequence[Frame], size: int) -> bool:
        """Send a message, if there is room for it now.

        Args:
            frames: Its frames, copied.
            size: Their bytes together.

        Returns:
            Whether it was sent.
        """
        if size > self._most_bytes - packets.TABLE_MAX_BYTES or self.is_lost:
            return False
        try:
            self._sock.sendmsg((packets.make_table(frames), *frames))
        except OSError:  # no room (EAGAIN, ENOBUFS); or it was ended, which `receive` finds out
            return False
        return True

    def receive(self) -> list[Frame] | None:
        """The next message, if there is one: the header as `bytes`, tensors as `bytearray`.

        Raises:
            WireError: what came is no message; the line is of no more use.
        """
        while True:
            try:
                size = self._sock.recv_into(self._buffer)
            except BlockingIOError:
                return None
            except OSError:
                size = 0
            if size == 0:
                self.is_lost = True
                return None
            if not self._missing:
                total = packets.message_bytes(self._buffer[:size])
                if total == size:
                    return _own(packets.split(self._buffer[:size]))
                self._missing = total
            self._begun += self._buffer[:size]
            self._missing -= size
            if self._missing < 0:
                raise WireError(f"a packet has {-self._missing} bytes more than its message")
            if not self._missing:
                message, self._begun = self._begun, bytearray()
                return _own(packets.split(memoryview(message)))

    def close(self) -> None:
        """End it. To shut it down ends it even if a forked child has it open, too."""
        with suppress(OSError):  # the front may have been first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Approach:
    """The way to a line: asked for with the second message of a connection, had when the front grants it.

    Args:
        path: Of the socket beside the endpoint's; None if there is to be none.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._was_asked = False
        self._asked: Line | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing will come of it any more."""
        return self._path is None

    def step(self) -> Line | None:
        """Another message is to be sent; gives the line when it is there, once."""
        if not self._was_asked:
            self._was_asked = True
            return None
        try:
            if self._asked is None:
                assert self._path is not None, "not over"
                self._asked = Line(self._path)
            elif self._asked.is_welcome():
                line, self._asked, self._path = self._asked, None, None
                return line
        except (OSError, PoolError):
            self.close()
        return None

    def close(self) -> None:
        """Give it up."""
        self._path = None
        if self._asked is not None:
            self._asked.close()
            self._asked = None


def _own(frames: list[memoryview]) -> list[Frame]:
    """Frames that may be kept, out of a buffer that is used again."""
    return [bytes(frames[0]), *map(bytearray, frames[1:])]
