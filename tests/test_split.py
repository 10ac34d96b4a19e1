"""Into which pieces batches are cut: what is tried, what wins, and what a bout may cost."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.worker.split import WHOLE, Split

# Milliseconds a row takes with so many a call. The first is MobileNetV2's on two busy cores.
CACHES = {1: 9.3, 2: 8.2, 4: 8.7, 8: 9.0}
PLATEAU = {1: 9.9, 2: 7.5, 4: 9.0, 8: 9.0}
CALLS = {1: 20.0, 2: 10.0, 4: 5.0, 8: 2.5}  # each call takes the same
NO_MATTER = {1: 5.1, 2: 5.05, 4: 5.02, 8: 5.0}


def run(split, costs, batches, rows=8, seed=0, noise=0.05):
    """Batches on a machine that is slower by a third every few seconds; gives the time against whole ones."""
    chance = random.Random(seed)
    took = whole = 0.0
    for i in range(batches):
        speed = (1 + 0.3 * math.sin(i / 60)) * chance.lognormvariate(0, noise) / 1000 * rows
        size = split.choose(rows)
        split.learn(rows, size, costs[size or rows] * speed)
        took += costs[size or rows] * speed
        whole += costs[rows] * speed
    return took / whole


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("costs", "at_most"), [(CACHES, 0.95), (PLATEAU, 0.87)])
def test_the_fastest_size_is_found_in_noise(costs, at_most, seed):
    split = Split(lambda _: True, math.inf)
    run(split, costs, 300, seed=seed)
    assert run(split, costs, 1000, seed=seed) < at_most


@pytest.mark.parametrize(("costs", "at_most"), [(CALLS, 1.01), (NO_MATTER, 1.01)])
def test_where_pieces_do_not_pay_bouts_cost_next_to_nothing(costs, at_most):
    split = Split(lambda _: True, math.inf)
    run(split, costs, 500)
    assert run(split, costs, 5000) < at_most


def test_what_was_found_is_left_when_it_does_not_hold_any_more():
    split = Split(lambda _: True, math.inf)
    run(split, PLATEAU, 300)
    assert split.choose(8) == 2
    run(split, CALLS, 1000)
    assert split.choose(8) == WHOLE
    run(split, PLATEAU, 10_000)
    assert split.choose(8) == 2


def test_a_size_that_is_much_worse_is_tried_twice_and_no_smaller_one_at_all():
    split = Split(lambda _: True, math.inf)
    sizes = []
    for _ in range(130):
        sizes.append(split.choose(8))
        split.learn(8, sizes[-1], CALLS[sizes[-1] or 8])
    assert [size for size in sizes if size] == [4, 4]
    assert not any(a and b for a, b in pairwise(sizes))


@pytest.mark.parametrize("took_s", [0.0019, 1.01])
def test_nothing_is_tried_in_runs_that_are_too_short_or_too_long(took_s):
    split = Split(lambda _: True, 1.0)
    for _ in range(1000):
        assert split.choose(64) == WHOLE
        split.learn(64, WHOLE, took_s)


def test_batches_of_one_row_and_those_smaller_than_a_piece_are_whole():
    split = Split(lambda _: True, math.inf)
    for _ in range(100):
        assert split.choose(1) == WHOLE
        split.learn(1, WHOLE, 1.0)
    run(split, PLATEAU, 300)
    assert [split.choose(rows) for rows in (1, 2, 3)] == [WHOLE, WHOLE, 2]


def test_what_was_forbidden_stays_so():
    split = Split(lambda _: True, math.inf)
    run(split, PLATEAU, 300)
    split.forbid()
    assert run(split, PLATEAU, 10_000) == 1.0


@given(
    st.sets(st.integers(0, 6).map(lambda i: 1 << i)),
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), max_size=300),
)
def test_only_sizes_that_may_be_and_fewer_than_the_rows_are_ever_tried(allowed, batches):
    split = Split(allowed.__contains__, 8.0)
    for rows, took_s in batches:
        size = split.choose(rows)
        assert size == WHOLE or (size in allowed and size < rows)
        split.learn(rows, size, took_s)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_a_bout_takes_twice_as_long_at_most_whatever_calls_cost(seed, sizes_of_batches):
    """Calls that take the same whatever rows they have are the worst case: bouts are two calls, not more."""
    chance = random.Random(seed)
    split = Split(lambda _: True, math.inf)
    for _ in range(400):
        rows = chance.choice(sizes_of_batches)
        size = split.choose(rows)
        calls = -(-rows // (size or rows))
        assert calls <= 2
        split.learn(rows, size, float(calls))


def test_a_round_that_finds_no_batches_like_those_before_begins_anew():
    split = Split(lambda _: True, math.inf)
    run(split, PLATEAU, 8, rows=8)  # the rest ends: 4 is to be tried
    run(split, {3: 9.0, 2: 5.0, 1: 9.0}, 300, rows=3)
    assert split.choose(3) == 2
