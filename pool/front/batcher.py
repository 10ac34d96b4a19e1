"""Which rows run together, when, and on which worker. Pure; runs in the front, one per model.

Contract. The shell (the engine) calls, in this order, for each request:

    slot = batcher.open_slot(key, capacity)   # a slot with at least one free row, or None: overloaded
    …copy the rows into the slot at `slot.rows`…
    batcher.commit(slot, ticket, now)         # or batcher.abandon(slot) when the bytes were no good

and after any event that may let work start (rows committed, a worker became ready, the timer):

    for ticket in batcher.give_up(now): …refuse it: its answer would come too late…
    for slot, worker in batcher.dispatch(now): …ring that worker's doorbell…

A worker has at most two batches: the one it runs and the one *ahead*, which it begins as it ends the first,
whenever the front comes to hear of that. While `recallable(now)` gives a slot, take back what its worker has
not begun with, `recall` it and dispatch again.

When a worker answers: `finish(slot, now)`, send the answers, `release(slot)`, `worker_ready(worker)`.
When it dies: `worker_lost(worker)` at once, `recall(ahead, now)` and `reap(slot)` after the process is waited
for (or `recall(slot, now)`, if it is known that the worker had not begun), and only then may it be ready
again. `next_wakeup()` is when to call `expire(now)`, `overdue(now)` and `dispatch(now)` again if nothing else
happens before.

A batch that failed may run again: after `reap` its slot is HELD, and so it is after `hold` if the worker
answered with an error. A HELD slot is released, or requeued for any worker, or dispatched to one; before
that, `refill` says which of its tickets run now and which are set aside.

Policy. Work-conserving: a ready worker takes the oldest batch at once; while all are busy, rows gather
and batches grow by themselves. A batch that is full grows no more: it goes ahead to the worker that has been
busy longest, and comes back if another is ready first. With `max_queue_delay_s` > 0 a batch that still has
room waits that long for company even if a worker is idle. Requests with equal *key* run together. The low
two bits of a key are the priority, 0 to 3; batches of one priority wait in one *lane*, in the order of their
first rows. Of the lanes' first batches that may go, the one with the smallest `opened_at + priority *
ageing_s` goes: a batch waits for no batch of a higher priority that came later than by the difference in
priority times `ageing_s`, so that nothing starves.

Times are float seconds on one monotonic clock, always passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

from pool.front.forecast import Forecast
from pool.front.slots import LANES, Slot, Ticket
from pool.front.states import SlotEvent, SlotState, next_slot_state


class Batcher:
    """Slots and ready workers of one model.

    Args:
        slots: How many the arena has.
        max_queue_delay_s: Longest wait of a batch with room while a worker is idle.
        ageing_s: How much later than another a request of a priority one higher may come and still go
            first.
        timeout_s: Longest run of a batch.

    Attributes:
        load_of: Of a worker, how much others than this batcher have given it to do: the ready one that has
            least is taken. None if there are no others.
    """

    def __init__(
        self, slots: int, max_queue_delay_s: float = 0.0, ageing_s: float = 1.0, timeout_s: float = inf
    ) -> None:
        self.slots = [Slot(i) for i in range(slots)]
        self.max_queue_delay_s = max_queue_delay_s
        self.ageing_s = ageing_s
        self.timeout_s = timeout_s
        self.load_of: Callable[[int], int] | None = None
        self._forecast = Forecast()
        self._now = 0.0  # the last that was passed in
        self._expected_s: float | None = None  # not known since the last event
        # Last in, first out for both: the slot and the worker used last are the ones still in cache.
        self._free = list(reversed(self.slots))
        self._ready: list[int] = []
        self._open: dict[int, Slot] = {}  # slots that still have room; at most one per key
        # Slots with rows that no worker has, oldest first row first, full or not; by priority.
        self._lanes: tuple[deque[Slot], ...] = tuple(deque() for _ in range(LANES))
        self._queued = 0  # slots in all lanes
        self._running: dict[int, Slot] = {}  # by worker
        self._ahead: dict[int, Slot] = {}  # by worker: what it runs next
        self._spoilt: list[Slot] = []  # had a ticket settled while they were ahead
        self._without_ahead: list[int] = []  # workers that could take a batch ahead, longest busy first

    @property
    def has_queue(self) -> bool:
        """Whether rows wait that no worker has, or has not begun with."""
        return bool(self._queued or self._ahead)

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
        self.commit_all(slot, (ticket,), now)

    def commit_all(self, slot: Slot, tickets: Sequence[Ticket], now: float) -> None:
        """Admit tickets, at least one, whose rows the shell has just written one after the other."""
        if not slot.tickets:
            slot.opened_at = now
            self._lanes[slot.key & (LANES - 1)].append(slot)
            ahead = self._queued + len(self._ahead)
            self._forecast.begin(slot, ahead, len(self._ready), self._running.values(), now)
            self._queued += 1
            self.expect(now)
        end, earliest_deadline = slot.rows, slot.earliest_deadline
        for ticket in tickets:
            rows = ticket.rows
            ticket.start = end
            end += rows
            ticket.account.rows += rows
            if ticket.deadline < earliest_deadline:
                earliest_deadline = ticket.deadline
        slot.tickets += tickets
        slot.rows, slot.earliest_deadline = end, earliest_deadline
        if end >= slot.capacity:
            assert end == slot.capacity, "rows placed beyond the slot"
            del self._open[slot.key]
            self.expect(now)  # the next row goes to another slot, behind this one

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
        """A worker can take a batch: at once, or to run it after the one that it has."""
        assert worker not in self._ready, "worker is ready twice"
        assert worker not in self._without_ahead, "worker is ready twice"
        if worker in self._running:
            self._without_ahead.append(worker)
        else:
            self._ready.append(worker)
            self.expect(self._now)

    def worker_lost(self, worker: int) -> None:
        """A worker can take no more batches (it died or drains)."""
        if worker in self._without_ahead:
            self._without_ahead.remove(worker)
        elif worker in self._ready:
            self._ready.remove(worker)
            self.expect(self._now)

    def give_up(self, now: float) -> list[Ticket]:
        """Settle and give the tickets of a batch whose turn it is, but which would be done too late for all.

        A worker's time is then better spent on what waits behind it. Where nothing does, it runs all the
        same: it may be done sooner than expected.
        """
        given_up: list[Ticket] = []
        while self._queued > 1 and (self._ready or self._without_ahead):
            slot = self._next_batch(now)
            if slot is None or slot.runs:
                break
            ahead = 0 if self._ready else len(self._ahead)
            done_at = self._forecast.done_at(ahead, len(self._ready), self._running.values(), now)
            live = [ticket for ticket in slot.tickets if not ticket.is_settled]
            if slot.earliest_deadline >= done_at or max(ticket.deadline for ticket in live) >= done_at:
                break
            for ticket in live:
                ticket.is_settled = True
            given_up += live
            self._drop_if_settled(slot)
        return given_up

    def dispatch(self, now: float) -> list[tuple[Slot, int]]:
        """Give batches to workers, first to ready ones; the slots returned are theirs from now on."""
        actions: list[tuple[Slot, int]] = []
        while self._queued and (self._ready or self._without_ahead):
            slot = self._next_batch(now)
            if slot is None:
                break
            if self._ready:
                worker = self._ready.pop() if self.load_of is None else self._take_ready(self.load_of)
                self._without_ahead.append(worker)
            elif self._may_go_ahead(slot):
                worker = self._without_ahead.pop(0)
            else:
                break
            self._lanes[slot.priority].remove(slot)
            self._queued -= 1
            if self._open.get(slot.key) is slot:
                del self._open[slot.key]
                slot.closed_by = "overdue" if self.max_queue_delay_s else "idle_worker"
            elif slot.runs == 0:
                slot.closed_by = "full" if slot.rows == slot.capacity else "no_room"
            self.dispatch_to(slot, worker, now)
            actions.append((slot, worker))
        return actions

    def _take_ready(self, load_of: Callable[[int], int]) -> int:
        """The ready worker with the least to do for others; of several, the one used last."""
        best, least = -1, inf
        for i in reversed(range(len(self._ready))):
            load = load_of(self._ready[i])
            if load < least:
                best, least = i, load
        return self._ready.pop(best)

    def dispatch_to(self, slot: Slot, worker: int, now: float) -> None:
        """Give a batch that waits in no lane to a worker, ready or not the batcher's to know."""
        slot.state = next_slot_state(slot.state, SlotEvent.DISPATCH)
        slot.worker = worker
        slot.generation = (slot.generation + 1) & 0xFFFFFFFF  # u32 in the doorbell
        slot.given_at = slot.dispatched_at = now
        if slot.runs:
            slot.closed_by = "rerun"
        slot.runs += 1
        slot.is_overdue = False
        if worker in self._running:
            self._ahead[worker] = slot
        else:
            self._running[worker] = slot
        self.expect(now)

    def _next_batch(self, now: float) -> Slot | None:
        """The batch that goes next."""
        best: Slot | None = None
        best_due = inf
        for lane in self._lanes:
            for slot in lane:
                if self._may_go(slot, now):
                    if self._due(slot) < best_due:
                        best, best_due = slot, self._due(slot)
                    break
        return best

    def _due(self, slot: Slot) -> float:
        """What decides who goes first: the least."""
        return slot.opened_at + slot.priority * self.ageing_s

    def _may_go(self, slot: Slot, now: float) -> bool:
        return (
            self.max_queue_delay_s == 0.0
            or self._open.get(slot.key) is not slot
            or slot.opened_at + self.max_queue_delay_s <= now
        )

    def _may_go_ahead(self, slot: Slot) -> bool:
        """Whether nothing is lost if a busy worker has the batch already: it is full, and never failed."""
        return slot.runs == 0 and self._open.get(slot.key) is not slot

    def finish(self, slot: Slot, now: float) -> list[Ticket]:
        """The worker answered: the slot is the front's again. Gives the tickets still to be answered."""
        slot.state = next_slot_state(slot.state, SlotEvent.FINISH)
        slot.answered_at = now
        worker = slot.worker
        assert worker is not None, "a slot that ran has a worker"
        del self._running[worker]
        following = self._ahead.pop(worker, None)
        if following is not None:
            following.dispatched_at = now
            self._running[worker] = following
        elif worker in self._without_ahead:
            self._without_ahead.remove(worker)
        self._forecast.learn(slot, now)
        self.expect(now)
        return [ticket for ticket in slot.tickets if not ticket.is_settled]

    def release(self, slot: Slot) -> None:
        """Every answer has left the slot, or no ticket of a HELD one is to run again."""
        self._give_back(slot, SlotEvent.RELEASE)

    def _give_back(self, slot: Slot, event: SlotEvent) -> None:
        slot.state = next_slot_state(slot.state, event)
        for ticket in slot.tickets:
            ticket.account.rows -= ticket.rows
        for ticket in slot.aside:
            ticket.account.rows -= ticket.rows
        slot._clear()
        self._free.append(slot)

    def expect(self, now: float) -> None:
        """Have `expected_s` tell from now on how long a row placed now is likely to wait."""
        self._now = now
        self._expected_s = None

    @property
    def expected_s(self) -> float:
        """How long at most a row placed at the last event is likely to wait for its answer, as batches tell.

        0 while a worker is idle, for then it runs and tells more.
        """
        if self._expected_s is None:
            self._expected_s = self._expect()
        return self._expected_s

    def _expect(self) -> float:
        if self._ready and not self._queued:
            return 0.0
        # A slot that has room takes the row itself. With several, it may be none of them that does.
        ahead = self._queued + len(self._ahead) - (len(self._open) == 1 and self._queued > 0)
        done_at = self._forecast.done_at(ahead, len(self._ready), self._running.values(), self._now)
        return done_at - self._now + self._forecast.margin_s

    # -- taking back --------------------------------------------------------------------------------

    def recallable(self, now: float) -> Slot | None:
        """A batch that should not stay ahead of a busy worker.

        It holds rows that nobody waits for any more, or another worker has nothing to do, or a batch of a
        higher priority goes first.
        """
        while self._spoilt:
            slot = self._spoilt.pop()
            if slot.worker is not None and self._ahead.get(slot.worker) is slot:
                return slot
        if not self._ahead or not (self._ready or self._queued):
            return None
        slot = max(self._ahead.values(), key=self._due)
        if self._ready:
            return slot
        if any(self._lanes[: slot.priority]):
            first = self._next_batch(now)
            if first is not None and self._due(first) < self._due(slot):
                return slot
        return None

    def recall(self, slot: Slot, now: float) -> None:
        """Its worker has not begun with this batch, and never will: it waits again.

        A worker that is there begins at once, unless this is one of two batches. One that others give work
        too may have ended before.
        """
        worker = slot.worker
        assert worker is not None, "a slot that was given to a worker"
        slot.state = next_slot_state(slot.state, SlotEvent.RECALL)
        other = self._ahead.pop(worker, None)
        if other is None:
            del self._running[worker]
        elif other is not slot:
            self._running[worker] = other
            other.dispatched_at = now
        slot.worker = None
        slot.runs -= 1
        self._lanes[slot.priority].appendleft(slot)
        self._queued += 1
        self._drop_if_settled(slot)
        self.expect(now)

    # -- running again ------------------------------------------------------------------------------

    def reap(self, slot: Slot) -> list[Ticket]:
        """The slot's worker is dead and waited for: it is HELD. Gives the tickets still to be answered."""
        slot.state = next_slot_state(slot.state, SlotEvent.REAP)
        assert slot.worker is not None, "a slot that ran has a worker"
        del self._running[slot.worker]
        self.expect(self._now)
        return [ticket for ticket in slot.tickets if not ticket.is_settled]

    def hold(self, slot: Slot) -> None:
        """The batch of a DONE slot failed, and its rows are to run again: it is HELD."""
        slot.state = next_slot_state(slot.state, SlotEvent.HOLD)

    def refill(self, slot: Slot, tickets: Sequence[Ticket], aside: Sequence[Ticket]) -> None:
        """Say which tickets of a slot run now, and which later; what is in neither has left it.

        The shell writes the rows of `tickets` to the slot, one after the other from row 0.

        Args:
            slot: HELD, or dispatched and not told to its worker yet.
            tickets: Some of its tickets.
            aside: Others of its tickets.
        """
        kept = {id(ticket) for ticket in (*tickets, *aside)}
        for ticket in slot.everyone():
            if id(ticket) not in kept:
                ticket.account.rows -= ticket.rows
        slot.tickets = list(tickets)
        slot.aside = list(aside)
        slot.rows = 0
        for ticket in tickets:
            ticket.start = slot.rows
            slot.rows += ticket.rows
        slot.earliest_deadline = _earliest_deadline(slot)
        slot.has_ballast = False

    def requeue(self, slot: Slot) -> None:
        """Let the next ready worker take a HELD slot's tickets: they have waited longest."""
        assert slot.state is SlotState.HELD, "requeueing a slot that is not held"
        self._lanes[slot.priority].appendleft(slot)
        self._queued += 1
        self.expect(self._now)

    # -- time ---------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Ticket]:
        """Settle every ticket whose deadline has passed, waiting or running, and give them.

        A waiting batch without any ticket left is dropped; its rows never start.
        """
        expired: list[Ticket] = []
        for slot in self.slots:
            if slot.earliest_deadline > now:
                continue
            for ticket in slot.everyone():
                if not ticket.is_settled and ticket.deadline <= now:
                    ticket.is_settled = True
                    expired.append(ticket)
            slot.earliest_deadline = _earliest_deadline(slot)
            self._was_settled(slot)
        return expired

    def overdue(self, now: float) -> list[Slot]:
        """The batches that have run for too long since the last call; each is given once."""
        if self.timeout_s == inf:
            return []
        found = []
        for slot in self._running.values():
            if not slot.is_overdue and slot.dispatched_at + self.timeout_s <= now:
                slot.is_overdue = True
                found.append(slot)
        return found

    def look_again(self, slot: Slot, since: float) -> None:
        """A batch that was found overdue has run only since then: it may go on until its time is up."""
        slot.dispatched_at = since
        slot.is_overdue = False

    def _was_settled(self, slot: Slot) -> None:
        """A ticket of the slot was answered before its batch was done."""
        slot.has_ballast = True
        if slot.worker is not None and self._ahead.get(slot.worker) is slot:
            self._spoilt.append(slot)
        else:
            self._drop_if_settled(slot)

    def _drop_if_settled(self, slot: Slot) -> None:
        if slot not in self._lanes[slot.priority] or not all(t.is_settled for t in slot.everyone()):
            return
        self._lanes[slot.priority].remove(slot)
        self._queued -= 1
        if self._open.get(slot.key) is slot:
            del self._open[slot.key]
        event = SlotEvent.RELEASE if slot.state is SlotState.HELD else SlotEvent.ABANDON
        self._give_back(slot, event)
        self.expect(self._now)

    def withdraw(self, slot: Slot, ticket: Ticket) -> None:
        """The ticket's answer is not wanted any more; a waiting batch of such tickets alone is dropped."""
        ticket.is_settled = True
        self._was_settled(slot)

    def withdraw_all(self, found: Iterable[tuple[Slot, Ticket]]) -> None:
        """`withdraw` for many, with one look at each slot."""
        slots: dict[int, Slot] = {}
        for slot, ticket in found:
            ticket.is_settled = True
            slots[slot.index] = slot
        for slot in slots.values():
            self._was_settled(slot)

    def drop_waiting(self) -> list[Ticket]:
        """Settle and give every ticket that waits for a worker, by lane, oldest batch first."""
        dropped: list[Ticket] = []
        for lane in self._lanes:
            for slot in list(lane):
                for ticket in slot.everyone():
                    if not ticket.is_settled:
                        ticket.is_settled = True
                        dropped.append(ticket)
                self._was_settled(slot)
        return dropped

    def next_wakeup(self) -> float:
        """When the clock alone makes something due: a deadline, a batch that waited or ran long enough."""
        wakeup = inf
        for slot in self.slots:
            if slot.earliest_deadline < wakeup:
                wakeup = slot.earliest_deadline
        if self.timeout_s < inf:
            for slot in self._running.values():
                if not slot.is_overdue:
                    wakeup = min(wakeup, slot.dispatched_at + self.timeout_s)
        if self.max_queue_delay_s > 0.0 and self._ready:
            for lane in self._lanes:
                for slot in lane:
                    wakeup = min(wakeup, slot.opened_at + self.max_queue_delay_s)
        return wakeup

    # -- looking ------------------------------------------------------------------------------------

    @property
    def queue_rows(self) -> int:
        """Rows admitted that no worker has begun with."""
        waiting = sum(slot.rows for lane in self._lanes for slot in lane)
        return waiting + sum(slot.rows for slot in self._ahead.values())

    @property
    def is_idle(self) -> bool:
        """Whether every slot is FREE."""
        return len(self._free) == len(self.slots)

    def running(self) -> Iterable[Slot]:
        """Slots that workers run."""
        return self._running.values()

    def unsettled(self) -> Iterator[tuple[Slot, Ticket]]:
        """Every ticket that is still to be answered, with its slot."""
        for slot in self.slots:
            for ticket in slot.everyone():
                if not ticket.is_settled:
                    yield slot, ticket


def _earliest_deadline(slot: Slot) -> float:
    return min((ticket.deadline for ticket in slot.everyone() if not ticket.is_settled), default=inf)
