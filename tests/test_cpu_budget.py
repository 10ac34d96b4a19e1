"""The arithmetic of `bench.cpu_budget`; what it counts is run by `make budget`."""

import pytest

from bench.cpu_budget import TOLERANCE, exceeded, totals

DUMP = """\
# callgrind format
part: 2
thread: 1
events: Ir
fn=(1)
12 34
totals: 336892
"""


def test_the_totals_of_a_dump_are_its_instructions():
    assert totals(DUMP) == 336_892
    assert totals(DUMP.replace("totals", "summary")) == 336_892


def test_a_dump_without_totals_is_no_zero():
    with pytest.raises(ValueError, match="no totals"):
        totals("# callgrind format\nevents: Ir\n")


def test_a_part_may_take_a_tenth_more_and_no_more_than_that():
    budget = {"front": 1000, "worker": 1000}
    most = round(1000 * (1 + TOLERANCE))
    assert exceeded({"front": most, "worker": 10}, budget) == []
    assert exceeded({"front": most + 1, "worker": 10}, budget) == ["front"]


def test_a_part_without_a_budget_exceeds_none():
    assert exceeded({"new": 10**9}, {}) == []
