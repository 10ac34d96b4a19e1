"""Requests that are not wanted any more: cancelled, or of clients that are gone. Runs in the front.

However many there are, the tickets are walked through once: a storm of cancels must not cost its square.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pool.errors import Cancelled
from pool.front.clients import Client
from pool.front.engine import Engine
from pool.front.replies import Join
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
    joins: dict[int, Join] = {}
    requests: list[Ticket] = []
    for slot, part in engine.unsettled():
        join = part.sink if isinstance(part.sink, Join) else None
        request = part if join is None else join.whole
        client = request.client
        if type(client) is not Client:
            continue  # not an endpoint's
        if not client.is_gone and request.id not in cancelled.get(client, ()):
            continue
        parts.append((slot, part))
        if join is not None:
            if id(join) in joins:
                continue
            joins[id(join)] = join
        if client.is_gone:  # nobody to answer, but whoever counts answers is to miss none
            request.route.generation.metrics.answered(Cancelled.code)
        else:
            requests.append(request)
    engine.withdraw(parts)
    for join in joins.values():
        join.withdraw()
    return requests
