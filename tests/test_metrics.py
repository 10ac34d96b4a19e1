"""What is counted of batches: each request once, in the bucket its time belongs to."""

from __future__ import annotations

from bisect import bisect_left
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.front.metrics import BOUNDS_S, STAGES, Histogram, ModelMetrics
from pool.front.slots import Account, Slot, Ticket, Turn

GAPS = st.floats(0, 1.0).map(lambda x: x**6)  # from nothing to a second, small ones mostly


def make_turns(steps):
    """Turns one after the other: each pair is (pause before it, how long it took)."""
    turns, now = [], 100.0
    for pause, length in steps:
        turn = Turn(now + pause)
        now = turn.ended = turn.started + length
        turns.append(turn)
    return turns


def make_slot(turns, sizes, runs=1, is_shared=False):
    """A batch whose requests came in these turns, so many in each: alone, or sharing a ticket."""
    slot = Slot(0)
    slot.runs, slot.closed_by = runs, "full"
    for turn, size in zip(turns, sizes, strict=True):
        requests = size if is_shared else 1
        for _ in range(size // requests):
            ticket = Ticket(None, None, 0, None, requests, inf, turn, 0, Account(), requests=requests)
            slot.tickets.append(ticket)
    slot.rows = sum(sizes)
    return slot


def expected(durations):
    counts = [0] * (len(BOUNDS_S) + 1)
    for duration in durations:
        counts[bisect_left(BOUNDS_S, duration)] += 1
    return counts


def test_a_bound_belongs_to_the_bucket_it_ends():
    histogram = Histogram()
    histogram.add(BOUNDS_S[3], 2)
    histogram.add(1e9, 1)
    assert histogram.counts[3] == 2
    assert histogram.counts[-1] == 1
    assert len(histogram.counts) == len(BOUNDS_S) + 1
    assert histogram.sum_s == 1e9 + 2 * BOUNDS_S[3]


@given(
    st.lists(st.tuples(GAPS, GAPS, st.integers(1, 9)), min_size=1, max_size=12),
    GAPS,
    GAPS,
    GAPS,
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_every_request_of_a_batch_is_counted_where_it_belongs(steps, waited, ran, replied, runs, is_shared):
    turns = make_turns([step[:2] for step in steps])
    slot = make_slot(turns, [step[2] for step in steps], runs, is_shared)
    slot.dispatched_at = turns[-1].ended + waited
    answered = slot.dispatched_at + ran
    sent = answered + replied
    metrics = ModelMetrics()
    metrics.batch_answered(slot)
    metrics.replies_sent(slot, slot.tickets, answered, sent)
    came = [turn for turn, step in zip(turns, steps, strict=True) for _ in range(step[2])]
    queue = [slot.dispatched_at - turn.ended for turn in came]
    total = [sent - turn.started for turn in came]
    for stage, durations in (
        ("queue", queue),
        ("run", [answered - slot.dispatched_at] * slot.rows),
        ("reply", [sent - answered] * slot.rows),
        ("total", total),
    ):
        histogram = metrics.stages[stage]
        assert histogram.counts == expected(durations), stage
        # The sum is exact but for how times lie within their bucket.
        buckets = [bisect_left(BOUNDS_S, duration) for duration in durations]
        lowest = sum(BOUNDS_S[b - 1] if b else 0.0 for b in buckets)
        highest = sum(max(durations) if b == len(BOUNDS_S) else BOUNDS_S[b] for b in buckets)
        assert lowest * (1 - 1e-9) <= histogram.sum_s <= highest * (1 + 1e-9), stage
    assert (metrics.batches, metrics.rows, metrics.batch_sizes) == (1, slot.rows, {slot.rows: 1})
    assert metrics.closed == {"full": 1}


def test_the_sum_is_exact_where_all_came_in_one_turn():
    (turn,) = make_turns([(0.0, 3e-5)])
    slot = make_slot([turn], [64])
    slot.dispatched_at = turn.ended + 1e-3
    metrics = ModelMetrics()
    metrics.replies_sent(slot, slot.tickets, slot.dispatched_at + 2e-3, slot.dispatched_at + 2.5e-3)
    sums = {stage: metrics.stages[stage].sum_s for stage in STAGES}
    assert sums == pytest.approx(
        {"receive": 0.0, "queue": 0.064, "run": 0.128, "reply": 0.032, "total": 64 * 3.53e-3}, rel=1e-6
    )


def test_a_batch_that_nobody_waits_for_has_no_times():
    slot = make_slot(make_turns([(0.0, 0.0)]), [1])
    metrics = ModelMetrics()
    metrics.batch_answered(slot)
    metrics.replies_sent(slot, [], 200.0, 201.0)
    assert metrics.batches == 1
    assert not any(sum(histogram.counts) for histogram in metrics.stages.values())


def test_answers_and_restarts_are_counted_by_kind():
    metrics = ModelMetrics()
    metrics.answered("OK", 3)
    metrics.answered("OVERLOADED")
    metrics.answered("OK")
    metrics.restarted("hung")
    assert metrics.answers == {"OK": 4, "OVERLOADED": 1}
    assert metrics.restarts == {"hung": 1}
