"""Memory of a client that a worker runs on directly: passed to it once, then named by a number.

Rows that lie one after the other in a region need not be copied into the slot: the front has checked the
region (`pool.front.regions`), and a worker can map it as well. The front passes the region's
memfd over a `SOCK_SEQPACKET` pair of its own, which the worker reads when it is told to run on a region it
does not know. Whether it may be run on is settled by what can happen if the client writes meanwhile: an
answer of its own that makes no sense, and nothing else (`LENDABLE`).

    packet   0        4        8                 16      + the memfd (SCM_RIGHTS)
             +--------+--------+-----------------+
             | number |   0    |      size       |
             |  u32   |        |       u64       |
             +--------+--------+-----------------+

Where the tensors of a batch lie is written where they would lie otherwise, at the start of the slot's inputs
(`pool.shm.arena.TENSORS_OFFSET`): u32 number, u32 0, u64 offset for each input.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pool.shm.arena import ALIGN_BYTES, TENSORS_OFFSET

# What a number in the input can do is to be a wrong number. Integers of these sizes are not among them: they
# may be indices, which a model checks and then uses, and the client may change them in between.
LENDABLE = frozenset(
    ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "uint8", "int8", "bool")
)

_PASS = struct.Struct("<IIQ")
_PLACE = struct.Struct("<IIQ")
_MADV_POPULATE_READ = 22  # <linux/mman.h>, since Linux 5.14; not in Python's mmap


class Place(NamedTuple):
    """Where one tensor lies: the region's number and the offset in it, a multiple of 64."""

    number: int
    offset: int


def is_aligned(offset: int) -> bool:
    """Whether a framework can alias memory there: the region itself begins on a page."""
    return offset % ALIGN_BYTES == 0


def make_pair() -> tuple[socket.socket, socket.socket]:
    """The front's end and the worker's, both non-blocking: what a worker needs is there before it looks."""
    front, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    front.setblocking(False)
    worker.setblocking(False)
    return front, worker


def lend(sock: socket.socket, number: int, size: int, fd: int) -> None:
    """Pass a region to a worker.

    Raises:
        OSError: the worker has not read what was passed before, or is gone, or there are too many
            descriptors on their way.
    """
    socket.send_fds(sock, [_PASS.pack(number, 0, size)], [fd])


def write_places(slot: npt.NDArray[np.uint8], places: Sequence[Place]) -> None:
    """Note in a slot where the tensors of its batch lie."""
    for i, place in enumerate(places):
        _PLACE.pack_into(slot.data, TENSORS_OFFSET + i * _PLACE.size, place.number, 0, place.offset)


def read_places(slot: npt.NDArray[np.uint8], count: int) -> tuple[Place, ...]:
    """What `write_places` wrote."""
    places = []
    for i in range(count):
        number, _, offset = _PLACE.unpack_from(slot.data, TENSORS_OFFSET + i * _PLACE.size)
        places.append(Place(number, offset))
    return tuple(places)


class Borrowed:
    """The regions that a worker has.

    Args:
        sock: The worker's end.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._memories: dict[int, npt.NDArray[np.uint8]] = {}

    def memory(self, number: int) -> npt.NDArray[np.uint8]:
        """A region's bytes: uint8 [size]. Writes to them, if a model did such a thing, stay in this process.

        Raises:
            OSError: it cannot be mapped, or was not passed.
        """
        while number not in self._memories:
            passed, memory = self._receive()
            self._memories[passed] = memory
        return self._memories[number]

    def _receive(self) -> tuple[int, npt.NDArray[np.uint8]]:
        data, fds, _, _ = socket.recv_fds(self._sock, _PASS.size, 1)
        number, _, size = _PASS.unpack(data)
        try:
            # Private and writable, for numpy does not hand out read-only memory by DLPack.
            mapped = mmap.mmap(fds[0], size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fds[0])
        with suppress(OSError):  # an older kernel: pages come one after the other
            mapped.madvise(_MADV_POPULATE_READ)
        return number, np.frombuffer(mapped, np.uint8)

    def give_back(self, number: int) -> None:
        """Forget a region; unmapped once no view of it is left.

        It may never have been used: the batch that lay in it was taken back. Then it is still on its way, and
        in that socket it would stay alive.
        """
        with suppress(OSError):  # until nothing is left; what cannot be mapped is gone as well
            while number not in self._memories:
                passed, memory = self._receive()
                self._memories[passed] = memory
        self._memories.pop(number, None)

    def close(self) -> None:
        """Forget all, the socket too."""
        self._sock.close()
        self._memories.clear()
