"""What ZeroMQ still holds for a client, told by marks that come back in order."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pool.front.outbox import Outbox


@dataclass
class Mark:
    done: bool = False


def test_bytes_count_until_the_mark_after_them_has_left():
    outbox = Outbox()
    first, second = Mark(), Mark()
    outbox.mark(first, 100)
    outbox.mark(second, 50)
    assert outbox.unread_bytes == 150
    second.done = True  # nothing overtakes: the first is only not seen yet
    outbox.look()
    assert outbox.unread_bytes == 150
    first.done = True
    outbox.look()
    assert outbox.unread_bytes == 0


def test_a_slot_is_pinned_until_the_last_message_read_from_it_has_left():
    outbox = Outbox()
    marks = [Mark(), Mark(), Mark()]
    for mark, slot in zip(marks, ("a", "b", "a"), strict=True):
        outbox.mark(mark, 1, slot)
    assert outbox.pinned == {"a": 2, "b": 1}
    marks[0].done = marks[1].done = True
    outbox.look()
    assert outbox.pinned == {"a": 1}
    marks[2].done = True
    outbox.look()
    assert outbox.pinned == {}


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, "a", "b"]), st.booleans()), max_size=30))
def test_what_is_counted_is_what_has_not_left(steps):
    outbox, marks = Outbox(), []
    for size, slot, leaves in steps:
        mark = Mark()
        outbox.mark(mark, size, slot)
        marks.append((mark, size, slot))
        if leaves:
            marks[0][0].done = True
            del marks[0]
        outbox.look()
        assert outbox.unread_bytes == sum(size for _, size, _ in marks)
        slots = [slot for _, _, slot in marks if slot is not None]
        assert outbox.pinned == {slot: slots.count(slot) for slot in slots}
