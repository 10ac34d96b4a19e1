"""Results with their own time line (`docs/wire.md` 3.11). Runs in the front.

Such requests are rare and need not be fast: each is answered by a message of its own, copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pool import wire
from pool.errors import PoolError
from pool.front.outbound import Outbound, access, log_results
from pool.front.replies import Reply
from pool.front.slots import Slot, Ticket
from pool.wire import Flag, Header, Kind, TimelineMeta


class Timelines:
    """The sink of requests that ask for their time line.

    Args:
        outbound: Sends them.
    """

    def __init__(self, outbound: Outbound) -> None:
        self._outbound = outbound

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send each ticket its rows, with the stages it went through."""
        if not access.is_off:
            log_results(tickets, slot)
        for ticket in tickets:
            view = ticket.route.generation.views[slot.index]
            payloads = reply.payloads(view, ticket.start, ticket.rows)
            self._send(ticket, reply, payloads, timeline_of(ticket, slot))

    def send_frames(self, ticket: Ticket, reply: Reply, frames: list[bytes]) -> None:
        """Send a result joined from several batches."""
        if not access.is_off:
            log_results([ticket], None)
        self._send(ticket, reply, frames, timeline_of_several(ticket))

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send an error, which has no time line."""
        self._outbound.send_error(ticket, error)

    def _send(
        self, ticket: Ticket, reply: Reply, payloads: Sequence[memoryview | bytes], timeline: TimelineMeta
    ) -> None:
        ticket.route.generation.metrics.answered("OK")
        meta = wire.add_timeline(reply.meta, timeline)
        header = Header(Kind.RESULT, ticket.id, meta, rows=ticket.rows, flags=reply.flags | Flag.TIMELINE)
        self._outbound.send_message(ticket.client, wire.encode_header(header), payloads)


def timeline_of(ticket: Ticket, slot: Slot) -> TimelineMeta:
    """The stages of a request that ran in one batch, whose slot is not given back yet."""
    began_ns, ended_ns, *_ = ticket.route.generation.arena.read_run_record(slot.index)
    # An application's own turn ends with its loop's; a worker may take the batch before.
    received_at = min(ticket.turn.ended, slot.dispatched_at)
    started, received, dispatched, answered, now = _ns(
        ticket.turn.started, received_at, slot.dispatched_at, slot.answered_at, time.monotonic()
    )
    return TimelineMeta(
        received_ns=started,
        receive_ns=received - started,
        queue_ns=dispatched - received,
        run_ns=answered - dispatched,
        reply_ns=now - answered,
        model_ns=max(0, ended_ns - began_ns),
        batch_rows=slot.rows,
        worker=slot.place,
    )


def timeline_of_several(ticket: Ticket) -> TimelineMeta:
    """The stages of a request split over batches: all from the first to the last of them is its run."""
    started, received, now = _ns(ticket.turn.started, ticket.turn.ended, time.monotonic())
    return TimelineMeta(started, received - started, 0, now - received, 0, 0, 0, -1)


def _ns(*moments: float) -> tuple[int, ...]:
    """Monotonic seconds in ns."""
    return tuple(round(moment * 1e9) for moment in moments)
