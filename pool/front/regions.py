"""Memory of clients on this machine, for their tensors and their answers. Runs in the front, on its loop.

A client connects to the socket beside an `ipc://` endpoint's (`pool.front.doorway`) and passes one memfd, its
*region*, for as long as the connection stands (`docs/wire.md` 7). Then its requests may say where in the
region their tensors lie, and the front copies them from there into the slot: one copy at the speed of
memory, where a message is copied by the kernel twice before that. Rows of a batch that lie one after the
other in one region are not even copied: the worker runs on the region (`pool.shm.loans`).

The memory is the client's, which may do with it what it likes while it is read. So nothing that is
read is believed (strings are copied before their offsets are looked at), and nothing the client can do
makes a read fault: a page that is not there would be made at the read, at the front's expense, or end the
process with SIGBUS. What is asked of a region, once, excludes both for good, for seals are never taken off:

    an ordinary memfd     in no file system with a limit, of no huge pages that may run out
    F_SEAL_SHRINK         no page is cut off the end
    F_SEAL_FUTURE_WRITE   no page is punched out of the middle (that is forbidden, too), while the map that
                          the client made before can still be written
    no hole               every page is there. (SEEK_HOLE says so. The bytes allocated do not: they may lie
                          beyond the end. Nor is a page that was allocated and never written told from a hole)

Pages that were swapped out come back. All stay charged to the client, which wrote them first.

A *room* is a region the other way round: the front writes answers there (`pool.front.rooms`), and reads
nothing. It cannot have F_SEAL_FUTURE_WRITE, so its client can punch pages out, and the front's next write
makes new ones, charged to the front. That is all it can do, and rooms have at most so many bytes together.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import mmap
import os
import secrets
import stat
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from pool import wire
from pool.errors import InvalidInput, TooLarge, Unavailable, WireError
from pool.front.doorway import Visitor
from pool.shm.arena import InputRegion

# Connections. Each has three descriptors (the socket's, the memfd's, the map's), so all take three eighths of
# the 1,024 that a process has unless told otherwise. Whoever gets none sends its tensors in its messages.
_REGIONS_MAX = 128
# Of one client process, so that it leaves some to others. `pool.Client` has one for each thread that calls.
_REGIONS_OF_ONE_MAX = 64

# A region of 1 GiB is looked through for holes in 10 ms, in which the front does nothing else.
REGION_MAX_BYTES = 1 << 30

# Of all rooms: what clients that do harm can have the front pay for.
_ROOMS_MAX_BYTES = 1 << 30

_F_SEAL_FUTURE_WRITE = 0x0010  # <linux/fcntl.h>; not in Python 3.10's fcntl
_SEALS = fcntl.F_SEAL_SHRINK | _F_SEAL_FUTURE_WRITE
_ROOM_SEALS = fcntl.F_SEAL_SHRINK
_SEAL_NAMES = {fcntl.F_SEAL_SHRINK: "F_SEAL_SHRINK", _F_SEAL_FUTURE_WRITE: "F_SEAL_FUTURE_WRITE"}
_numbers = itertools.count()


class Region:
    """One region, mapped. It stays so while its connection stands, or a batch that lies in it runs.

    Args:
        fd: Its memfd; owned from now on.
        size: Bytes.
        is_room: Whether answers are written to it, rather than tensors read.

    Attributes:
        number: By which workers know it; of all in this process, no two have the same.
        memory: Its bytes; read-only unless it is a room.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, fd: int, size: int, *, is_room: bool = False) -> None:
        weakref.finalize(self, os.close, fd).atexit = False
        self.fd = fd
        self.size = size
        self.is_room = is_room
        access = mmap.PROT_READ | mmap.PROT_WRITE if is_room else mmap.PROT_READ
        self.memory = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, access))
        self.number = next(_numbers) & 0xFFFFFFFF  # u32 in the doorbell


class Loan(NamedTuple):
    """Where one tensor of a request lies."""

    region: Region
    offset: int


class Regions:
    """The regions of all clients.

    Attributes:
        answers: How many were put into rooms.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        memfd = os.memfd_create("pool-device", os.MFD_CLOEXEC)
        self._device = os.fstat(memfd).st_dev  # of all ordinary memfds
        os.close(memfd)
        self._owners: dict[bytes, Visitor] = {}  # by token
        self._regions: dict[bytes, Region] = {}
        self._requests = 0
        self.answers = 0

    def close(self) -> None:
        """Let go of every region."""
        for token in list(self._regions):
            self._drop(token)

    def describe(self) -> dict[str, int]:
        """For the status document: how many regions there are, their bytes, requests and answers in them."""
        return {
            "open": len(self._regions),
            "bytes": sum(region.size for region in self._regions.values()),
            "requests": self._requests,
            "answers": self.answers,
        }

    # -- requests ----------------------------------------------------------------------------------

    def resolve(self, references: Sequence[memoryview]) -> tuple[list[memoryview], list[Loan]]:
        """The tensors that a request's frames refer to, where they lie.

        Args:
            references: The tensor frames of a request with `Flag.REGION`.

        Returns:
            Memory of the client, which can change at any time; not to be kept. And where it is, to be kept
            as long as anything reads it.

        Raises:
            WireError: one is not a reference.
            Unavailable: its region is not there (any more).
            InvalidInput: it points outside its region.
        """
        tensors: list[memoryview] = []
        loans: list[Loan] = []
        for i, reference in enumerate(references):
            token, offset, size = _read_reference(reference, f"tensor frame {i}")
            region = self._regions.get(token)
            if region is None or region.is_room:
                raise Unavailable(f"tensor frame {i} refers to a region that is not there: it was closed")
            if offset + size > region.size:
                raise InvalidInput(
                    f"tensor frame {i} refers to bytes {offset} to {offset + size}; "
                    f"its region has {region.size}"
                )
            tensors.append(region.memory[offset : offset + size])
            loans.append(Loan(region, offset))
        self._requests += 1
        return tensors, loans

    def find_room(self, reference: memoryview) -> tuple[bytes, int, memoryview] | None:
        """Where a request's answer may be put.

        Args:
            reference: The last frame of a request with `Flag.ROOM`.

        Returns:
            Token and offset of the place, and the place; None if the room is not there (any more): then the
            answer goes as if none had been offered.

        Raises:
            WireError: it is not a reference.
            InvalidInput: it points outside its room.
        """
        token, offset, size = _read_reference(reference, "the frame of the room")
        room = self._regions.get(token)
        if room is None or not room.is_room:
            return None
        if offset + size > room.size:
            raise InvalidInput(f"room for bytes {offset} to {offset + size}; its region has {room.size}")
        return token, offset, room.memory[offset : offset + size]

    # -- connections -------------------------------------------------------------------------------

    def take(self, visitor: Visitor, data: bytes, fds: list[int]) -> None:
        """A client offers a region or a room: map it and say so. The visitor's connection is owned then.

        Args:
            visitor: Who offers it.
            data: The packet.
            fds: The descriptors that came along; the region's is taken out.

        Raises:
            PoolError: it is no region, or there is no room for it; the sentence says which.
            OSError: the client is gone.
        """
        if len(data) != wire.REGION_OFFER.size:
            raise WireError(f"{len(data)} bytes; wanted an offer of {wire.REGION_OFFER.size}")
        magic, version, size = wire.REGION_OFFER.unpack(data)
        is_room = magic == wire.ROOM_MAGIC
        if version != wire.REGION_VERSION:
            raise WireError(f"an offer of version {version}; wanted {wire.REGION_VERSION}")
        if len(fds) != 1:
            raise WireError(f"{len(fds)} descriptors with an offer; wanted 1")
        if not 0 < size <= REGION_MAX_BYTES:
            raise TooLarge(f"a region of {size} bytes; wanted 1 to {REGION_MAX_BYTES}")
        _check_memory(fds[0], size, self._device, _ROOM_SEALS if is_room else _SEALS)
        of_this = sum(other.pid == visitor.pid for other in self._owners.values())
        if len(self._regions) >= _REGIONS_MAX or of_this >= _REGIONS_OF_ONE_MAX:
            raise Unavailable(
                f"{of_this} regions of this process and {len(self._regions)} in all; "
                f"wanted at most {_REGIONS_OF_ONE_MAX} and {_REGIONS_MAX}"
            )
        rooms_bytes = sum(region.size for region in self._regions.values() if region.is_room)
        if is_room and rooms_bytes + size > _ROOMS_MAX_BYTES:
            raise Unavailable(
                f"a room of {size} bytes beside {rooms_bytes} of others; wanted at most {_ROOMS_MAX_BYTES}"
            )
        try:
            region = Region(fds.pop(), size, is_room=is_room)
        except OSError as e:
            raise Unavailable(f"the region cannot be mapped: {e.strerror}") from None
        # Whoever knows it may have rows read from this region.
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        visitor.sock.send(wire.REGION_GRANT.pack(magic, wire.REGION_VERSION, token, REGION_MAX_BYTES))
        self._regions[token] = region
        self._owners[token] = visitor
        self._loop.add_reader(visitor.sock.fileno(), self._on_readable, token)

    def _on_readable(self, token: bytes) -> None:
        """Its client has ended the connection; or says something, for which there is nothing to say."""
        sock = self._owners[token].sock
        with suppress(OSError):
            if sock.recv(1):
                error = WireError("a second region over one connection; wanted a connection for each")
                sock.send(wire.encode_error(0, error))
        self._drop(token)

    def _drop(self, token: bytes) -> None:
        """Forget a region; it ends with the last batch that runs on it."""
        sock = self._owners.pop(token).sock
        self._loop.remove_reader(sock.fileno())
        sock.close()
        del self._regions[token]


def _read_reference(frame: memoryview, name: str) -> tuple[bytes, int, int]:
    """Token, offset and size.

    Raises:
        WireError: it is none.
    """
    if len(frame) != wire.REFERENCE.size:
        raise WireError(f"{name} has {len(frame)} bytes; wanted a reference of {wire.REFERENCE.size}")
    token, offset, size = wire.REFERENCE.unpack(frame)
    return token, offset, size


def _check_memory(fd: int, size: int, device: int, wanted: int) -> None:
    """Make sure that a file can be used through a map without ever faulting (see above).

    Raises:
        InvalidInput: it is not an ordinary memfd, has not the seals that are wanted, or has a hole.
    """
    found = os.fstat(fd)
    if found.st_dev != device or not stat.S_ISREG(found.st_mode):
        raise InvalidInput("the descriptor is not one of an ordinary memfd")
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & wanted != wanted:
        names = " and ".join(name for seal, name in _SEAL_NAMES.items() if seal & wanted)
        raise InvalidInput(f"the memfd has the seals 0x{seals:x}; wanted {names} (0x{wanted:x})")
    if found.st_size < size:
        raise InvalidInput(f"the memfd has {found.st_size} bytes; the offer says {size}")
    whole = os.lseek(fd, 0, os.SEEK_HOLE)
    if whole < size:
        raise InvalidInput(f"the memfd has a hole at {whole}; wanted every page to be written")


def private(tensors: Sequence[memoryview], regions: Sequence[InputRegion]) -> list[memoryview | bytes]:
    """The same tensors, strings as copies: their offsets are checked and then used, unchanged in between.

    Args:
        tensors: As `Regions.resolve` gave them; perhaps not as many as there should be.
        regions: Of the slot, where they are to go.
    """
    wanted = iter(regions)
    return [
        bytes(tensor) if (region := next(wanted, None)) is not None and region.dtype == "string" else tensor
        for tensor in tensors
    ]
