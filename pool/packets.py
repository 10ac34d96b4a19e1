"""Messages on a line: frames to packets and back (`docs/wire.md` 8). Pure; used by client and front.

A line is a Unix socket of type SOCK_SEQPACKET between a client and a front, which carries the messages of
`pool.wire` past ZeroMQ. A message is its *table* followed by its frames:

     0             8             16           8 * (2 + frames)
     +-------------+-------------+------------+---------+---------+----
     | bytes, u64  | frames, u64 | sizes, u64 | frame 0 | frame 1 | …
     +-------------+-------------+------------+---------+---------+----
     of all this                  of each frame               (integers little-endian)

One that is longer than a packet may be goes in several, cut anywhere behind the table; only replies do.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from pool import wire
from pool.errors import WireError

# What the two say first: the client magic and version; the server the same and the most bytes that a request
# may have, or an ERROR.
HELLO = struct.Struct("<4sI")
WELCOME = struct.Struct("<4sIQ")
LINE_MAGIC = b"plln"
LINE_VERSION = 1

# Of a request, table included: what `pool.client.core` puts into a bundle and its header fit. One packet,
# which is as much as the kernel takes at once from a process without privileges (`net.core.wmem_max`: twice
# 212,992) with some room.
REQUEST_MAX_BYTES = 384 << 10

# Of a packet with a part of a reply. A receiver has a buffer of this size.
PACKET_MAX_BYTES = 128 << 10

_FRAMES_MAX = 2 + wire.MAX_TENSORS  # header, a bundle's table, tensors
_BEGINNING = struct.Struct("<QQ")
_TABLES = {n: struct.Struct(f"<{2 + n}Q") for n in range(1, _FRAMES_MAX + 1)}
TABLE_MAX_BYTES = _TABLES[_FRAMES_MAX].size


def make_table(frames: Sequence[Any]) -> bytes:
    """What goes before the frames of a message.

    Args:
        frames: At least one, each with a length in bytes.
    """
    sizes = list(map(len, frames))
    table = _TABLES[len(sizes)]
    return table.pack(table.size + sum(sizes), len(sizes), *sizes)


def message_bytes(packet: memoryview) -> int:
    """How long the message is that a packet begins; with its table.

    Raises:
        WireError: no message begins so.
    """
    if len(packet) < _BEGINNING.size:
        raise WireError(f"a packet of {len(packet)} bytes; wanted a message's table")
    total: int
    total, count = _BEGINNING.unpack_from(packet)
    if not 1 <= count <= _FRAMES_MAX:
        raise WireError(f"a message of {count} frames; wanted 1 to {_FRAMES_MAX}")
    table = _TABLES[count]
    if len(packet) < table.size:
        raise WireError(f"a packet of {len(packet)} bytes; wanted all {table.size} of its table")
    if table.size + sum(table.unpack_from(packet)[2:]) != total:
        raise WireError(f"a message of {total} bytes; its frames have others")
    return total


def split(message: memoryview) -> list[memoryview]:
    """The frames of a whole message, where they lie.

    Raises:
        WireError: it is none, or not all of it is there.
    """
    try:
        total, count = _BEGINNING.unpack_from(message)
        table = _TABLES[count]
        _, _, *sizes = table.unpack_from(message)
    except (struct.error, KeyError):
        total, sizes, at = -1, [], 0
    else:
        at = table.size
    frames = []
    for size in sizes:
        end = at + size
        frames.append(message[at:end])
        at = end
    if at != total or at != len(message):
        wanted = message_bytes(message)  # which says what is wrong with its beginning
        raise WireError(
            f"a packet of {len(message)} bytes for a message of {wanted}; wanted all of it in one"
        )
    return frames
