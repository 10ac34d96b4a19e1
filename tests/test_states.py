"""Both state tables of `pool.front.states`, pair by pair, against the tables written out here."""

from __future__ import annotations

import itertools

import pytest

from pool.front.states import (
    SLOT,
    WORKER,
    IllegalTransition,
    SlotEvent,
    SlotState,
    WorkerEvent,
    WorkerState,
    next_slot_state,
    next_worker_state,
)

# Rows: the state before. Columns: the event. "-": cannot happen.
SLOT_TABLE = """
          open  abandon  dispatch  recall  finish  reap  hold  release
free      open  -        -         -       -       -     -     -
open      -     free     running   -       -       -     -     -
running   -     -        -         open    done    held  -     -
done      -     -        -         -       -       -     held  free
held      -     -        running   -       -       -     -     free
"""

WORKER_TABLE = """
          load   dispatch  finish    drain     exit     give-up  stop     retry
starting  ready  -         -         draining  backoff  failed   -        -
ready     -      busy      -         draining  backoff  failed   -        -
busy      -      -         ready     draining  backoff  failed   -        -
draining  -      -         draining  -         -        -        stopped  -
backoff   -      -         -         -         -        -        stopped  starting
failed    -      -         -         -         -        -        -        -
stopped   -      -         -         -         -        -        -        -
"""


def parse(table):
    head, *lines = (line.split() for line in table.strip().splitlines())
    for state, *cells in lines:
        for event, after in zip(head, cells, strict=True):
            yield state, event.replace("-", " "), after


SLOT_PAIRS = list(parse(SLOT_TABLE))
WORKER_PAIRS = list(parse(WORKER_TABLE))


@pytest.mark.parametrize(("state", "event", "after"), SLOT_PAIRS)
def test_slot_pair(state, event, after):
    check(next_slot_state, "slot", SlotState(state), SlotEvent(event), after)


@pytest.mark.parametrize(("state", "event", "after"), WORKER_PAIRS)
def test_worker_pair(state, event, after):
    check(next_worker_state, "worker", WorkerState(state), WorkerEvent(event), after)


def check(next_state, what, state, event, after):
    if after != "-":
        assert next_state(state, event).value == after
        return
    with pytest.raises(IllegalTransition) as caught:
        next_state(state, event)
    assert str(caught.value) == f"{what} is {state.value}; cannot {event.value}"


def test_every_pair_is_written_out_above():
    slots = {(a.value, b.value) for a, b in itertools.product(SlotState, SlotEvent)}
    workers = {(a.value, b.value) for a, b in itertools.product(WorkerState, WorkerEvent)}
    assert {(state, event) for state, event, _ in SLOT_PAIRS} == slots
    assert {(state, event) for state, event, _ in WORKER_PAIRS} == workers


def test_every_state_but_the_last_ones_can_be_left_and_reached():
    assert {state for state, _ in SLOT} == set(SLOT.values()) == set(SlotState)
    assert {state for state, _ in WORKER} == set(WorkerState) - {WorkerState.FAILED, WorkerState.STOPPED}
    assert set(WORKER.values()) == set(WorkerState)


def test_an_illegal_transition_is_a_defect_not_an_error_of_a_user():
    assert issubclass(IllegalTransition, AssertionError)
