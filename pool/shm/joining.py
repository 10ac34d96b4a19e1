"""Other fronts that join a worker, which then serves them all. Used at both ends.

Only where several fronts share their workers (`[server] fronts`). A worker is started with the doorbell, the
arena and the regions of the front that leads. That front then passes it the ends of others, over a
`SOCK_SEQPACKET` pair of its own, a packet for each:

    packet   0        4        8                 16      + doorbell, regions' socket, arena (SCM_RIGHTS)
             +--------+--------+-----------------+
             | slots  |   0    |   slot_bytes    |
             |  u32   |        |       u64       |
             +--------+--------+-----------------+

A front leaves by closing its end of the doorbell, however it ended.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

_PACKET = struct.Struct("<IIQ")
_FDS = 3


class Joined(NamedTuple):
    """What a worker was passed of a front; the descriptors are the receiver's."""

    slots: int
    slot_bytes: int
    doorbell_fd: int
    loans_fd: int
    arena_fd: int


def make_pair() -> tuple[socket.socket, socket.socket]:
    """The front's end and the worker's, both non-blocking."""
    front, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    front.setblocking(False)
    worker.setblocking(False)
    return front, worker


def join(sock: socket.socket, slots: int, slot_bytes: int, fds: Sequence[int]) -> None:
    """Pass a worker its ends of doorbell and regions' socket, and the arena (the caller keeps its own).

    Raises:
        OSError: the worker is gone, or has not read what was passed before.
    """
    assert len(fds) == _FDS, "doorbell, regions, arena"
    socket.send_fds(sock, [_PACKET.pack(slots, 0, slot_bytes)], fds)


def receive(sock: socket.socket) -> Joined | None:
    """What was passed next; None when the front's end is closed.

    Raises:
        BlockingIOError: nothing is there.
    """
    data, fds, _, _ = socket.recv_fds(sock, _PACKET.size, _FDS, socket.MSG_CMSG_CLOEXEC)
    if len(data) < _PACKET.size:
        return None
    slots, _, slot_bytes = _PACKET.unpack(data)
    return Joined(slots, slot_bytes, *fds)
