"""Requests that are not wanted any more: cancelled, or of clients that are gone. Runs in the front.

However many there are, the tickets are walked through once: a storm of cancels must not cost its square.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pool.errors import Cancelled
from pool.front.clients import Client
from pool.front.engine import Engine
from pool.front.replies import Compound
from pool.front.slots import Slot, Ticket


def withdraw(engine: Engine, cancelled: Mapping[Client, Collection[object]]) -> list[Ticket]:
    """Withdraw requests by id, and those of clients that are gone.

    Rows that wait for a worker are freed; the answers of those that run will be dropped. What clients that
    are gone had asked for counts as cancelled.

    Args:
        engine: Has them.
        cancelled: Ids, by client; those that are not outstanding are passed over.

    Returns:
        The cancelled requests, which are still to be answered.
    """
    parts: list[tuple[Slot, Ticket]] = []
    compounds: dict[int, Compound] = {}
    requests: list[Ticket] = []

    def is_unwanted(request: Ticket) -> bool:
        client = request.client
        if type(client) is not Client:
            return False  # not an endpoint's
        return client.is_gone or request.id in cancelled.get(client, ())

    if cancelled:
        split_cancelled(engine, cancelled)
    for slot, part in engine.unsettled():
        compound = part.sink if isinstance(part.sink, Compound) else None
        request = part if compound is None else compound.whole
        if is_unwanted(request):
            parts.append((slot, part))
            if compound is not None:
                compounds[id(compound)] = compound
            else:
                requests.append(request)
    for execution in engine.pipelines.executions:  # they may wait between slots
        if is_unwanted(execution.whole):
            compounds[id(execution)] = execution
    requests += [compound.whole for compound in compounds.values()]
    engine.withdraw(parts)
    for compound in compounds.values():
        compound.withdraw()
    gone = [request for request in requests if request.client.is_gone]
    for request in gone:  # nobody to answer, but whoever counts answers is to miss none
        request.route.generation.metrics.answered(Cancelled.code, request.requests)
    return [request for request in requests if not request.client.is_gone]


def split_cancelled(engine: Engine, cancelled: Mapping[Client, Collection[object]]) -> None:
    """Give tickets of their own to cancelled requests, and so to those they share one with."""
    found = [
        slot
        for slot, ticket in engine.unsettled()
        if ticket.requests > 1 and not set(cancelled.get(ticket.client, ())).isdisjoint(ticket.ids)
    ]
    for slot in {slot.index: slot for slot in found}.values():
        slot.split()
