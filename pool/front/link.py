"""What the front that leads and a follower tell each other, and the socket between. Runs in both.

A `SOCK_SEQPACKET` pair; a packet is one message of msgpack, descriptors ride along. What is long (a
configuration, a loader's report, a status document) is the message's *document*: behind it in the packet, or
in a memfd.

    lead  --Welcome [FollowerOrder]-->     follower   once
    lead  --Begin(generation) [GenerationOrder] + arena, board-->       here are its memory and what it serves
    lead  --WorkerJoined(generation, worker, …) + doorbell, its far end, regions-->
    lead  --WorkerLeaving | WorkerEnded(generation, worker, …)-->
    lead  --Serve(version) [State]-->                 all that is to be served; answered by Following(version)
    lead  <--Retired(generation)--                    nothing of it is under way here any more
    lead  <--Interrupt | Worn | CallQuarantine | DismissQuarantine--    asked about workers, who has them
    lead  <--Counted [tally]--                        once a second, which also says that it is well
    lead  <--Ask(id)-- --Told(id) [document]-->       a status document
    lead  --Drain(timeout_s)--> <--Drained(is_finished)--       --Stop-->

    packet   u32 length of the message, u8 where its document is (0 nowhere, 1 behind it, 2 in the first
             descriptor), the message, the document
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from pool.config import Config, ModelConfig
from pool.shm.control import LoadReport

_HEAD = struct.Struct("<IB")
_NOWHERE, _BEHIND, _IN_MEMFD = 0, 1, 2
_BEHIND_MAX_BYTES = 16_384
_PACKET_MAX_BYTES = 32_768
_FDS_MAX = 8
_PAUSE_S = 0.05  # until the next try, when too many descriptors are on their way (ETOOMANYREFS)


class FollowerOrder(msgspec.Struct, frozen=True):
    """What a follower is.

    Attributes:
        index: Its number; the lead is 0.
        fronts: How many there are.
        config: What the lead serves.
        endpoints: Where the follower is to listen, with numeric ports.
    """

    index: int
    fronts: int
    config: Config
    endpoints: tuple[str, ...]


class GenerationOrder(msgspec.Struct, frozen=True):
    """What a generation is made of, beside its memory."""

    model: str
    config: ModelConfig
    report: LoadReport
    slots: int
    slot_bytes: int


class State(msgspec.Struct, frozen=True):
    """All that is to be served.

    Attributes:
        config: The configuration.
        served: By model: the number of its generation.
        failed: By model that was given up: why.
    """

    config: Config
    served: dict[str, int]
    failed: dict[str, str]


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The first message. Document: `FollowerOrder`."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """A generation, before its workers. Document: `GenerationOrder`; descriptors: arena, board."""

    generation: int


class WorkerJoined(msgspec.Struct, frozen=True, tag=True):
    """A process takes batches. Descriptors: the front's end of the doorbell, the far end, the regions'."""

    generation: int
    worker: int  # unique among all processes of all workers
    index: int
    role: str
    device: str
    pid: int


class WorkerLeaving(msgspec.Struct, frozen=True, tag=True):
    """It takes no more batches."""

    generation: int
    worker: int


class WorkerEnded(msgspec.Struct, frozen=True, tag=True):
    """Its process is gone and was waited for; the rest is an `End`."""

    generation: int
    worker: int
    how: str
    is_own_doing: bool
    cause: str


class QuarantineFailed(msgspec.Struct, frozen=True, tag=True):
    """There is no quarantine worker to be had."""

    generation: int
    how: str


class GenerationFailed(msgspec.Struct, frozen=True, tag=True):
    """Its last worker was given up."""

    generation: int
    how: str


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Answer what was admitted to a generation, and be done with it (`Retired`)."""

    generation: int


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Serve this and nothing else. Document: `State`."""

    version: int


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse new requests, and finish what was admitted."""

    timeout_s: float


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Answer what is left, and leave."""


class Told(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Ask`. Document: of the status; none if it cannot be had, for the reason `error`."""

    id: int
    error: str = ""


class Count(msgspec.Struct, frozen=True, tag=True):
    """Say what was counted, now."""


ToFollower = (
    Welcome
    | Begin
    | WorkerJoined
    | WorkerLeaving
    | WorkerEnded
    | QuarantineFailed
    | GenerationFailed
    | Finish
    | Serve
    | Drain
    | Stop
    | Told
    | Count
)


class Following(msgspec.Struct, frozen=True, tag=True):
    """What `Serve` said is served, and the endpoints are open."""

    version: int
    endpoints: tuple[str, ...]


class Retired(msgspec.Struct, frozen=True, tag=True):
    """Nothing of a generation is under way here any more."""

    generation: int


class Drained(msgspec.Struct, frozen=True, tag=True):
    """All was finished, or not in time."""

    is_finished: bool


class Counted(msgspec.Struct, frozen=True, tag=True):
    """What was counted so far. Document: a tally (`pool.front.tallies`)."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """A client wants the status document."""

    id: int


class Interrupt(msgspec.Struct, frozen=True, tag=True):
    """A worker takes too long for a batch."""

    generation: int
    worker: int
    reason: str


class Worn(msgspec.Struct, frozen=True, tag=True):
    """A worker is to be replaced."""

    generation: int
    worker: int
    reason: str


class CallQuarantine(msgspec.Struct, frozen=True, tag=True):
    """A batch waits for the quarantine worker."""

    generation: int


class DismissQuarantine(msgspec.Struct, frozen=True, tag=True):
    """None waits for it any more."""

    generation: int


ToLead = Following | Retired | Drained | Counted | Ask | Interrupt | Worn | CallQuarantine | DismissQuarantine

_encode = msgspec.msgpack.Encoder().encode
encode_document = _encode
decode_order = msgspec.msgpack.Decoder(FollowerOrder).decode
decode_generation = msgspec.msgpack.Decoder(GenerationOrder).decode
decode_state = msgspec.msgpack.Decoder(State).decode
decode_any = msgspec.msgpack.Decoder().decode
decode_to_follower = msgspec.msgpack.Decoder(ToFollower).decode
decode_to_lead = msgspec.msgpack.Decoder(ToLead).decode

Heard = Callable[[Any, bytes, list[int]], None]


class Link:
    """One end of the socket, on the running event loop.

    Args:
        sock: The end; owned from now on.
        decode: Of the messages that come.
        on_message: Called with each, its document and its descriptors, which are the callee's.
        on_closed: Called once, when the other end is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        decode: Callable[[bytes], Any],
        on_message: Heard,
        on_closed: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decode = decode
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = True
        self._loop.add_reader(sock.fileno(), self.read)

    def send(self, message: Any, document: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message, or have it wait until there is room; to an end that is gone, nothing happens.

        Args:
            message: Of those that the other end knows.
            document: What is long about it; empty for none.
            fds: Duplicated; the caller keeps its own.

        Raises:
            OSError: out of descriptors or memory.
        """
        if not self._is_open:
            return
        encoded = _encode(message)
        held = [os.dup(fd) for fd in fds]
        where = _NOWHERE
        if document:
            where = _BEHIND if len(document) <= _BEHIND_MAX_BYTES else _IN_MEMFD
        if where == _IN_MEMFD:
            held.insert(0, _in_memfd(document))
        packet = _HEAD.pack(len(encoded), where) + encoded + (document if where == _BEHIND else b"")
        self._unsent.append((packet, held))
        if len(self._unsent) == 1:
            self._flush()

    def read(self) -> None:
        """Take what has come."""
        while self._is_open:
            try:
                packet, fds, _, _ = socket.recv_fds(
                    self._sock, _PACKET_MAX_BYTES, _FDS_MAX, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                packet, fds = b"", []
            if not packet:
                self.close()
                self._on_closed()
                return
            length, where = _HEAD.unpack_from(packet)
            message = self._decode(packet[_HEAD.size : _HEAD.size + length])
            document = packet[_HEAD.size + length :]
            if where == _IN_MEMFD:
                document = _read_memfd(fds.pop(0))
            self._on_message(message, document, fds)

    def _flush(self) -> None:
        while self._is_open and self._unsent:
            packet, fds = self._unsent[0]
            try:
                if fds:
                    socket.send_fds(self._sock, [packet], fds)
                else:
                    self._sock.send(packet)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError as e:
                if e.errno == errno.ETOOMANYREFS:
                    self._timer = self._loop.call_later(_PAUSE_S, self._flush)
                    return
                # The other end is gone, which the next look tells.
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)
        if self._is_open:
            self._loop.remove_writer(self._sock.fileno())

    def close(self) -> None:
        """Let go of the socket, and of what was not sent."""
        if not self._is_open:
            return
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._unsent:
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)
        self._unsent.clear()


def _in_memfd(document: bytes) -> int:
    fd = os.memfd_create("pool-document", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as f:
        f.write(document)
    return fd


def _read_memfd(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as f:
        f.seek(0)
        return f.read()
