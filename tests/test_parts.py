"""Requests side by side, and the tickets that they share."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.front.parts import Parts
from pool.front.slots import Account, Turn
from pool.wire import PART, split_parts

NOW = 1000.0
REQUESTS = st.lists(
    st.tuples(st.integers(1, 2**64 - 1), st.sampled_from([0, 1, 250]), st.integers(0, 5)),
    min_size=1,
    max_size=20,
)


def make(requests, timeout_s=inf):
    table = b"".join(PART.pack(*request) for request in requests)
    columns = tuple(map(list, zip(*requests, strict=True)))
    route = SimpleNamespace(timeout_s=timeout_s)
    return Parts("sink", "client", route, Turn(NOW), 3, Account(), table, columns, NOW)


@given(REQUESTS, st.integers(0, 40))
def test_tickets_for_all_that_fit_are_those_of_each_alone(requests, room):
    parts = make(requests, timeout_s=60.0)
    first, alone = 0, []
    while first < len(parts):
        end = parts.fit(first, room)
        assert first <= end <= len(parts)
        together = requests[first:end]
        assert len({millis for _, millis, _ in together}) <= 1
        assert sum(rows for _, _, rows in together) <= room
        if end < len(parts):  # the next one has another deadline, or is too much
            _, millis, rows = requests[end]
            has_other = end > first and millis != requests[first][1]
            assert has_other or sum(each[2] for each in together) + rows > room
        end = max(end, first + 1)  # alone, it is for others to say whether it fits
        ticket = parts.ticket(first, end)
        assert (ticket.requests, ticket.rows) == (end - first, sum(each[2] for each in requests[first:end]))
        ticket.start = parts.start(first)
        alone += ticket.split()
        first = end
    ends = [sum(rows for _, _, rows in requests[: i + 1]) for i in range(len(requests))]
    assert [(t.id, t.rows, t.start, t.deadline, t.requests, t.table) for t in alone] == [
        (id_, rows, end - rows, NOW + (millis * 1e-3 or 60.0), 1, b"")
        for (id_, millis, rows), end in zip(requests, ends, strict=True)
    ]
    assert parts.rows == ends[-1]
    assert parts.ids(0, len(parts)) == [id_ for id_, _, _ in requests]


@given(REQUESTS)
def test_a_shared_ticket_has_the_table_that_answers_have(requests):
    requests = [(id_, 250, rows) for id_, _, rows in requests] * 2
    parts = make(requests)
    ticket = parts.ticket(0, len(parts))
    ids, _, counts = map(list, zip(*requests, strict=True))
    assert split_parts(ticket.table, ticket.rows) == (ids, [0] * len(ids), counts)
    assert ticket.ids == [id_ for id_, _, _ in requests]


def test_what_was_settled_stays_so_when_it_is_taken_apart():
    ticket = make([(1, 0, 1), (2, 0, 1)]).ticket(0, 2)
    ticket.is_settled = True
    assert [(alone.ids, alone.is_settled) for alone in ticket.split()] == [([1], True), ([2], True)]


def test_a_ticket_of_one_request_is_not_taken_apart():
    ticket = make([(1, 0, 3)]).ticket(0, 1)
    assert ticket.split() == [ticket]
    assert (ticket.id, ticket.requests) == (1, 1)


@given(REQUESTS, st.integers(0, 5), st.sampled_from([NOW + 0.001, NOW + 0.25, inf]))
def test_those_alike_ask_for_as_much_and_no_later(requests, most_rows, latest):
    parts = make(requests)
    for first in range(len(requests)):
        rows = requests[first][2]
        end = first + 1
        while end < len(requests):
            _, millis, others = requests[end]
            if not rows <= others <= most_rows or NOW + (millis * 1e-3 or inf) > latest:
                break
            end += 1
        if NOW + (requests[first][1] * 1e-3 or inf) <= latest:
            assert parts.end_of_alike(first, most_rows, latest) == end


@pytest.mark.parametrize("requests", [[(1, 0, 1)], [(1, 0, 1), (2, 7, 1), (3, 7, 1), (4, 0, 1)]])
def test_each_has_its_deadline(requests):
    parts = make(requests)
    assert [parts.deadline(i) for i in range(len(parts))] == [
        NOW + (millis * 1e-3 or inf) for _, millis, _ in requests
    ]
