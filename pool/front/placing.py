"""The requests of a bundle to their slots: as many at once as fit. Runs in the front; does no I/O.

Whatever cannot be placed together with its neighbours goes the way of a request that came alone
(`Generation.place`), which splits it over slots or says why it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from pool.errors import InternalError, Overloaded, PoolError, WorkerLost
from pool.front.columns import Column, read_numeric
from pool.front.logs import Log
from pool.front.parts import Parts
from pool.front.replies import Join

if TYPE_CHECKING:
    from pool.front.generation import Generation

log = Log("pool.placing")

# Why some requests are refused, and their ids.
Refused = list[tuple[PoolError, list[int]]]


def place_parts(
    generation: Generation, parts: Parts, frames: Sequence[memoryview | bytes], now: float
) -> Refused:
    """Place the requests of a bundle, one after the other: `Generation.place` for many at the price of one.

    Args:
        generation: Where.
        parts: The requests.
        frames: Tensor payloads of all their rows together, in the request's order.
        now: Monotonic seconds.

    Returns:
        Those that are in no slot. Of a defect it is those that were not placed until then.

    Raises:
        WireError: a frame's size is not what the header says; nothing was placed.
    """
    columns = read_numeric(parts.route, parts.rows, frames)
    refused: Refused = []
    try:
        _place(generation, parts, columns, now, refused)
    except Exception as e:  # whoever was placed will be answered; the others must hear of it, each
        log.defect("cannot place a bundle")
        seen = _placed(generation, parts).union(id_ for _, ids in refused for id_ in ids)
        left = [id_ for id_ in parts.ids(0, len(parts)) if id_ not in seen]
        if left:
            refused.append((InternalError(f"{type(e).__name__} while handling the request"), left))
    return refused


def _place(
    generation: Generation, parts: Parts, columns: Sequence[Column], now: float, refused: Refused
) -> None:
    """As `place_parts`, but what was refused is added to `refused`, also if this raises."""
    batcher, route, account = generation.batcher, parts.route, parts.account
    barred = _barred(generation, parts, columns, now) if generation.poison else {}
    batcher.expect(now)
    first, count = 0, len(parts)
    while first < count:
        slot = generation.open_slot(parts.key, route.capacity)
        room = 0 if slot is None else min(slot.capacity - slot.rows, route.inflight_rows - account.rows)
        end = first
        if room > 0 and parts.deadline(first) >= now + batcher.expected_s:
            end = parts.fit(first, room)
            if barred:
                end = min(end, *(i for i in barred if i >= first), end)
        start = parts.start(first)
        if end > first:
            assert slot is not None, "there was room"
            ticket = parts.ticket(first, end)
            memory = generation.arena.slots[slot.index]
            try:
                for column in columns:
                    column.write(memory, slot.rows, start, ticket.rows)
            except BaseException:
                batcher.abandon(slot)
                raise
            batcher.commit(slot, ticket, now)
        else:  # the next one has to be split, waits for an empty slot, or is to be refused
            if slot is not None:
                batcher.abandon(slot)
            end = first + 1
            ticket = parts.ticket(first, end)
            try:
                if first in barred:
                    raise barred[first]
                spans = [column.span(start, ticket.rows) for column in columns]
                generation.place(ticket, spans, now)
            except PoolError as e:
                if isinstance(e, Overloaded):
                    # Where there is no room there is none for more rows, and what comes too late is too late
                    # for those that wait less. To look at each, and make a sentence of it, would cost an
                    # overloaded front most.
                    is_late = ticket.deadline - now < batcher.expected_s
                    latest = ticket.deadline if is_late else inf
                    end = parts.end_of_alike(first, route.inflight_rows, latest)
                    if barred:
                        end = min(end, *(i for i in barred if i > first), end)
                # Its traceback holds this frame, and with it the payloads.
                refused.append((e.with_traceback(None), parts.ids(first, end)))
        first = end


def _barred(
    generation: Generation, parts: Parts, columns: Sequence[Column], now: float
) -> dict[int, WorkerLost]:
    """Which requests killed a worker before, by their place in the bundle."""
    barred = {}
    for i in range(len(parts)):
        start, end = parts.start(i), parts.start(i + 1)
        spans = [column.span(start, end - start) for column in columns]
        refusal = generation.find_poison(parts.route, spans, now)
        if refusal is not None:
            barred[i] = refusal
    return barred


def _placed(generation: Generation, parts: Parts) -> set[int]:
    """The ids of those that wait for an answer."""
    tickets = [ticket for _, ticket in generation.batcher.unsettled()]
    wholes = [ticket.sink.whole if isinstance(ticket.sink, Join) else ticket for ticket in tickets]
    return {
        id_
        for whole in wholes
        if whole.client is parts.client and whole.turn is parts.turn
        for id_ in whole.ids
    }
