"""Answers put into the memory of their client (`docs/wire.md` 7.4). Runs in the front.

A large answer goes to a client on this machine by two copies of the kernel's, packet by packet. A client that
has brought room for it gets it by one copy, at the speed of memory, and a message that says where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

from pool import wire
from pool.errors import PoolError
from pool.front.outbound import Outbound, access, log_results
from pool.front.regions import Regions
from pool.front.replies import Reply
from pool.front.slots import Slot, Ticket
from pool.shm.arena import align
from pool.wire import Flag, Header, Kind

# Smaller answers go in their message, as smaller requests do (`pool.client.region.SHARE_BYTES`).
PUT_BYTES = 128 << 10

Payload = memoryview | bytes


class Room:
    """The sink of one request that brought room for its answer.

    Args:
        outbound: Sends the messages, and what does not go there.
        regions: Of which the room is in one; counts the answers.
        token: Of the region.
        offset: Where the room begins in it.
        memory: The room, writable; the client's, which can change at any time.
    """

    def __init__(
        self, outbound: Outbound, regions: Regions, token: bytes, offset: int, memory: memoryview
    ) -> None:
        self._outbound = outbound
        self._regions = regions
        self._token = token
        self._offset = offset
        self._memory = memory

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Put the rows of the request there, and say so."""
        (ticket,) = tickets
        view = ticket.route.generation.views[slot.index]
        references = self._put(reply.payloads(view, ticket.start, ticket.rows))
        if references is None:
            self._outbound.send_results(tickets, reply, slot)
        else:
            self._send(ticket, reply, references, slot)

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """The same with a result joined from several batches."""
        references = self._put(frames)
        if references is None:
            self._outbound.send_frames(ticket, reply, frames)
        else:
            self._send(ticket, reply, references, None)

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send an error, which needs no room."""
        self._outbound.send_error(ticket, error)

    def _put(self, payloads: Sequence[Payload]) -> list[bytes] | None:
        """References to the tensors, written one behind the other; None if they are not to lie there."""
        sizes = list(map(len, payloads))
        if not PUT_BYTES <= sum(map(align, sizes)) <= len(self._memory):
            return None
        references = []
        at = 0
        for payload, size in zip(payloads, sizes, strict=True):
            self._memory[at : at + size] = payload
            references.append(wire.REFERENCE.pack(self._token, self._offset + at, size))
            at = align(at + size)
        return references

    def _send(self, ticket: Ticket, reply: Reply, references: list[bytes], slot: Slot | None) -> None:
        self._regions.answers += 1
        ticket.route.generation.metrics.answered("OK")
        if not access.is_off:
            log_results([ticket], slot)
        flags = reply.flags | Flag.REGION
        header = Header(Kind.RESULT, ticket.id, reply.meta, rows=ticket.rows, flags=flags)
        self._outbound.send_message(ticket.client, wire.encode_header(header), references)
