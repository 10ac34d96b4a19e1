"""Memory a client shares with a server on this machine, so that tensors need no socket. Client process.

A *region* is a memfd that was passed to the front once (`docs/wire.md` 7). A request of `SHARE_BYTES` or
more is copied into a block of one, and its message only says where: instead of the kernel's two copies,
page by page, there are two at the speed of memory. A block is used again when the request's reply has
come, for then the front has read it. A request that was given up keeps its block until then, or until the
connection ends and all of its regions with it.

Nothing here is needed for an answer. Where there is no region, no room in one, or no such server, the
request travels as it is.

The copy is made when the message is queued; a region begins with the second large request of a
connection, and is asked for without waiting: until it is granted, messages go as they are.

Answers come back the same way. A request like one whose answer was large brings *room* for its own, a block
of a region that the front may write to; what it wrote there is copied once more. (Arrays that lie in shared
memory would be cheaper, and not their owner's alone: a fork would have the same ones.)
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pool import wire
from pool.client.route import Frame, remember
from pool.client.space import Space, align
from pool.errors import PoolError, Unavailable, WireError
from pool.shm.memory import available_bytes
from pool.wire import Flag, Kind

# From here a request's tensors go by region. Client and front together break even at about 100 kB: below, the
# front's fast path, which is not for regions, saves more than the copies cost.
SHARE_BYTES = 128 << 10

# Of all regions of a connection, and of all its rooms. What is in flight beyond it goes in messages: the
# caller, who holds the arrays of all these requests as well, shall not be taken much more memory than they
# have themselves.
REGIONS_MAX_BYTES = 256 << 20

# A region is as large as those before it together, between these. The kernel needs 0.4 ms a MiB to make
# it, in which an event loop stands still; and each costs the front two descriptors.
_REGION_MIN_BYTES, _REGION_MAX_BYTES = 1 << 20, 32 << 20

# Seconds. Regions not used for so long are given back; a server that granted none is asked again; and it is
# looked whether the front still has them. (A precaution: when it is gone, the connection ends as well.)
IDLE_S = 30.0
_RETRY_S = 10.0
_CHECK_S = 1.0

_PAGE_BYTES = mmap.PAGESIZE
_F_SEAL_FUTURE_WRITE = 0x0010  # <linux/fcntl.h>; not in Python 3.10's fcntl
_ROOM_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_SEALS = _ROOM_SEALS | _F_SEAL_FUTURE_WRITE
_ZEROS_BYTES = 1 << 20
# Plain numbers, because those of a Python enum take long to join.
_PREDICT, _RESULT = int(Kind.PREDICT), int(Kind.RESULT)
_BUNDLE, _REGION, _ROOM = int(Flag.BUNDLE), int(Flag.REGION), int(Flag.ROOM)
_ID_END = wire.HEAD_BYTES + 8
_ROWS_OFFSET = 20  # from here a header is the same for all requests of a kind: rows and meta
_pack = wire.REFERENCE.pack

_GRANT_MAX_BYTES = wire.MAX_HEADER_BYTES  # of what answers an offer: a grant, or an error


class Region:
    """One memfd, and the connection to the front that keeps it mapped there.

    Args:
        path: Of the socket to pass it over.
        size: Bytes; a multiple of a page.
        is_room: Whether it is for the front to write to.

    Raises:
        OSError, MemoryError: there is no such memory, or no server that takes it.
    """

    def __init__(self, path: str, size: int, *, is_room: bool = False) -> None:
        if size > available_bytes():
            raise MemoryError(f"a region of {size:,} bytes")
        self.space = Space(size)
        self.max_bytes = 0
        self.token = b""
        self._magic = wire.ROOM_MAGIC if is_room else wire.REGION_MAGIC
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._sock.connect(path)
            fd = _make_memfd(size)
            try:
                self.memory: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, size), np.uint8)
                # Not before it is mapped: this seal allows what is mapped already to be written, and no more.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ROOM_SEALS if is_room else _SEALS)
                offer = wire.REGION_OFFER.pack(self._magic, wire.REGION_VERSION, size)
                socket.send_fds(self._sock, [offer], [fd])
            finally:
                os.close(fd)
        except BaseException:
            self._sock.close()
            raise

    def is_granted(self) -> bool:
        """Whether the front has it by now.

        Raises:
            PoolError: the front will not have it, or is gone.
        """
        try:
            data = self._sock.recv(_GRANT_MAX_BYTES)
        except BlockingIOError:
            return False
        except OSError as e:
            raise Unavailable(f"no region: {e.strerror}") from None
        if len(data) != wire.REGION_GRANT.size:
            raise wire.decode_error(wire.decode_header(data))
        magic, version, self.token, self.max_bytes = wire.REGION_GRANT.unpack(data)
        if magic != self._magic or version != wire.REGION_VERSION:
            raise WireError(f"grant {magic!r} of version {version}")
        return True

    def stands(self) -> bool:
        """Whether the front, having granted it, still has it."""
        try:
            self._sock.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Take it back. To shut the connection down ends it even if a forked child has it open, too."""
        with suppress(OSError):  # the front may have been first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        del self.memory


class Place(NamedTuple):
    """A block of a region."""

    region: Region
    offset: int
    size: int

    def give_back(self) -> None:
        """End its use."""
        self.region.space.give_back(self.offset)


class Supply:
    """The regions of one kind of one connection, got when they are wanted.

    Args:
        path: Of the socket beside the endpoint's.
        is_room: Whether they are for the front to write to.
    """

    def __init__(self, path: str, *, is_room: bool) -> None:
        self._path = path
        self._is_room = is_room
        self._granted: list[Region] = []
        self._asked: Region | None = None
        self._limit = _REGION_MAX_BYTES
        self._retry_at = 0.0
        self._checked_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether there are regions, and nothing in any of them is in use."""
        return bool(self._granted) and all(region.space.is_empty for region in self._granted)

    def take(self, size: int, now: float) -> Place | None:
        """A block of so many bytes; None if there is none now, in which case there may be one later.

        Raises:
            Unavailable: the front has let go of them; they are closed.
        """
        if self._asked is not None:
            self._look(now)
        if now >= self._checked_at + _CHECK_S:
            self._checked_at = now
            if not all(region.stands() for region in self._granted):
                self.close()
                self._retry_at = now + _RETRY_S
                raise Unavailable("the front has let go of its regions")
        for region in reversed(self._granted):  # the largest first: there rows find room behind each other
            at = region.space.take(size)
            if at is not None:
                return Place(region, at, size)
        if self._asked is None and now >= self._retry_at:
            self._ask(size, now)
        return None

    def close(self) -> None:
        """Give all regions back."""
        for region in self._granted:
            region.close()
        self._granted.clear()
        self._forget_asked()

    def _ask(self, size: int, now: float) -> None:
        """Begin a region in which so many bytes find room."""
        have = sum([region.space.size for region in self._granted])
        wanted = max(-(-size // _PAGE_BYTES) * _PAGE_BYTES, min(max(have, _REGION_MIN_BYTES), self._limit))
        if have + wanted > REGIONS_MAX_BYTES:
            return
        try:
            self._asked = Region(self._path, wanted, is_room=self._is_room)
        except (OSError, MemoryError):
            self._retry_at = now + _RETRY_S

    def _look(self, now: float) -> None:
        """See whether the region asked for was granted."""
        assert self._asked is not None
        try:
            if self._asked.is_granted():
                self._granted.append(self._asked)
                self._limit = min(self._limit, self._asked.max_bytes)
                self._asked = None
        except PoolError:
            self._forget_asked()
            self._retry_at = now + _RETRY_S

    def _forget_asked(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self._asked = None


class _Sent(NamedTuple):
    """What a request that is under way has in regions, and what it is like."""

    tensors: Place
    room: Place | None
    kind: bytes


class Regions:
    """The regions of one connection, which belong to whoever uses that.

    Args:
        path: Of the socket beside the endpoint's; None to have none.

    Attributes:
        live: Requests with tensors in a region, by their id as it is in the header.
    """

    def __init__(self, path: str | None) -> None:
        self._tensors = None if path is None else Supply(path, is_room=False)
        self._rooms = None if path is None else Supply(path, is_room=True)
        self._was_asked = False
        self._used_at = 0.0
        self._answer_bytes: dict[bytes, int] = {}  # by rows and meta of requests; those that are large
        self.live: dict[bytes, _Sent] = {}

    def place(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """A message to send in place of another: its tensors in a region, if there is one for them.

        Args:
            frames: Of a message of `SHARE_BYTES` or more.

        Returns:
            Frames with references; those given if it has to go as it is.
        """
        header, *tensors = frames
        if self._tensors is None or header[3] != _PREDICT or header[6] & (_BUNDLE | _REGION):
            return frames
        sizes = [len(tensor) for tensor in tensors]
        total = sum(map(align, sizes))
        id_ = header[wire.HEAD_BYTES : _ID_END]
        if total == 0 or id_ in self.live:
            return frames
        self._used_at = now = time.monotonic()
        if not self._was_asked:  # one large request may be the only one
            self._was_asked = True
            return frames
        kind = header[_ROWS_OFFSET:]
        room = self._take(self._rooms, self._answer_bytes.get(kind, 0), now)
        found = self._take(self._tensors, total, now)
        if found is None:
            if room is not None:
                room.give_back()
            return frames
        self.live[id_] = _Sent(found, room, kind)
        region, at, _ = found
        flags = _REGION if room is None else _REGION | _ROOM
        placed: list[Frame] = [b"%b%c%b" % (header[:6], header[6] | flags, header[7:])]
        for tensor, size in zip(tensors, sizes, strict=True):
            if size:
                region.memory[at : at + size] = np.frombuffer(tensor, np.uint8)
            placed.append(_pack(region.token, at, size))
            at += align(size)
        if room is not None:
            placed.append(_pack(room.region.token, room.offset, room.size))
        return placed

    def answered(self, message: Sequence[Frame]) -> Sequence[Frame]:
        """Take a reply in (or a request back that could not be sent): what it has can be used again.

        Args:
            message: Its frames.

        Returns:
            The same reply with its tensors in place of references.

        Raises:
            WireError: it refers to something else than the room of its request.
        """
        header: bytes = message[0]
        if len(header) > 6 and header[6] & _BUNDLE:
            self._answered_together(header, message[1:])
            return message
        sent = self._end(header[wire.HEAD_BYTES : _ID_END])
        if sent is not None and len(header) > 6 and header[3] == _RESULT:
            if header[6] & _REGION:
                return _collect(header, message[1:], sent.room)
            self._learn(sent, [len(tensor) for tensor in message[1:]])
        return message

    def _answered_together(self, header: bytes, frames: Sequence[Frame]) -> None:
        """Take in a bundle of replies; whatever is wrong with it, whoever decodes it says."""
        table = bytes(frames[0]) if frames else b""
        if len(table) % wire.PART.size or len(header) < wire.FIXED_BYTES:
            return
        rows = wire.HEAD.unpack_from(header)[3]
        for at in range(0, len(table), wire.PART.size):
            sent = self._end(table[at : at + 8])
            if sent is not None and header[3] == _RESULT and rows:
                share = wire.PART.unpack_from(table, at)[2]
                self._learn(sent, [len(tensor) * share // rows for tensor in frames[1:]])

    def _end(self, id_: bytes) -> _Sent | None:
        """A request was answered: its memory can be used again."""
        sent = self.live.pop(id_, None)
        if sent is not None:
            sent.tensors.give_back()
            if sent.room is not None:
                sent.room.give_back()  # nobody takes it before this reply is read
        return sent

    def _learn(self, sent: _Sent, sizes: Sequence[int]) -> None:
        """Have the next request of this kind bring room for its answer, if that is large."""
        total = sum(map(align, sizes))
        if total >= SHARE_BYTES:
            remember(self._answer_bytes, sent.kind, total)

    def trim(self) -> None:
        """Give all regions back if none was used lately."""
        if not self.live and time.monotonic() - self._used_at >= IDLE_S:
            for supply in (self._tensors, self._rooms):
                if supply is not None and supply.is_idle:
                    supply.close()

    def close(self) -> None:
        """Give all regions back; nothing that was sent is to be answered any more."""
        self.live.clear()
        for supply in (self._tensors, self._rooms):
            if supply is not None:
                supply.close()

    def _take(self, supply: Supply | None, size: int, now: float) -> Place | None:
        """A block of so many bytes, if that is more than none and there is one."""
        if supply is None or not size:
            return None
        try:
            return supply.take(size, now)
        except Unavailable:  # then it has let go of all, and the connection is about to end
            self.close()
            return None


def _collect(header: bytes, references: Sequence[Frame], room: Place | None) -> list[Frame]:
    """The frames of a reply whose tensors lie in the room.

    Raises:
        WireError: they do not.
    """
    if room is None:
        raise WireError("a RESULT with references to a room, which its request had not")
    region, start, room_bytes = room
    frames: list[Frame] = [b"%b%c%b" % (header[:6], header[6] & ~_REGION, header[7:])]
    for reference in references:
        if len(reference) != wire.REFERENCE.size:
            raise WireError(f"a reference of {len(reference)} bytes; wanted {wire.REFERENCE.size}")
        token, offset, size = wire.REFERENCE.unpack(reference)
        if token != region.token or not start <= offset <= offset + size <= start + room_bytes:
            raise WireError("a RESULT refers to bytes beyond the room of its request")
        frames.append(bytearray(region.memory[offset : offset + size].data))
    return frames


def _make_memfd(size: int) -> int:
    """A memfd of so many bytes, every page of them written: the front takes no others."""
    fd = os.memfd_create("pool-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        zeros = memoryview(bytes(min(size, _ZEROS_BYTES)))
        written = 0
        while written < size:
            written += os.pwrite(fd, zeros[: size - written], written)
    except BaseException:
        os.close(fd)
        raise
    return fd
