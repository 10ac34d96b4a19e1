"""The doorbell: a `SOCK_SEQPACKET` pair between the front and one worker, one message per batch each way.

A message is 16 bytes, little-endian, and for those that carry one, a UTF-8 text after them:

     0       2       4        8             12       16
     +-------+-------+--------+-------------+--------+----------
     | kind  | slot  |  rows  | generation  | layout | text …
     |  u16  |  u16  |  u32   |     u32     |  u32   |
     +-------+-------+--------+-------------+--------+----------

Packets keep their bounds and their order, a dead peer reads as an end of file, and the kernel wakes
the sleeper. Both ends run this code: the front non-blocking, the worker blocking.
"""

from __future__ import annotations

import enum
import os
import select
import socket
import struct
import time
from typing import NamedTuple

_FIXED = struct.Struct("<HHIII")
TEXT_MAX_BYTES = 32_768  # well below the kernel's default packet limit (net.core.wmem_default)
_RECEIVE_BYTES = _FIXED.size + TEXT_MAX_BYTES


class Ring(enum.IntEnum):
    """What a message says."""

    # front -> worker
    RUN = 1  # run the first `rows` rows of `slot`, cut up as `layout` (its descriptor is in the slot)
    DRAIN = 2  # finish and exit
    RUN_LENT = 3  # as RUN; the tensors lie in memory of the client (`pool.shm.loans`)
    GIVE_BACK = 4  # the region whose number is in `generation` is not to be used again
    # worker -> front
    READY = 16  # loaded and warmed up
    DONE = 17  # outputs are in the slot
    MODEL_ERROR = 18  # the model raised; text is its message
    TOO_LARGE = 19  # the outputs do not fit the slot; text says by how much
    LOAD_ERROR = 20  # the model does not load; text says why; the worker exits


class Message(NamedTuple):
    """One message, decoded."""

    kind: int
    slot: int = 0
    rows: int = 0
    generation: int = 0
    layout: int = 0
    text: str = ""


def make_pair() -> tuple[socket.socket, socket.socket]:
    """The front's end (non-blocking) and the worker's end (blocking) of a new doorbell."""
    front, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    front.setblocking(False)
    return front, worker


def ring(sock: socket.socket, message: Message) -> None:
    """Send one message; a text that is too long is cut.

    Raises:
        OSError: the other end is gone (or, non-blocking, its buffer is full, which the messages of two
            batches cannot do).
    """
    fixed = _FIXED.pack(message.kind, message.slot, message.rows, message.generation, message.layout)
    if message.text:
        text = message.text.encode("utf-8", "replace")[:TEXT_MAX_BYTES]
        sock.send(fixed + text)
    else:
        sock.send(fixed)


class Vigil:
    """Waits until descriptors can be read: awake as long as that pays, then asleep.

    To be woken costs tens of microseconds where a core has gone idle meanwhile, and finds its caches cold.
    Whoever waits, and had what came last within `awake_s`, stays awake so long for the next one, and in every
    turn lets whoever else wants its core go first. One that waited longer sleeps at once: where messages are
    rare, and on an idle server, nothing is burnt. So does one that was busy for longer than `awake_s` with
    the last message: beside that, to be woken costs little, and the front wants a core for the answer.

    Args:
        awake_s: Longest it stays awake; 0 to sleep always.
    """

    def __init__(self, awake_s: float) -> None:
        self._awake_s = awake_s
        self._pays = False
        self._began = self._gave_at = 0.0
        self._poll = select.poll()

    def listen(self, fd: int) -> None:
        """Wait for this one, too."""
        self._poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        """Wait for this one no more."""
        self._poll.unregister(fd)

    def wait(self) -> list[int]:
        """Those that can be read, once there are any."""
        ready = self.watch() or self._poll.poll()
        self.came()
        return [fd for fd, _ in ready]

    def watch(self) -> list[tuple[int, int]]:
        """The part that is awake; what it found, which may be nothing."""
        began = self._began = time.monotonic()
        ready: list[tuple[int, int]] = []
        if self._pays and began - self._gave_at < self._awake_s:
            until = began + self._awake_s
            poll = self._poll.poll
            while not (ready := poll(0)) and time.monotonic() < until:
                os.sched_yield()
        return ready

    def came(self) -> None:
        """What was waited for since `watch` is there."""
        self._gave_at = time.monotonic()
        self._pays = self._gave_at - self._began < self._awake_s


class Waiter:
    """Waits for messages at the worker's end.

    Args:
        sock: The worker's end, blocking.
        awake_s: Longest it stays awake (`Vigil`).
    """

    def __init__(self, sock: socket.socket, awake_s: float) -> None:
        self._sock = sock
        self._vigil = Vigil(awake_s)
        self._vigil.listen(sock.fileno())

    def next(self) -> Message | None:
        """The next message; None when the other end is gone."""
        self._vigil.watch()
        message = answer(self._sock)  # which sleeps by itself
        self._vigil.came()
        return message


def answer(sock: socket.socket) -> Message | None:
    """Receive one message; None when the other end is gone.

    Raises:
        BlockingIOError: non-blocking and nothing there.
    """
    try:
        data = sock.recv(_RECEIVE_BYTES)
    except ConnectionResetError:
        return None
    return _decode(data)


def answer_at_once(sock: socket.socket) -> Message | None:
    """`answer` at an end that waits otherwise.

    Raises:
        BlockingIOError: nothing there.
    """
    try:
        data = sock.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
    except ConnectionResetError:
        return None
    return _decode(data)


def take_back(far_end: socket.socket) -> list[Message]:
    """Receive, at the worker's end, what the worker has not: each message goes to one of the two.

    A worker that reads at the same time may get one that was sent later than one taken back.
    """
    taken: list[Message] = []
    while True:
        try:
            message = _decode(far_end.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return taken
        assert message is not None, "the front holds both ends open"
        taken.append(message)


def _decode(data: bytes) -> Message | None:
    if len(data) < _FIXED.size:
        return None
    kind, slot, rows, generation, layout = _FIXED.unpack_from(data)
    text = data[_FIXED.size :].decode("utf-8", "replace") if len(data) > _FIXED.size else ""
    return Message(kind, slot, rows, generation, layout, text)
