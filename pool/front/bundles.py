"""Answers to requests that came in bundles leave in bundles. Runs in the front.

A client that sends many requests at once sends them as one message (`docs/wire.md` 3.9). The rows of such
requests lie next to each other in a slot, and so do their answers: one message carries them back, at the
price of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pool.front.replies import Reply
from pool.front.slots import Slot, Ticket

if TYPE_CHECKING:
    from pool.front.endpoint import Endpoint


class Bundles:
    """The sink of requests that came in bundles: their answers may leave in bundles too.

    Args:
        endpoint: Sends them.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.send_frames = endpoint.send_frames
        self.send_error = endpoint.send_error

    def send_results(self, tickets: Sequence[Ticket], reply: Reply, slot: Slot) -> None:
        """Send together what belongs to one client and lies together in the slot."""
        if reply.numeric is None:
            self._endpoint.send_results(tickets, reply, slot)
            return
        run: list[Ticket] = []
        client, end = None, -1
        for ticket in tickets:
            if ticket.start != end or ticket.client != client:
                self._send_run(run, reply, slot)
                run = []
                client = ticket.client
            run.append(ticket)
            end = ticket.start + ticket.rows
        self._send_run(run, reply, slot)

    def _send_run(self, run: list[Ticket], reply: Reply, slot: Slot) -> None:
        if len(run) > 1:
            self._endpoint.send_bundle(run, reply, slot)
        elif run:
            self._endpoint.send_results(run, reply, slot)
