"""The search for the guilty: nobody is harmed, the guilty are found, and it takes no more runs than told."""

from __future__ import annotations

from math import ceil, inf, log2

from hypothesis import given
from hypothesis import strategies as st

from pool.front.inquest import GUILTY_MAX, Inquest
from pool.front.slots import Account, Ticket, Turn


def tickets(count):
    return [Ticket(None, None, i, None, 1, inf, Turn(0.0), 0, Account()) for i in range(count)]


def settle(those):
    for ticket in those:
        assert not ticket.is_settled, "answered twice"
        ticket.is_settled = True


def search(everyone, guilty, undecided=lambda: False):
    """Run an inquest to its end; gives it, and who was answered well."""
    inquest = Inquest(everyone)
    answered = []
    while ran := inquest.next():
        assert not any(ticket.is_settled for ticket in ran)
        settle(inquest.guilty[sum(t.is_settled for t in inquest.guilty) :])
        if undecided():
            inquest.undecided(ran)
        elif guilty & {ticket.id for ticket in ran}:
            inquest.failed(ran)
        else:
            inquest.passed(ran)
            settle(ran)
            answered += ran
    settle([ticket for ticket in inquest.guilty if not ticket.is_settled])
    return inquest, {ticket.id for ticket in answered}


@given(st.data(), st.integers(1, 130))
def test_the_guilty_alone_are_found_and_all_others_answered(data, count):
    guilty = data.draw(st.sets(st.integers(0, count - 1), max_size=GUILTY_MAX - 1))
    everyone = tickets(count)
    inquest, answered = search(everyone, guilty)
    assert {ticket.id for ticket in inquest.guilty} == guilty
    assert answered == set(range(count)) - guilty
    assert all(ticket.is_settled for ticket in everyone)
    assert inquest.runs <= max(1, len(guilty)) * (ceil(log2(count)) + 1)


def test_of_64_rows_one_is_found_in_7_runs_wherever_it_lies():
    runs = set()
    for guilty in range(64):
        inquest, answered = search(tickets(64), {guilty})
        assert len(answered) == 63
        runs.add(inquest.runs)
    assert max(runs) == 7


def test_a_single_request_is_tried_again_before_it_is_blamed():
    inquest, answered = search(tickets(1), set())
    assert (inquest.runs, inquest.guilty, answered) == (1, [], {0})
    inquest, answered = search(tickets(1), {0})
    assert (inquest.runs, len(inquest.guilty), answered) == (1, 1, set())


def test_a_model_that_fails_for_all_is_not_tried_to_the_end():
    inquest, answered = search(tickets(64), set(range(64)))
    assert len(inquest.guilty) == 64
    assert answered == set()
    assert inquest.runs < 64


@given(st.integers(1, 40), st.integers(0, 39), st.lists(st.booleans(), max_size=60))
def test_kills_from_outside_blame_nobody_unless_they_hit_the_same_run_twice(count, at, kills):
    guilty = {at % count}
    fates = iter(kills)
    last = False

    def undecided():
        nonlocal last
        last = not last and next(fates, False)  # never twice in a row
        return last

    inquest, answered = search(tickets(count), guilty, undecided)
    assert {ticket.id for ticket in inquest.guilty} == guilty
    assert answered == set(range(count)) - guilty


@given(st.integers(2, 40), st.data())
def test_who_is_settled_meanwhile_runs_no_more(count, data):
    everyone = tickets(count)
    inquest = Inquest(everyone)
    for _ in range(200):
        ran = inquest.next()
        if not ran:
            break
        assert not any(ticket.is_settled for ticket in ran)
        gone = data.draw(st.lists(st.sampled_from(everyone), max_size=3))
        for ticket in gone:
            ticket.is_settled = True
        if data.draw(st.booleans()):
            inquest.failed(ran)
        else:
            inquest.passed(ran)
            for ticket in ran:
                ticket.is_settled = True
        for ticket in inquest.guilty:
            ticket.is_settled = True
    else:
        raise AssertionError("it does not end")
    for ticket in inquest.guilty:
        ticket.is_settled = True
    assert all(ticket.is_settled for ticket in everyone)
    assert inquest.rest() == []
