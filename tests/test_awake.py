"""When the front's loop is kept awake."""

from __future__ import annotations

import pytest

from pool.front.awake import Awake, Event


class Loop:
    """Counts the turns it was asked for."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked: list = []

    def call_soon(self, callback) -> None:
        self.asked.append(callback)

    def turns(self, step: float) -> int:
        """How many turns follow each other if each takes so long."""
        count = 0
        while self.asked:
            count += 1
            self.now += step
            self.asked.pop(0)()
        return count


def awake(loop: Loop, awake_s: float = 1.0) -> Awake:
    return Awake(loop, awake_s, lambda: loop.now)


def test_at_first_it_sleeps():
    loop = Loop()
    awake(loop).wait_for(Event.REQUEST, loop.now)
    assert not loop.asked


def test_what_came_quickly_is_waited_for_awake_for_a_while():
    loop = Loop()
    a = awake(loop)
    a.wait_for(Event.ANSWER, loop.now)
    loop.now += 0.5
    a.came(Event.ANSWER, loop.now)
    a.wait_for(Event.ANSWER, loop.now)
    assert loop.turns(0.125) == 8
    a.wait_for(Event.ANSWER, loop.now)  # still waiting, and told so again: awake again
    assert loop.turns(0.125) == 8


@pytest.mark.parametrize(("took", "is_awake"), [(0.5, True), (1.0, False), (8.0, False)])
@pytest.mark.parametrize("took_before", [0.25, 4.0])
def test_only_what_took_long_the_last_time_is_waited_for_asleep(took_before, took, is_awake):
    loop = Loop()
    a = awake(loop, 1.0)
    for after in (took_before, took):
        a.wait_for(Event.REQUEST, loop.now)
        loop.now += after
        a.came(Event.REQUEST, loop.now)
        loop.turns(0.0)
    a.wait_for(Event.REQUEST, loop.now)
    assert bool(loop.turns(1.0)) == is_awake


def test_one_event_says_nothing_of_the_other():
    loop = Loop()
    a = awake(loop)
    a.wait_for(Event.ANSWER, loop.now)
    a.came(Event.ANSWER, loop.now)
    a.wait_for(Event.REQUEST, loop.now)
    assert not loop.asked
    a.wait_for(Event.ANSWER, loop.now)
    assert loop.asked


def test_it_may_sleep_as_soon_as_the_event_is_there():
    loop = Loop()
    a = awake(loop)
    a.wait_for(Event.ANSWER, loop.now)
    a.came(Event.ANSWER, loop.now)
    a.wait_for(Event.ANSWER, loop.now)
    a.came(Event.ANSWER, loop.now)
    assert loop.turns(0.0) == 1  # the turn that was asked for sees that it is over


def test_it_turns_once_at_a_time_however_often_it_is_told():
    loop = Loop()
    a = awake(loop)
    for event in Event:
        a.wait_for(event, loop.now)
        a.came(event, loop.now)
    for event in Event:
        a.wait_for(event, loop.now)
        a.wait_for(event, loop.now)
    assert len(loop.asked) == 1


def test_with_nothing_to_spare_it_always_sleeps():
    loop = Loop()
    a = awake(loop, 0.0)
    for _ in range(3):
        a.wait_for(Event.REQUEST, loop.now)
        a.came(Event.REQUEST, loop.now)
    a.wait_for(Event.REQUEST, loop.now)
    assert not loop.asked
