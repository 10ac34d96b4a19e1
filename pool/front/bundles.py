"""Answers to requests that came in bundles leave in bundles. Runs in the front.

A client that sends many requests at once sends them as one message (`docs/wire.md` 3.9). The rows of such
requests lie next to each other in a slot, and so do their answers: one message carries them back, at the
price of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pool.front.outbound import Outbound
from pool.front.replies import Reply
from pool.front.slots import Slot, Ticket


class Bundles:
    """The sink of requests that came in bundles: their answers may leave in bundles too.

    Args:
        outbound: Sends them.
    """

    def __init__(self, outbound: Outbound) -> None:
        self._outbound = outbound
        self.send_frames = outbound.send_frames
        self.send_error = outbound.send_error

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send together what belongs to one client and lies together in the slot."""
        if reply.numeric is None:
            self._outbound.send_results(tickets, reply, slot)
            return
        run: list[Ticket] = []
        client, end = None, -1
        for ticket in tickets:
            if ticket.start != end or ticket.client is not client:
                self._send_run(run, reply, slot)
                run = []
                client = ticket.client
            run.append(ticket)
            end = ticket.start + ticket.rows
        self._send_run(run, reply, slot)

    def _send_run(self, run: list[Ticket], reply: Reply, slot: Slot) -> None:
        if len(run) > 1:
            self._outbound.send_bundle(run, reply, slot)
        elif run:
            self._outbound.send_results(run, reply, slot)
