"""The loop of a worker that several fronts share, in a thread, on a Runner that only notes what it ran."""

from __future__ import annotations

import os
import threading

import pytest

from pool.shm import doorbell, joining, loans
from pool.shm.arena import Arena, slot_bytes_for
from pool.shm.doorbell import Message, Ring
from pool.worker.fronts import serve_fronts

SLOTS, SLOT_BYTES = 2, slot_bytes_for(4096)


class Noting:
    """In place of a Runner."""

    def __init__(self, name, ran, arena=None, borrowed=None):
        self.name = name
        self.ran = ran
        self.arena = arena
        self.borrowed = borrowed
        self.closed = threading.Event()
        self.gate = threading.Semaphore(1_000)

    def run(self, message):
        self.gate.acquire()
        self.ran.append((self.name, message.slot))
        return Message(Ring.DONE, message.slot, message.rows, message.generation)

    def give_back(self, number):
        self.ran.append((self.name, f"back {number}"))

    def close(self):
        self.borrowed.close()
        self.arena.close()
        self.closed.set()


class Shared:
    """A worker and its fronts."""

    def __init__(self):
        self.ran = []
        self.made = []
        self.joins, joiner = joining.make_pair()
        self.lead, far = doorbell.make_pair()
        self.runner = Noting("lead", self.ran)
        self.code = None
        self._sockets = [self.joins, self.lead]
        self._thread = threading.Thread(target=self._serve, args=(far, joiner), daemon=True)
        self._thread.start()

    def _serve(self, far, joiner):
        with far, joiner:
            self.code = serve_fronts(far, self.runner, joiner, self._make, 0.0)
            for runner in self.made:
                if not runner.closed.is_set():
                    runner.close()

    def _make(self, arena, borrowed):
        assert [len(slot) for slot in arena.slots] == [SLOT_BYTES] * SLOTS
        self.made.append(Noting(f"front {len(self.made)}", self.ran, arena, borrowed))
        return self.made[-1]

    def join(self):
        bell, far = doorbell.make_pair()
        lender, borrower = loans.make_pair()
        arena = Arena.make_memory(SLOTS, SLOT_BYTES)
        joining.join(self.joins, SLOTS, SLOT_BYTES, [far.fileno(), borrower.fileno(), arena])
        os.close(arena)
        for sock in (far, borrower, lender):
            sock.close()
        bell.setblocking(True)
        bell.settimeout(30)
        self._sockets.append(bell)
        return bell

    def end(self):
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.code

    def close(self):
        for sock in self._sockets:
            sock.close()
        self.end()


@pytest.fixture
def shared():
    made = Shared()
    made.lead.setblocking(True)
    made.lead.settimeout(30)
    yield made
    made.close()


def run(bell, slot):
    doorbell.ring(bell, Message(Ring.RUN, slot, 1, 7))


def ask(bell, slot):
    run(bell, slot)
    answer = doorbell.answer(bell)
    assert (answer.kind, answer.slot, answer.generation) == (Ring.DONE, slot, 7)


def test_each_front_gets_its_own_answers(shared):
    ask(shared.lead, 0)
    first, second = shared.join(), shared.join()
    for slot in (0, 1):
        ask(first, slot)
        ask(second, slot)
        ask(shared.lead, slot)
    assert shared.ran == [
        ("lead", 0),
        *[(name, slot) for slot in (0, 1) for name in ("front 0", "front 1", "lead")],
    ]


def test_batches_are_run_in_turn(shared):
    first = shared.join()
    ask(first, 0)
    shared.ran.clear()
    shared.runner.gate = threading.Semaphore(0)
    run(shared.lead, 0)  # while it runs, each gives two more
    for slot in (0, 1):
        run(first, slot)
    for slot in (1, 0):
        run(shared.lead, slot)
    shared.runner.gate.release(10)
    for bell, count in ((shared.lead, 3), (first, 2)):
        for _ in range(count):
            doorbell.answer(bell)
    assert shared.ran[1:] in (
        [("lead", 1), ("front 0", 0), ("lead", 0), ("front 0", 1)],
        [("front 0", 0), ("lead", 1), ("front 0", 1), ("lead", 0)],
    )


def test_a_front_that_ended_is_forgotten_also_with_a_batch_under_way(shared):
    first, second = shared.join(), shared.join()
    ask(first, 0)
    ask(second, 0)
    shared.made[0].gate = threading.Semaphore(0)
    run(first, 1)
    first.close()
    shared.made[0].gate.release()
    assert shared.made[0].closed.wait(30)
    ask(second, 1)
    ask(shared.lead, 1)
    assert not shared.made[1].closed.is_set()


def test_what_a_client_takes_back_is_told_to_its_front_alone(shared):
    first = shared.join()
    doorbell.ring(first, Message(Ring.GIVE_BACK, generation=5))
    ask(first, 0)
    assert shared.ran == [("front 0", "back 5"), ("front 0", 0)]


def test_told_to_leave_it_runs_what_it_was_given(shared):
    first = shared.join()
    ask(first, 0)
    shared.runner.gate = threading.Semaphore(0)
    run(shared.lead, 0)
    run(first, 0)
    run(first, 1)
    doorbell.ring(shared.lead, Message(Ring.DRAIN))
    shared.runner.gate.release(10)
    for bell, count in ((shared.lead, 1), (first, 2)):
        for _ in range(count):
            assert doorbell.answer(bell).kind == Ring.DONE
    assert shared.end() == 0


def test_it_leaves_when_the_lead_is_gone(shared):
    first = shared.join()
    ask(first, 0)
    shared.lead.close()
    assert shared.end() == 0
