"""Answers leave in bundles where requests came in bundles, or by region. Runs in the front.

A client that sends many requests at once sends them as one message (`docs/wire.md` 3.9), large ones by
references (7.3). The rows of such requests lie next to each other in a slot, and so do their answers: one
message carries them back, at the price of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pool.errors import PoolError
from pool.front.outbound import Outbound
from pool.front.replies import Reply
from pool.front.slots import Slot, Ticket
from pool.wire import MAX_PARTS

# Rows of one message: a client is to read the first before the last have left.
_ROWS_BYTES = 1 << 20


class Bundles:
    """The sink of requests whose answers may leave in bundles.

    Args:
        outbound: Sends them.
    """

    def __init__(self, outbound: Outbound) -> None:
        self._outbound = outbound
        self.send_frames = outbound.send_frames

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send together what belongs to one client and lies together in the slot."""
        if reply.numeric is None:
            alone = [each for ticket in tickets for each in ticket.split()]
            self._outbound.send_results(alone, reply, slot)
            return
        run: list[Ticket] = []
        client, end, requests, most = None, -1, 0, -1
        for ticket in tickets:
            start, requests = ticket.start, requests + ticket.requests
            if (
                start != end
                or ticket.client is not client
                or requests > MAX_PARTS
                or start + ticket.rows > most
            ):
                self._send_run(run, reply, slot)
                run = []
                client, requests, most = ticket.client, ticket.requests, start + self._most_rows(reply)
            run.append(ticket)
            end = start + ticket.rows
        self._send_run(run, reply, slot)

    @staticmethod
    def _most_rows(reply: Reply) -> int:
        return _ROWS_BYTES // max(1, reply.row_bytes)

    def _send_run(self, run: list[Ticket], reply: Reply, slot: Slot) -> None:
        if len(run) > 1 or (run and run[0].requests > 1):
            self._outbound.send_bundle(run, reply, slot)
        elif run:
            self._outbound.send_results(run, reply, slot)

    def send_error(self, ticket: Ticket, error: PoolError) -> None:
        """Send the typed error that its requests end with."""
        self._outbound.refuse_bundled(ticket.client, ticket.ids, error, ticket.route.generation.metrics)
