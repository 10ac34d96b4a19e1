"""The heap of deadlines against a plain list of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pool.client.deadlines import Deadlines

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 50)),
        st.tuples(st.just("answer"), st.integers(0, 60)),
        st.tuples(st.just("wait"), st.integers(0, 20)),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_pending_request_is_overdue_once_and_in_time(steps):
    pending: dict[int, float] = {}
    deadlines = Deadlines(pending)
    now = 0.0
    for id_, (step, number) in enumerate(steps):
        if step == "add":
            pending[id_] = now + number
            deadlines.add(now + number, id_, float(number))
        elif step == "answer":
            pending.pop(number, None)
        else:
            now += number
            expected = {i for i, when in pending.items() if when <= now}
            overdue = []
            for id_, timeout in deadlines.take_overdue(now):
                assert pending.pop(id_) <= now
                assert 0 <= timeout <= 50
                overdue.append(id_)
            assert sorted(overdue) == sorted(expected)
        assert deadlines.next() == min(pending.values(), default=None)


def test_deadlines_of_the_answered_do_not_pile_up():
    pending: set[int] = set()
    deadlines = Deadlines(pending)
    deadlines.add(0.5, 0, 1.0)
    pending.add(0)
    for id_ in range(1, 10_000):
        deadlines.add(float(id_), id_, 1.0)
    assert len(deadlines) <= 2 + 257
    assert list(deadlines.take_overdue(10_000)) == [(0, 1.0)]
    deadlines.add(1.0, 0, 1.0)
    deadlines.clear()
    assert deadlines.next() is None
