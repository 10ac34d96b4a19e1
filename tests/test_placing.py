"""The requests of a bundle: placed as they would be alone, answered or refused each."""

from __future__ import annotations

import itertools
from math import inf

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pool.errors import InternalError, Overloaded, PoolError, TooLarge, WireError
from pool.front.columns import Column
from tests.rig import Rig, floats, generation, identity

FLOATS = identity(("x", "float32", (None, 3)))


def place_bundle(rig, sizes, first=0, array=None):
    array = floats(sum(sizes)) if array is None else array
    route = rig.route({"x": array})
    parts = rig.parts(route, [(first + i, 0, rows) for i, rows in enumerate(sizes)])
    refused = rig.generation.place_all(parts, [array.tobytes()], rig.now)
    return {id_: error for error, ids in refused for id_ in ids}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=4), st.integers(1, 8)
)
def test_every_request_of_a_bundle_is_answered_or_refused(bundles, capacity):
    first, sent, refused = 0, {}, {}
    with Rig(generation(FLOATS, max_batch_size=capacity, slots=4)) as rig:
        for sizes in bundles:
            array = floats(sum(sizes), 1000 * first)
            parts = np.split(array, np.cumsum(sizes)[:-1])
            sent |= {first + i: part for i, part in enumerate(parts)}
            refused |= place_bundle(rig, sizes, first, array)
            first += len(sizes)
        rig.run_all()
        assert max(rig.batches, default=0) <= capacity
    assert sorted([*rig.sink.answers, *refused]) == list(range(first))
    assert all(isinstance(error, (Overloaded, TooLarge)) for error in refused.values())
    for id_, answer in rig.sink.answers.items():
        np.testing.assert_array_equal(answer["x_out"], sent[id_])


@settings(max_examples=150, deadline=None)
@example([(6, 10_000), (2, 10_000), (0, 10_000)], 2, 8)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([10, 10_000, 0])), min_size=1, max_size=12),
    st.integers(1, 8),
    st.integers(1, 30),
)
def test_a_bundle_is_admitted_as_its_requests_would_be_alone(requests, capacity, inflight_rows):
    taken, refused = [], []
    for is_bundled in (True, False):
        config = {"max_batch_size": capacity, "slots": 4, "max_inflight_rows": inflight_rows}
        with Rig(generation(FLOATS, **config)) as rig:
            rig.place("before", {"x": floats(1)})
            (slot,) = rig.start()
            rig.now += 0.05  # so that there is something to expect
            rig.finish(slot)
            array = floats(sum(rows for rows, _ in requests))
            route = rig.route({"x": array})
            if is_bundled:
                parts = rig.parts(route, [(i, millis, rows) for i, (rows, millis) in enumerate(requests)])
                found = rig.generation.place_all(parts, [array.tobytes()], rig.now)
                errors = {id_: type(error) for error, ids in found for id_ in ids}
            else:
                errors, start = {}, 0
                for i, (rows, millis) in enumerate(requests):
                    ticket = rig.ticket(i, route, rows, rig.now + (millis * 1e-3 or inf))
                    part = array[start : start + ticket.rows]
                    start += ticket.rows
                    try:
                        rig.generation.place(ticket, [part.tobytes()], rig.now)
                    except PoolError as e:
                        errors[ticket.id] = type(e)
            refused.append(errors)
            rig.run_all()
            taken.append(sorted(id_ for id_ in rig.sink.answers if id_ != "before"))
    bundled, alone = refused
    assert bundled.items() <= alone.items()
    # Behind requests that fill a batch, one of no rows comes along; alone it wants a batch of its own.
    assert all(requests[id_][0] == 0 for id_ in alone.keys() - bundled.keys())
    for answered, errors in zip(taken, refused, strict=True):
        assert answered == [id_ for id_ in range(len(requests)) if id_ not in errors]


def test_requests_of_a_bundle_that_are_refused_alike_are_refused_together(rig_of):
    rig = rig_of(FLOATS, max_batch_size=4, slots=2)
    route = rig.route({"x": floats(1)})
    parts = rig.parts(route, [(i, 0, rows) for i, rows in enumerate([8, 1, 2, 1, 5, 1])])
    found = rig.generation.place_all(parts, [floats(18).tobytes()], rig.now)
    assert [(type(error), ids) for error, ids in found] == [(Overloaded, [1, 2, 3, 4, 5])]
    rig.run_all()
    assert list(rig.sink.answers) == [0]


def test_a_bundle_may_end_with_no_rows_when_its_batch_is_full(rig_of):
    rig = rig_of(FLOATS, max_batch_size=4, slots=2)
    assert place_bundle(rig, [4, 0, 0]) == {}
    rig.run_all()
    assert sorted(rig.sink.answers) == [0, 1, 2]


@pytest.mark.parametrize(
    ("at", "placed", "defects"),
    [
        (0, [], 6),
        (1, [0, 1], 4),
        (2, [0, 1], 4),
        (3, [0, 1, 2], 2),
        (4, [0, 1, 2, 4], 1),
        (5, [0, 1, 2, 4], 1),
        (6, [0, 1, 2, 4, 5], 0),
    ],
)
def test_a_defect_in_a_bundle_is_told_to_each_request_that_was_not_placed(
    rig_of, monkeypatch, caplog, at, placed, defects
):
    """Whatever has been placed is answered as ever, and no slot stays open."""
    rig = rig_of(FLOATS, max_batch_size=4, slots=4)
    sizes = [2, 2, 6, 20, 1, 2]  # two together, one that is split, one too large, one, one that is split
    write, count = Column.write, itertools.count()

    def fail_once(*arguments):
        if next(count) == at:
            raise ZeroDivisionError
        write(*arguments)

    monkeypatch.setattr(Column, "write", fail_once)
    array = floats(sum(sizes))
    refused = place_bundle(rig, sizes, array=array)
    rig.run_all()
    assert not rig.account.rows
    assert sorted(rig.sink.answers) == placed
    parts = np.split(array, np.cumsum(sizes)[:-1])
    for i in placed:
        np.testing.assert_array_equal(rig.sink.answers[i]["x_out"], parts[i])
    assert sorted(refused) == sorted(set(range(6)) - set(placed))
    told = [error.message for error in refused.values() if isinstance(error, InternalError)]
    assert told == ["ZeroDivisionError while handling the request"] * defects
    caplog.clear()  # its traceback has views of a slot


def test_a_defect_before_a_bundle_is_placed_is_told_to_all_of_it(rig_of, monkeypatch):
    rig = rig_of(FLOATS)

    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr(rig.batcher, "expect", fail)
    assert {id_: type(error) for id_, error in place_bundle(rig, [1, 2]).items()} == {
        0: InternalError,
        1: InternalError,
    }
    assert rig.batcher.is_idle


def test_a_bundle_whose_frame_has_another_size_places_nothing(rig_of):
    rig = rig_of(FLOATS)
    route = rig.route({"x": floats(2)})
    with pytest.raises(WireError, match="tensor frame 0 has 24 bytes; wanted 36"):
        rig.generation.place_all(rig.parts(route, [(0, 0, 3)]), [floats(2).tobytes()], rig.now)
    assert rig.batcher.is_idle


def test_neighbours_share_a_ticket_for_each_slot_and_deadline(rig_of):
    rig = rig_of(FLOATS, max_batch_size=4, slots=4)
    requests = [(1, 0, 1), (2, 0, 1), (3, 500, 1), (4, 500, 1), (5, 500, 1), (6, 0, 1)]
    parts = rig.parts(rig.route({"x": floats(1)}), requests)
    assert rig.generation.place_all(parts, [floats(6).tobytes()], rig.now) == []
    tickets = [ticket for _, ticket in rig.batcher.unsettled()]
    assert [(ticket.ids, ticket.start, ticket.deadline - rig.now) for ticket in tickets] == [
        ([1, 2], 0, inf),
        ([3, 4], 2, pytest.approx(0.5)),
        ([5], 0, pytest.approx(0.5)),
        ([6], 1, inf),
    ]
    assert rig.account.rows == 6
    rig.run_all()
    assert sorted(rig.sink.answers) == [1, 2, 3, 4, 5, 6]
    assert rig.account.rows == 0
