"""Which rows run together, when, and on which worker. Pure; runs in the front, one per model.

Contract. The shell (the engine) calls, in this order, for each request:

    slot = batcher.open_slot(key, capacity)   # a slot with at least one free row, or None: overloaded
    …copy the rows into the slot at `slot.rows`…
    batcher.commit(slot, ticket, now)         # or batcher.abandon(slot) when the bytes were no good

and after any event that may let work start (rows committed, a worker became ready, the timer):

    for slot, worker in batcher.dispatch(now): …ring that worker's doorbell…

When a worker answers: `finish(slot)`, send the answers, `release(slot)`, `worker_ready(worker)`. When
it dies: `worker_lost(worker)` at once, `reap(slot)` after the process is waited for. `next_wakeup()`
is when to call `expire(now)` and `dispatch(now)` again if nothing else happens before.

Policy. Work-conserving: a ready worker takes the oldest batch at once; while all are busy, rows gather
and batches grow by themselves. With `max_queue_delay_s` > 0 a batch that still has room waits that long
for company even if a worker is idle. Among the batches that may go, the one whose first row is oldest
goes first; requests with equal *key* (same signature, same per-row shapes) are served in order.

Times are float seconds on one monotonic clock, always passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import inf
from typing import Any

from pool.front.states import SlotEvent, SlotState, next_slot_state


class Ticket:
    """One admitted request's place in one batch (a request split over batches has one for each).

    The batcher reads and writes `rows`, `start`, `deadline` and `is_settled`; the rest is the shell's.

    Attributes:
        sink: Who takes the answer.
        client: The sink's name for the caller.
        id: The sink's name for the request.
        route: What the request was resolved to.
        rows: How many rows; may be 0.
        start: Its first row in the slot, set by `commit`.
        deadline: When its answer stops being wanted; `inf` for never.
        received_at: When it was admitted.
        is_settled: Whether it was answered already (expired or withdrawn): its rows are ballast.
    """

    __slots__ = (
        "client",
        "deadline",
        "id",
        "is_settled",
        "received_at",
        "route",
        "rows",
        "sink",
        "start",
    )

    def __init__(
        self, sink: Any, client: Any, id_: Any, route: Any, rows: int, deadline: float, received_at: float
    ) -> None:
        self.sink = sink
        self.client = client
        self.id = id_
        self.route = route
        self.rows = rows
        self.start = 0
        self.deadline = deadline
        self.received_at = received_at
        self.is_settled = False


class Slot:
    """The bookkeeping of one slot; its bytes are the arena's.

    Attributes:
        index: Its position in the arena.
        state: Who owns it (`pool.front.states`).
        key: What requests must share to be placed in it.
        capacity: Rows it holds for that key.
        rows: Rows placed.
        tickets: In order of placement.
        opened_at: When its first row was placed.
        dispatched_at: When it was given to `worker`.
        earliest_deadline: Of its unsettled tickets.
        generation: Counts dispatches: a stale answer carries an old number.
        pins: The shell's count of answers that still read the slot's bytes.
    """

    __slots__ = (
        "capacity",
        "dispatched_at",
        "earliest_deadline",
        "generation",
        "index",
        "key",
        "opened_at",
        "pins",
        "rows",
        "state",
        "tickets",
        "worker",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = SlotState.FREE
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.key = 0
        self.capacity = 0
        self.rows = 0
        self.tickets: list[Ticket] = []
        self.opened_at = 0.0
        self.dispatched_at = 0.0
        self.earliest_deadline = inf
        self.worker: int | None = None
        self.pins = 0


class Batcher:
    """Slots and ready workers of one model.

    Args:
        slots: How many the arena has.
        max_queue_delay_s: Longest wait of a batch with room while a worker is idle.
    """

    def __init__(self, slots: int, max_queue_delay_s: float = 0.0) -> None:
        self.slots = [Slot(i) for i in range(slots)]
        self.max_queue_delay_s = max_queue_delay_s
        # Last in, first out for both: the slot and the worker used last are the ones still in cache.
        self._free = list(reversed(self.slots))
        self._ready: list[int] = []
        self._open: dict[int, Slot] = {}  # slots that still have room; at most one per key
        self._queue: deque[Slot] = deque()  # slots with rows, oldest first row first, full or not

    # -- placing ------------------------------------------------------------------------------------

    def open_slot(self, key: int, capacity: int) -> Slot | None:
        """The slot that takes the next row of `key`: it has room. None when the arena is full."""
        slot = self._open.get(key)
        if slot is not None or not self._free:
            return slot
        slot = self._free.pop()
        slot.state = next_slot_state(slot.state, SlotEvent.OPEN)
        slot.key = key
        slot.capacity = capacity
        self._open[key] = slot
        return slot

    def free_rows(self, key: int, capacity: int) -> int:
        """How many rows of `key` could be admitted now."""
        slot = self._open.get(key)
        room = slot.capacity - slot.rows if slot is not None else 0
        return room + len(self._free) * capacity

    def commit(self, slot: Slot, ticket: Ticket, now: float) -> None:
        """Admit `ticket`, whose rows the shell has just written at `slot.rows`."""
        if not slot.tickets:
            slot.opened_at = now
            self._queue.append(slot)
        ticket.start = slot.rows
        slot.tickets.append(ticket)
        slot.rows += ticket.rows
        if ticket.deadline < slot.earliest_deadline:
            slot.earliest_deadline = ticket.deadline
        if slot.rows >= slot.capacity:
            assert slot.rows == slot.capacity, "rows placed beyond the slot"
            del self._open[slot.key]

    def close(self, slot: Slot) -> None:
        """Take no more rows into an open slot that has some (its string heap is full)."""
        assert slot.tickets, "closing a slot without rows"
        if self._open.get(slot.key) is slot:
            del self._open[slot.key]

    def abandon(self, slot: Slot) -> None:
        """Nothing was committed after `open_slot`: free the slot again if it holds no other rows."""
        if not slot.tickets:
            del self._open[slot.key]
            self._give_back(slot, SlotEvent.ABANDON)

    # -- running ------------------------------------------------------------------------------------

    def worker_ready(self, worker: int) -> None:
        """A worker can take a batch."""
        assert worker not in self._ready, "worker is ready twice"
        self._ready.append(worker)

    def worker_lost(self, worker: int) -> None:
        """A worker can take no more batches (it died or drains)."""
        if worker in self._ready:
            self._ready.remove(worker)

    def dispatch(self, now: float) -> list[tuple[Slot, int]]:
        """Give batches to ready workers; the slots returned are theirs from now on."""
        actions: list[tuple[Slot, int]] = []
        while self._ready and self._queue:
            slot = self._next_batch(now)
            if slot is None:
                break
            if self._open.get(slot.key) is slot:
                del self._open[slot.key]
            slot.state = next_slot_state(slot.state, SlotEvent.DISPATCH)
            slot.worker = self._ready.pop()
            slot.generation = (slot.generation + 1) & 0xFFFFFFFF  # u32 in the doorbell
            slot.dispatched_at = now
            actions.append((slot, slot.worker))
        return actions

    def _next_batch(self, now: float) -> Slot | None:
        if self.max_queue_delay_s == 0.0:
            return self._queue.popleft()
        for i, slot in enumerate(self._queue):
            if self._open.get(slot.key) is not slot or slot.opened_at + self.max_queue_delay_s <= now:
                del self._queue[i]
                return slot
        return None

    def finish(self, slot: Slot) -> list[Ticket]:
        """The worker answered: the slot is the front's again. Gives the tickets still to be answered."""
        slot.state = next_slot_state(slot.state, SlotEvent.FINISH)
        return [ticket for ticket in slot.tickets if not ticket.is_settled]

    def release(self, slot: Slot) -> None:
        """Every answer has left the slot."""
        self._give_back(slot, SlotEvent.RELEASE)

    def reap(self, slot: Slot) -> list[Ticket]:
        """The slot's worker is dead and waited for. Gives the tickets that it leaves unanswered."""
        tickets = [ticket for ticket in slot.tickets if not ticket.is_settled]
        self._give_back(slot, SlotEvent.REAP)
        return tickets

    def _give_back(self, slot: Slot, event: SlotEvent) -> None:
        slot.state = next_slot_state(slot.state, event)
        slot._clear()
        self._free.append(slot)

    # -- time ---------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Ticket]:
        """Settle every ticket whose deadline has passed, waiting or running, and give them.

        A waiting batch without any ticket left is dropped; its rows never start.
        """
        expired: list[Ticket] = []
        for slot in self.slots:
            if slot.earliest_deadline > now:
                continue
            earliest = inf
            for ticket in slot.tickets:
                if ticket.is_settled:
                    continue
                if ticket.deadline <= now:
                    ticket.is_settled = True
                    expired.append(ticket)
                elif ticket.deadline < earliest:
                    earliest = ticket.deadline
            slot.earliest_deadline = earliest
            self._drop_if_settled(slot)
        return expired

    def _drop_if_settled(self, slot: Slot) -> None:
        if slot.state is SlotState.OPEN and all(ticket.is_settled for ticket in slot.tickets):
            self._queue.remove(slot)
            if self._open.get(slot.key) is slot:
                del self._open[slot.key]
            self._give_back(slot, SlotEvent.ABANDON)

    def withdraw(self, slot: Slot, ticket: Ticket) -> None:
        """The ticket's answer is not wanted any more; a waiting batch of such tickets alone is dropped."""
        ticket.is_settled = True
        self._drop_if_settled(slot)

    def drop_waiting(self) -> list[Ticket]:
        """Settle and give every ticket that no worker has started, oldest batch first."""
        dropped: list[Ticket] = []
        for slot in list(self._queue):
            for ticket in slot.tickets:
                if not ticket.is_settled:
                    ticket.is_settled = True
                    dropped.append(ticket)
            self._drop_if_settled(slot)
        return dropped

    def next_wakeup(self) -> float:
        """When the clock alone makes something due: a deadline, or a batch that waited long enough."""
        wakeup = inf
        for slot in self.slots:
            if slot.earliest_deadline < wakeup:
                wakeup = slot.earliest_deadline
        if self.max_queue_delay_s > 0.0 and self._ready:
            for slot in self._queue:
                wakeup = min(wakeup, slot.opened_at + self.max_queue_delay_s)
        return wakeup

    # -- looking ------------------------------------------------------------------------------------

    @property
    def queue_rows(self) -> int:
        """Rows admitted that no worker has started."""
        return sum(slot.rows for slot in self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether every slot is FREE."""
        return len(self._free) == len(self.slots)

    def running(self) -> Iterable[Slot]:
        """Slots that belong to workers."""
        return (slot for slot in self.slots if slot.state is SlotState.RUNNING)
