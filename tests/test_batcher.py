"""The batcher, driven at random by the calls the engine makes, beside a plain model of what must hold."""

from __future__ import annotations

from collections import deque
from math import inf
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pool.front.batcher import Batcher
from pool.front.slots import Account, Ticket, Turn
from pool.front.states import IllegalTransition, SlotState

# Rows of a slot, by key. Keys 4 to 7 are one layout in four priorities; 8 and 12 are others, priority 0.
CAPACITY = {4: 4, 5: 4, 6: 4, 7: 4, 8: 7, 12: 1}
KEYS = sorted(CAPACITY)
AGEING_S = 1.5
WORKERS = range(3)


class Placed:
    """What the model knows of one admitted ticket."""

    def __init__(self, ticket, key, number):
        self.ticket = ticket
        self.key = key
        self.number = number  # order of admission, over all keys
        self.answers = 0


class Mirror:
    """What the model knows of one slot: its owner, and a stand-in for its bytes."""

    def __init__(self):
        self.state = SlotState.FREE
        self.clear()

    def clear(self):
        self.key = None
        self.placed = []
        self.bytes = []  # one entry a row: who wrote it
        self.takes_more = False
        self.opened_at = None
        self.worker = None
        self.aside = []
        self.is_queued = False  # HELD, and waiting for any worker
        self.dispatched_at = None
        self.dropped = []  # settled before it was dispatched

    @property
    def everyone(self):
        return [*self.placed, *self.aside]

    @property
    def rows(self):
        return len(self.bytes)

    @property
    def has_live_tickets(self):
        return any(not each.ticket.is_settled for each in self.everyone)


class BatcherMachine(RuleBasedStateMachine):
    """Rules are the engine's calls; after each, the batcher and the model must agree."""

    @initialize(
        slots=st.integers(1, 4), delay=st.sampled_from([0.0, 0.0, 2.0]), timeout=st.sampled_from([inf, 1.0])
    )
    def make(self, slots, delay, timeout):
        self.now = 100.0
        self.delay = delay
        self.batcher = Batcher(slots, delay, AGEING_S, timeout)
        self.timeout = timeout
        self.accounts = [Account(), Account()]
        self.requeued = []
        self.overdue = set()
        self.mirrors = {slot: Mirror() for slot in self.batcher.slots}
        self.placed = []
        self.ready = set()
        self.busy = {}  # worker -> slot
        self.ahead = {}  # worker -> slot it runs next
        self.takes_ahead = []  # busy workers that could have one, longest busy first
        self.begun = set()  # slots that were ahead and could not be taken back
        self.dead = []  # slots whose worker died and is not waited for yet

    # -- what the model expects ---------------------------------------------------------------------

    def mirrors_in(self, state):
        return [slot for slot, mirror in self.mirrors.items() if mirror.state is state]

    def open_for(self, key):
        for slot in self.mirrors_in(SlotState.OPEN):
            if self.mirrors[slot].key == key and self.mirrors[slot].takes_more:
                return slot
        return None

    def waiting(self):
        """Slots that wait for a worker, by lane: those that run again first, then oldest first row first."""
        slots = [slot for slot in self.mirrors_in(SlotState.OPEN) if self.mirrors[slot].placed]
        slots = [slot for slot in slots if not self.mirrors[slot].is_queued]
        slots.sort(key=lambda slot: (slot.key & 3, self.mirrors[slot].placed[0].number))
        again = [slot for slot in reversed(self.requeued) if self.mirrors[slot].is_queued]
        return sorted([*again, *slots], key=lambda slot: slot.key & 3)

    def goes_next(self):
        """Of the lanes' first batches that may go, that which waits for no other."""
        firsts = {}
        for slot in self.waiting():
            if self.is_due(slot):
                firsts.setdefault(slot.key & 3, slot)
        return min(firsts.values(), key=lambda slot: (self.due(slot), slot.key & 3), default=None)

    def due(self, slot):
        return slot.opened_at + (slot.key & 3) * AGEING_S

    def is_due(self, slot):
        mirror = self.mirrors[slot]
        return (
            self.delay == 0
            or mirror.is_queued
            or not mirror.takes_more
            or mirror.opened_at + self.delay <= self.now
        )

    def free(self, slot):
        self.mirrors[slot].state = SlotState.FREE
        self.mirrors[slot].clear()

    def drop_settled(self):
        for slot in self.waiting():
            if not self.mirrors[slot].has_live_tickets:
                self.free(slot)

    def answer(self, tickets):
        """What the shell does with tickets it is given: answer each, once."""
        for each in tickets:
            placed = next(p for p in self.placed if p.ticket is each)
            placed.answers += 1
            each.is_settled = True

    # -- placing ------------------------------------------------------------------------------------

    @rule(
        key=st.sampled_from(KEYS),
        rows=st.integers(0, 9),
        timeout=st.sampled_from([inf, inf, 0.5, 1.0, 3.0]),
    )
    def place(self, key, rows, timeout):
        mine = self.open_for(key)
        room = CAPACITY[key] - self.mirrors[mine].rows if mine else 0
        free = len(self.mirrors_in(SlotState.FREE))
        assert self.batcher.free_rows(key, CAPACITY[key]) == room + free * CAPACITY[key]
        slot = self.batcher.open_slot(key, CAPACITY[key])
        if slot is None:
            assert mine is None
            assert free == 0
            return
        mirror = self.mirrors[slot]
        if mine is None:
            assert mirror.state is SlotState.FREE
            mirror.state, mirror.key, mirror.takes_more = SlotState.OPEN, key, True
        else:
            assert slot is mine
        assert slot.capacity == CAPACITY[key]
        assert slot.rows == mirror.rows < slot.capacity
        rows = min(rows, slot.capacity - slot.rows)
        placed = Placed(
            Ticket(
                None, None, None, None, rows, self.now + timeout, Turn(self.now), key, self.accounts[rows % 2]
            ),
            key,
            len(self.placed),
        )
        self.placed.append(placed)
        if not mirror.placed:
            mirror.opened_at = self.now
        mirror.placed.append(placed)
        mirror.bytes += [placed] * rows
        mirror.takes_more = mirror.rows < CAPACITY[key]
        self.batcher.commit(slot, placed.ticket, self.now)

    @rule(key=st.sampled_from(KEYS))
    def open_and_abandon(self, key):
        mine = self.open_for(key)
        slot = self.batcher.open_slot(key, CAPACITY[key])
        if slot is not None:
            assert mine in (None, slot)
            self.batcher.abandon(slot)

    @rule(key=st.sampled_from(KEYS))
    def close(self, key):
        slot = self.open_for(key)
        if slot is not None:
            self.batcher.close(slot)
            self.mirrors[slot].takes_more = False

    # -- running ------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS))
    def worker_ready(self, worker):
        if worker in self.ready or worker in self.takes_ahead or worker in self.ahead:
            return
        if any(self.mirrors[slot].worker == worker for slot in self.dead):
            return
        self.batcher.worker_ready(worker)
        if worker in self.busy:
            self.takes_ahead.append(worker)
        else:
            self.ready.add(worker)

    @rule(worker=st.sampled_from(WORKERS))
    def worker_lost(self, worker):
        self.batcher.worker_lost(worker)
        self.ready.discard(worker)
        if worker in self.takes_ahead:
            self.takes_ahead.remove(worker)
        if worker in self.busy:
            self.dead.append(self.busy.pop(worker))

    @rule(data=st.data())
    def dispatch_and_take_back(self, data):
        self.dispatch()
        while (slot := self.batcher.recallable(self.now)) is not None:
            assert slot in self.ahead.values()
            if not self.ready and not self.settled_since(slot):
                assert self.due(self.goes_next()) < self.due(slot), "there was no reason"
            if data.draw(st.booleans(), "its worker has begun with it"):
                self.begun.add(slot)
                return
            worker = self.mirrors[slot].worker
            if worker in self.busy and data.draw(st.booleans(), "its worker has got that one alone"):
                slot = self.busy[worker]
            self.recall(slot)
            self.dispatch()
        assert not (self.ready and self.ahead), "a batch waits for a busy worker while another idles"
        first = self.goes_next()
        for slot in self.ahead.values():
            urgent = first is not None and first.key & 3 < slot.key & 3 and self.due(first) < self.due(slot)
            assert not urgent, "the batch that goes next waits for another"
        for slot in {*self.ahead.values()} - self.begun:
            assert self.settled_since(slot) == [], "is about to run"

    def settled_since(self, slot):
        """Tickets settled after the slot was dispatched: its shell drops the rows of others before."""
        mirror = self.mirrors[slot]
        return [each for each in mirror.placed if each.ticket.is_settled and each not in mirror.dropped]

    def recall(self, slot):
        self.batcher.recall(slot, self.now)
        mirror = self.mirrors[slot]
        other = self.ahead.pop(mirror.worker)
        if other is not slot:
            self.busy[mirror.worker] = other
            self.mirrors[other].dispatched_at = self.now
        mirror.state, mirror.worker, mirror.is_queued = SlotState.OPEN, None, True
        self.requeued = [each for each in self.requeued if each is not slot] + [slot]
        self.drop_settled()

    def dispatch(self):
        for slot, worker in self.batcher.dispatch(self.now):
            assert slot is self.goes_next(), "not the batch whose turn it is"
            assert 0 <= slot.rows <= slot.capacity
            assert slot.dispatched_at == self.now
            assert slot.worker == worker
            if self.ready:
                assert worker in self.ready
                self.ready.remove(worker)
                self.takes_ahead.append(worker)
                self.busy[worker] = slot
            else:
                assert worker == self.takes_ahead.pop(0), "not the worker that is likely to be free first"
                assert not self.mirrors[slot].takes_more, "rows that come could have joined it"
                assert slot.runs == 1, "who failed before may take down another"
                self.ahead[worker] = slot
            self.ran(slot, worker)
        assert not (self.ready and any(map(self.is_due, self.waiting()))), "a ready worker idles"

    def ran(self, slot, worker):
        mirror = self.mirrors[slot]
        mirror.state, mirror.takes_more, mirror.worker = SlotState.RUNNING, False, worker
        mirror.is_queued = False
        mirror.dispatched_at = self.now
        mirror.dropped = [each for each in mirror.placed if each.ticket.is_settled]
        self.overdue.discard(slot)
        self.begun.discard(slot)

    def finished(self, worker):
        """What becomes of a worker that answered, until it is said to be ready."""
        if worker in self.takes_ahead:
            self.takes_ahead.remove(worker)
        if worker in self.ahead:
            self.busy[worker] = self.ahead.pop(worker)
            self.mirrors[self.busy[worker]].dispatched_at = self.now

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def finish(self, data):
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        slot = self.busy.pop(worker)
        mirror = self.mirrors[slot]
        tickets = self.batcher.finish(slot, self.now)
        self.finished(worker)
        assert tickets == [each.ticket for each in mirror.placed if not each.ticket.is_settled]
        for each in mirror.placed:
            start = each.ticket.start
            assert mirror.bytes[start : start + each.ticket.rows] == [each] * each.ticket.rows, "not its rows"
        mirror.state = SlotState.DONE
        if data.draw(st.booleans(), "the batch raised"):
            self.batcher.hold(slot)
            mirror.state = SlotState.HELD
        else:
            self.answer(tickets)

    def idle_held(self):
        return [slot for slot in self.mirrors_in(SlotState.HELD) if not self.mirrors[slot].is_queued]

    @precondition(lambda self: self.idle_held())
    @rule(data=st.data())
    def run_again(self, data):
        """Some of a failed batch's tickets run now, some later, some have left; or all have."""
        slot = data.draw(st.sampled_from(self.idle_held()))
        mirror = self.mirrors[slot]
        live = [each for each in mirror.everyone if not each.ticket.is_settled]
        fates = data.draw(st.lists(st.sampled_from(["now", "later", "gone"]), min_size=len(live)))
        now, later, gone = (
            [each for each, fate in zip(live, fates, strict=False) if fate == wanted]
            for wanted in ("now", "later", "gone")
        )
        self.answer([each.ticket for each in gone])
        if not now:
            self.answer([each.ticket for each in later])
            self.batcher.release(slot)
            self.free(slot)
            return
        self.batcher.refill(slot, [each.ticket for each in now], [each.ticket for each in later])
        mirror.placed, mirror.aside = now, later
        mirror.bytes = [each for each in now for _ in range(each.ticket.rows)]
        if data.draw(st.booleans(), "to a worker of its own"):
            worker = 100 + slot.index
            self.batcher.dispatch_to(slot, worker, self.now)
            self.busy[worker] = slot
            self.ran(slot, worker)
        else:
            self.batcher.requeue(slot)
            mirror.is_queued = True
            self.requeued = [each for each in self.requeued if each is not slot] + [slot]

    @rule()
    def give_up(self):
        waiting = self.waiting()
        given_up = self.batcher.give_up(self.now)
        held = [each.ticket for slot in waiting for each in self.mirrors[slot].placed]
        assert all(any(ticket is each for each in held) for ticket in given_up), "it does not wait"
        self.answer(given_up)
        gone = {slot for slot in waiting if not self.mirrors[slot].has_live_tickets}
        assert given_up == [
            each.ticket
            for slot in waiting
            if slot in gone
            for each in self.mirrors[slot].placed
            if id(each.ticket) in set(map(id, given_up))
        ]
        assert not gone or len(gone) < len(waiting), "nothing is left to spend the time on"
        assert not gone & set(self.requeued), "what ran before is not refused"
        assert all(ticket.deadline < inf for ticket in given_up)
        self.drop_settled()

    @rule()
    def give_up_the_overdue(self):
        due = {
            slot
            for slot in [*self.busy.values(), *self.dead]
            if self.mirrors[slot].dispatched_at + self.timeout <= self.now
        }
        found = set(self.batcher.overdue(self.now))
        assert found == due - self.overdue, "an overdue batch is given once"
        self.overdue |= found

    @precondition(lambda self: self.mirrors_in(SlotState.DONE))
    @rule(data=st.data())
    def release(self, data):
        slot = data.draw(st.sampled_from(self.mirrors_in(SlotState.DONE)))
        self.batcher.release(slot)
        self.free(slot)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def reap(self, data):
        slot = data.draw(st.sampled_from(self.dead))
        self.dead.remove(slot)
        if self.mirrors[slot].worker in self.ahead:
            self.recall(self.ahead[self.mirrors[slot].worker])
        expected = [each.ticket for each in self.mirrors[slot].placed if not each.ticket.is_settled]
        tickets = self.batcher.reap(slot)
        assert tickets == expected
        self.mirrors[slot].state = SlotState.HELD

    # -- time ---------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, 2.0, 10.0]))
    def advance(self, seconds):
        self.now += seconds

    @rule()
    def advance_to_wakeup(self):
        wakeup = self.batcher.next_wakeup()
        if wakeup < inf:
            self.now = max(self.now, wakeup)
            self.expire()
            self.give_up_the_overdue()
            self.dispatch()
            assert self.batcher.next_wakeup() > self.now, "the timer would spin"

    @rule()
    def expire(self):
        due = [each.ticket for each in self.placed if not each.ticket.is_settled]
        due = [ticket for ticket in due if ticket.deadline <= self.now]
        expired = self.batcher.expire(self.now)
        assert sorted(map(id, expired)) == sorted(map(id, due)), "expired tickets are given exactly once"
        assert all(ticket.is_settled for ticket in expired)
        self.answer(expired)
        self.drop_settled()

    @rule(data=st.data())
    def withdraw(self, data):
        live = [
            (slot, each)
            for slot, mirror in self.mirrors.items()
            for each in mirror.everyone
            if not each.ticket.is_settled
        ]
        if live:
            slot, placed = data.draw(st.sampled_from(live))
            self.batcher.withdraw(slot, placed.ticket)
            placed.answers += 1  # its shell has answered for it
            self.drop_settled()

    @rule()
    def drop_waiting(self):
        expected = [
            each.ticket
            for slot in self.waiting()
            for each in self.mirrors[slot].everyone
            if not each.ticket.is_settled
        ]
        dropped = self.batcher.drop_waiting()
        assert dropped == expected, "not the oldest batch first"
        assert all(ticket.is_settled for ticket in dropped)
        self.answer(dropped)
        self.drop_settled()

    # -- what always holds --------------------------------------------------------------------------

    def earliest_deadline(self):
        live = [each.ticket.deadline for each in self.placed if not each.ticket.is_settled]
        return min(live, default=inf)

    @invariant()
    def slots_agree(self):
        for slot, mirror in self.mirrors.items():
            assert slot.state is mirror.state
            assert slot.rows == mirror.rows
            assert slot.tickets == [each.ticket for each in mirror.placed]
            assert slot.aside == [each.ticket for each in mirror.aside]
            assert slot.worker == mirror.worker
        assert set(self.batcher.running()) == {*self.busy.values(), *self.dead}
        assert self.batcher.is_idle == all(m.state is SlotState.FREE for m in self.mirrors.values())

    @invariant()
    def nothing_waits_without_a_ticket_to_answer(self):
        for slot in self.waiting():
            assert self.mirrors[slot].has_live_tickets
        not_begun = [*self.waiting(), *self.ahead.values()]
        assert self.batcher.queue_rows == sum(self.mirrors[slot].rows for slot in not_begun)

    @invariant()
    def the_timer_is_never_late(self):
        due = self.earliest_deadline()
        if self.ready and self.delay > 0:
            for slot in self.waiting():
                due = min(due, self.mirrors[slot].opened_at + self.delay)
        for slot in {*self.busy.values(), *self.dead} - self.overdue:
            due = min(due, self.mirrors[slot].dispatched_at + self.timeout)
        assert self.batcher.next_wakeup() <= due

    @invariant()
    def accounts_hold_what_lies_in_slots(self):
        for number, account in enumerate(self.accounts):
            lying = [each.ticket for mirror in self.mirrors.values() for each in mirror.everyone]
            assert account.rows == sum(t.rows for t in lying if t.account is self.accounts[number])

    @invariant()
    def nothing_is_expected_of_an_idle_worker(self):
        assert self.batcher.expected_s >= 0
        if self.ready and not self.waiting():
            assert self.batcher.expected_s == 0

    @invariant()
    def nobody_is_answered_twice(self):
        for each in self.placed:
            assert each.answers == (1 if each.ticket.is_settled else 0)

    def teardown(self):
        """Drain: everything admitted is finished, every ticket answered once, every slot FREE."""
        if not hasattr(self, "batcher"):
            return
        for _ in range(1 + len(self.batcher.slots)):  # each turn empties one at least
            for slot in list(self.dead):
                if self.mirrors[slot].worker in self.ahead:
                    self.recall(self.ahead[self.mirrors[slot].worker])
                self.batcher.reap(slot)
                self.dead.remove(slot)
                self.mirrors[slot].state = SlotState.HELD
            for slot in self.idle_held():
                self.answer([each for each in slot.everyone() if not each.is_settled])
                self.batcher.release(slot)
                self.free(slot)
            for worker, slot in list(self.busy.items()):
                self.answer(self.batcher.finish(slot, self.now))
                self.answer([each for each in slot.aside if not each.is_settled])
                del self.busy[worker]
                self.finished(worker)
                self.mirrors[slot].state = SlotState.DONE
            for slot in self.mirrors_in(SlotState.DONE):
                self.batcher.release(slot)
                self.free(slot)
            self.now += self.delay
            self.worker_ready(0)
            self.dispatch()
        assert self.batcher.is_idle
        assert all(slot.state is SlotState.FREE for slot in self.batcher.slots)
        assert all(each.answers == 1 for each in self.placed)
        assert self.batcher.next_wakeup() == inf
        assert self.batcher.queue_rows == 0
        assert [account.rows for account in self.accounts] == [0, 0]


BatcherMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBatcher = BatcherMachine.TestCase


# -- the same in examples, where a figure tells more than a property ---------------------------------


def ticket(rows=1, deadline=inf, key=4):
    return Ticket(None, None, None, None, rows, deadline, Turn(0.0), key, Account())


def place(batcher, *, key=4, rows=1, capacity=4, now=0.0, deadline=inf):
    slot = batcher.open_slot(key, capacity)
    placed = ticket(rows, deadline, key)
    batcher.commit(slot, placed, now)
    return SimpleNamespace(slot=slot, ticket=placed)


def test_an_idle_worker_takes_a_single_row_at_once():
    batcher = Batcher(2)
    batcher.worker_ready(0)
    placed = place(batcher)
    assert batcher.dispatch(0.0) == [(placed.slot, 0)]


def test_while_the_worker_is_busy_rows_gather():
    batcher = Batcher(3)
    batcher.worker_ready(0)
    place(batcher)
    ((first, worker),) = batcher.dispatch(0.0)
    gathered = [place(batcher, now=1.0 + i) for i in range(3)]
    assert batcher.dispatch(4.0) == []
    batcher.finish(first, 5.0)
    batcher.worker_ready(worker)
    assert batcher.dispatch(5.0) == [(gathered[0].slot, 0)]
    assert [each.ticket.start for each in gathered] == [0, 1, 2]


def run_ahead(batcher):
    """One batch runs, and the next, which is full, is ahead."""
    batcher.worker_ready(0)
    first = place(batcher, rows=4).slot
    assert batcher.dispatch(0.0) == [(first, 0)]
    second = place(batcher, rows=4, now=1.0).slot
    assert batcher.dispatch(1.0) == [(second, 0)]
    return first, second


def test_a_full_batch_goes_ahead_to_a_busy_worker():
    batcher = Batcher(4, timeout_s=10.0)
    first, second = run_ahead(batcher)
    place(batcher, rows=4, now=2.0)
    assert batcher.dispatch(2.0) == []
    assert batcher.next_wakeup() == 10.0
    batcher.finish(first, 5.0)
    assert second.dispatched_at == 5.0  # its time begins when the worker does
    assert batcher.next_wakeup() == 15.0
    batcher.worker_ready(0)
    assert [worker for _, worker in batcher.dispatch(5.0)] == [0]


def test_a_batch_that_is_ahead_comes_back_when_another_worker_is_idle():
    batcher = Batcher(4)
    _, second = run_ahead(batcher)
    assert batcher.recallable(2.0) is None
    batcher.worker_ready(1)
    assert batcher.dispatch(2.0) == []
    assert batcher.recallable(2.0) is second
    batcher.recall(second, 2.0)
    assert batcher.dispatch(2.0) == [(second, 1)]
    assert (second.runs, second.closed_by) == (1, "full")


def test_a_batch_that_is_ahead_comes_back_for_one_of_a_higher_priority():
    batcher = Batcher(4, ageing_s=1.0)
    batcher.worker_ready(0)
    place(batcher, key=5, rows=4)
    batcher.dispatch(0.0)
    ahead = place(batcher, key=5, rows=4, now=1.0).slot
    place(batcher, key=4, now=2.1)  # later by more than its priority counts
    assert batcher.dispatch(2.1) == [(ahead, 0)]
    assert batcher.recallable(2.1) is None
    place(batcher, key=8, now=1.9)
    assert batcher.recallable(2.1) is None  # the lane's first is the one that came first
    batcher.drop_waiting()
    urgent = place(batcher, key=4, now=1.9).slot
    assert batcher.dispatch(2.1) == []
    assert batcher.recallable(2.1) is ahead
    batcher.recall(ahead, 2.1)
    assert batcher.dispatch(2.1) == []  # more rows may join the one that is urgent
    assert (urgent.state, ahead.state) == (SlotState.OPEN, SlotState.OPEN)


def test_a_batch_that_is_ahead_comes_back_when_its_rows_expire():
    batcher = Batcher(4)
    batcher.worker_ready(0)
    place(batcher, rows=4)
    batcher.dispatch(0.0)
    late = place(batcher, rows=4, deadline=3.0)
    batcher.dispatch(0.0)
    assert batcher.expire(3.0) == [late.ticket]
    assert batcher.recallable(2.0) is late.slot
    batcher.recall(late.slot, 3.0)
    assert late.slot.state is SlotState.FREE
    assert batcher.recallable(2.0) is None


def test_a_batch_that_was_ahead_of_a_worker_that_died_has_not_run():
    batcher = Batcher(4)
    first, second = run_ahead(batcher)
    batcher.worker_lost(0)
    batcher.recall(second, 2.0)
    batcher.reap(first)
    batcher.requeue(first)
    assert (first.runs, second.runs) == (1, 0)
    batcher.worker_ready(1)
    assert batcher.dispatch(2.0) == [(first, 1), (second, 1)]


def test_with_a_delay_a_batch_waits_for_company_and_no_longer():
    batcher = Batcher(2, max_queue_delay_s=1.0)
    batcher.worker_ready(0)
    placed = place(batcher, now=10.0)
    assert batcher.dispatch(10.0) == []
    assert batcher.next_wakeup() == 11.0
    assert batcher.dispatch(10.999) == []
    assert batcher.dispatch(11.0) == [(placed.slot, 0)]


def test_with_a_delay_a_full_batch_goes_before_an_older_one_with_room():
    batcher = Batcher(2, max_queue_delay_s=1.0)
    older = place(batcher, key=4, now=0.0)
    full = place(batcher, key=8, rows=4, now=0.5)
    batcher.worker_ready(0)
    batcher.worker_ready(1)
    assert batcher.dispatch(0.5) == [(full.slot, 1)]
    assert batcher.dispatch(1.0) == [(older.slot, 0)]


def test_a_request_of_no_rows_runs():
    batcher = Batcher(1)
    batcher.worker_ready(0)
    placed = place(batcher, rows=0)
    ((slot, _),) = batcher.dispatch(0.0)
    assert slot.rows == 0
    assert batcher.finish(slot, 1.0) == [placed.ticket]


def test_an_expired_row_in_a_shared_batch_leaves_the_others_alone():
    batcher = Batcher(1)
    early = place(batcher, deadline=1.0)
    late = place(batcher, deadline=9.0)
    assert batcher.next_wakeup() == 1.0
    assert batcher.expire(1.0) == [early.ticket]
    assert batcher.expire(1.0) == []
    assert batcher.next_wakeup() == 9.0
    batcher.worker_ready(0)
    ((slot, _),) = batcher.dispatch(1.0)
    assert slot.rows == 2
    assert batcher.finish(slot, 1.0) == [late.ticket]


def test_a_waiting_batch_of_expired_rows_never_starts():
    batcher = Batcher(1)
    place(batcher, deadline=1.0)
    batcher.expire(1.0)
    batcher.worker_ready(0)
    assert batcher.dispatch(1.0) == []
    assert batcher.is_idle


def test_the_generation_tells_one_run_of_a_slot_from_the_next():
    batcher = Batcher(1)
    seen = []
    for _ in range(3):
        batcher.worker_ready(0)
        place(batcher)
        ((slot, _),) = batcher.dispatch(0.0)
        seen.append(slot.generation)
        batcher.finish(slot, 0.0)
        batcher.release(slot)
    assert seen == [1, 2, 3]


def test_the_generation_fits_the_doorbells_u32():
    batcher = Batcher(1)
    batcher.slots[0].generation = 0xFFFF_FFFF
    batcher.worker_ready(0)
    place(batcher)
    ((slot, _),) = batcher.dispatch(0.0)
    assert slot.generation == 0


def test_what_cannot_happen_is_a_defect_told():
    batcher = Batcher(1)
    with pytest.raises(IllegalTransition):
        batcher.finish(batcher.slots[0], 0.0)
    batcher.worker_ready(0)
    with pytest.raises(AssertionError, match="ready twice"):
        batcher.worker_ready(0)
    slot = batcher.open_slot(4, 4)
    with pytest.raises(AssertionError, match="without rows"):
        batcher.close(slot)
    with pytest.raises(AssertionError, match="beyond the slot"):
        batcher.commit(slot, ticket(rows=5), 0.0)


# -- priorities ---------------------------------------------------------------------------------------


def test_a_higher_priority_goes_before_an_older_batch():
    batcher = Batcher(2, ageing_s=1.0)
    background = place(batcher, key=4 | 3, now=0.0)
    urgent = place(batcher, key=4 | 0, now=2.9)
    batcher.worker_ready(0)
    batcher.worker_ready(1)
    assert batcher.dispatch(2.9) == [(urgent.slot, 1), (background.slot, 0)]


def test_but_not_before_one_that_waited_longer_by_the_ageing_of_each_step():
    batcher = Batcher(2, ageing_s=1.0)
    background = place(batcher, key=4 | 3, now=0.0)
    urgent = place(batcher, key=4 | 0, now=3.1)
    batcher.worker_ready(0)
    batcher.worker_ready(1)
    assert batcher.dispatch(3.1) == [(background.slot, 1), (urgent.slot, 0)]


@given(
    arrivals=st.lists(st.tuples(st.sampled_from([0.0, 0.125, 0.75]), st.integers(0, 3)), max_size=60),
    run_s=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_nothing_starves(arrivals, run_s):
    """The bound of docs/operations.md: who comes later by more than (p - q) x ageing never goes first."""
    batcher = Batcher(len(arrivals) + 1, ageing_s=0.5)
    now = 0.0
    waiting, order = [], []
    for pause, priority in arrivals:
        now += pause
        waiting.append((place(batcher, key=4 | priority, capacity=1, now=now).slot, now, priority))
    free_at = 0.0
    running = deque()
    while waiting or running:
        batcher.worker_ready(0)
        for slot, _ in batcher.dispatch(free_at):
            running.append(slot)
            mine = next(each for each in waiting if each[0] is slot)
            waiting.remove(mine)
            order.append(mine)
        free_at += run_s
        batcher.finish(running.popleft(), free_at)
    for i, (_, came, priority) in enumerate(order):
        for _, other_came, other_priority in order[:i]:
            assert other_came <= came + max(0, priority - other_priority) * 0.5


# -- predicting ---------------------------------------------------------------------------------------


def busy_batcher(workers, slots=8, run_s=2.0):
    """At 10.0, each of the workers begins a batch; one took `run_s`."""
    batcher = Batcher(slots)
    batcher.worker_ready(0)
    place(batcher, rows=4, now=10.0 - run_s)
    ((slot, _),) = batcher.dispatch(10.0 - run_s)
    assert batcher.expected_s == 0.0  # nothing has run yet
    batcher.finish(slot, 10.0)
    batcher.release(slot)
    for worker in range(workers):
        batcher.worker_ready(worker)
    assert batcher.expected_s == 0.0  # a worker is idle
    for _ in range(workers):
        place(batcher, rows=4, now=10.0)
    assert len(batcher.dispatch(10.0)) == workers
    return batcher


def test_the_wait_is_predicted_from_what_runs_and_the_batches_ahead():
    batcher = busy_batcher(workers=1)
    assert batcher.expected_s == 4.0  # the batch that runs, and its own
    for ahead in (1, 2, 3):
        place(batcher, rows=4, now=10.0)
        assert batcher.expected_s == 4.0 + 2.0 * ahead


def test_a_row_that_joins_the_last_batch_does_not_wait_for_it():
    batcher = busy_batcher(workers=1)
    place(batcher, rows=4, now=10.0)
    place(batcher, rows=1, now=10.0)
    assert batcher.expected_s == 6.0
    place(batcher, rows=3, now=10.0)
    assert batcher.expected_s == 8.0  # now it is full: the next row goes to another


def test_the_wait_grows_shorter_while_a_batch_runs():
    batcher = busy_batcher(workers=1)
    batcher.expect(11.5)
    assert batcher.expected_s == 2.5
    batcher.expect(13.0)  # it is late: it may be done any moment
    assert batcher.expected_s == 2.0


def test_the_wait_is_for_the_worker_that_is_free_first():
    batcher = busy_batcher(workers=1)
    batcher.worker_ready(1)
    place(batcher, rows=4, now=11.0)
    batcher.dispatch(11.0)  # so one is free at 12.0, the other at 13.0
    for done_at in (14.0, 15.0, 16.0, 17.0):
        assert batcher.expected_s == done_at - 11.0
        place(batcher, rows=4, now=11.0)


def test_a_batch_that_would_be_done_too_late_leaves_its_turn_to_the_next():
    batcher = busy_batcher(workers=1)
    hopeless = [place(batcher, rows=2, now=10.0, deadline=13.9).ticket for _ in range(2)]
    hopeful = place(batcher, rows=4, now=10.0, deadline=14.1)
    assert batcher.give_up(10.0) == hopeless
    assert all(ticket.is_settled for ticket in hopeless)
    assert batcher.dispatch(10.0) == [(hopeful.slot, 0)]


def test_it_takes_its_turn_if_one_of_its_rows_may_come_in_time():
    batcher = busy_batcher(workers=1)
    place(batcher, rows=3, now=10.0, deadline=13.9)
    place(batcher, rows=1, now=10.0, deadline=14.1)
    place(batcher, rows=4, now=10.0, deadline=20.0)
    assert batcher.give_up(10.0) == []


def test_or_if_no_other_waits():
    batcher = busy_batcher(workers=1)
    for _ in range(2):
        place(batcher, rows=4, now=10.0, deadline=13.9)
    assert len(batcher.give_up(10.0)) == 1
    assert batcher.give_up(10.0) == []
    assert len(batcher.dispatch(10.0)) == 1


# -- running again ------------------------------------------------------------------------------------


def test_a_batch_whose_worker_died_goes_first_to_the_next():
    batcher = Batcher(3)
    batcher.worker_ready(0)
    lost = place(batcher, now=0.0)
    batcher.dispatch(0.0)
    place(batcher, now=1.0)
    assert batcher.reap(lost.slot) == [lost.ticket]
    batcher.requeue(lost.slot)
    batcher.worker_ready(1)
    assert batcher.dispatch(2.0) == [(lost.slot, 1)]
    assert lost.slot.runs == 2
    assert batcher.finish(lost.slot, 3.0) == [lost.ticket]


def test_a_deadline_settles_a_ticket_that_is_set_aside():
    batcher = Batcher(1)
    batcher.worker_ready(0)
    one, two = place(batcher, deadline=5.0), place(batcher, deadline=9.0)
    batcher.dispatch(0.0)
    batcher.reap(one.slot)
    batcher.refill(one.slot, [two.ticket], [one.ticket])
    batcher.dispatch_to(one.slot, 7, 1.0)
    assert two.ticket.start == 0
    assert batcher.expire(5.0) == [one.ticket]
    assert batcher.next_wakeup() == 9.0


# -- workers that others than this batcher give batches to, too ---------------------------------------


def test_of_idle_workers_the_one_with_least_to_do_for_others_is_taken():
    batcher = Batcher(4)
    loads = {0: 1, 1: 0, 2: 0, 3: 2}
    batcher.load_of = loads.__getitem__
    for worker in range(4):
        batcher.worker_ready(worker)
    given_to = []
    for now in range(4):
        place(batcher, now=now)
        ((_, worker),) = batcher.dispatch(now)
        given_to.append(worker)
    assert given_to == [2, 1, 0, 3]  # of equal ones, the one that was ready last


def test_a_batch_that_its_worker_never_began_waits_again():
    batcher = Batcher(4, timeout_s=10.0)
    first, second = run_ahead(batcher)
    batcher.worker_lost(0)
    batcher.recall(second, 2.0)
    batcher.recall(first, 2.0)
    assert (first.runs, second.runs) == (0, 0)
    assert first.state is SlotState.OPEN
    assert batcher.next_wakeup() == inf
    assert not list(batcher.running())
    batcher.worker_ready(1)
    assert batcher.dispatch(2.0) == [(first, 1), (second, 1)]


def test_a_batch_that_is_looked_at_again_has_its_whole_time_from_then_on():
    batcher = Batcher(2, timeout_s=10.0)
    batcher.worker_ready(0)
    slot = place(batcher).slot
    batcher.dispatch(0.0)
    assert batcher.overdue(10.0) == [slot]
    batcher.look_again(slot, 10.0)
    assert batcher.overdue(19.0) == []
    assert batcher.next_wakeup() == 20.0
    assert batcher.overdue(20.0) == [slot]
