"""Sums over fronts. That they are those of a real server is in `test_fronts`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pool.front import tallies

LEAVES = st.integers(0, 1000)
NAMES = st.sampled_from("abc")
TREES = st.fixed_dictionaries(
    {
        "requests": LEAVES,
        "errors": st.dictionaries(NAMES, LEAVES),
        "models": st.dictionaries(
            NAMES,
            st.fixed_dictionaries({"rows": LEAVES, "counts": st.lists(LEAVES, min_size=3, max_size=3)}),
        ),
    }
)


def leaves(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield (*path, i), value
    else:
        yield path, tree


@given(st.lists(TREES, min_size=1, max_size=4))
def test_each_leaf_is_the_sum_of_those_in_its_place(trees):
    wanted = {}
    for tree in trees:
        for path, value in leaves(tree):
            wanted[path] = wanted.get(path, 0) + value
    assert dict(leaves(tallies.add_all(trees))) == wanted


@given(TREES, TREES)
def test_adding_changes_neither(first, second):
    before = dict(leaves(first)), dict(leaves(second))
    tallies.add(first, second)
    assert (dict(leaves(first)), dict(leaves(second))) == before


def test_of_a_front_that_has_ended_stays_what_it_counted_of_what_is_served():
    tally = {
        "requests": 5,
        "models": {"kept": {"rows": 1}, "removed": {"rows": 2}},
        "pipelines": {"gone": {"answers": {"OK": 1}}},
        "now": {"clients": 3},
    }
    kept = tallies.past(tally, ["kept"], [])
    assert kept == {"requests": 5, "models": {"kept": {"rows": 1}}, "pipelines": {}}
    assert tallies.past({}, ["kept"], []) == {"models": {}, "pipelines": {}}
