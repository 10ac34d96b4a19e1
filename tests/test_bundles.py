"""Answers to requests that came in bundles: what leaves together, and what does not."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from pool.errors import DeadlineExceeded
from pool.front.bundles import Bundles
from pool.wire import MAX_PARTS
from tests.rig import Rig, generation, identity


class Recorder:
    """In the place of an `Outbound`: the ids of each message, and how it would have left."""

    def __init__(self):
        self.sent = []

    def send_frames(self, ticket, _reply, _frames):
        self.sent.append(("joined", ticket.ids))

    def send_results(self, tickets, _reply, _slot):
        self.sent.append(("alone", [id_ for ticket in tickets for id_ in ticket.ids]))

    def send_bundle(self, tickets, _reply, _slot):
        self.sent.append(("bundle", [id_ for ticket in tickets for id_ in ticket.ids]))

    def refuse_bundled(self, _client, ids, error, _metrics):
        self.sent.append((type(error), ids))


@pytest.fixture
def rig():
    floats = identity(("x", "float32", (None, 1)))
    with Rig(generation(floats, max_batch_size=3 * MAX_PARTS, slots=2)) as made:
        made.recorder = Recorder()
        made.sink = Bundles(made.recorder)
        yield made


def place(rig, ids, millis=0):
    ids = list(ids)
    x = np.zeros((len(ids), 1), np.float32)
    parts = rig.parts(rig.route({"x": x}), [(id_, millis, 1) for id_ in ids])
    assert rig.generation.place_all(parts, [x.tobytes()], rig.now) == []
    return ids


def send_results(rig, row_bytes=4):
    (slot,) = rig.start()
    reply = SimpleNamespace(numeric=[(0, row_bytes)], row_bytes=row_bytes)
    rig.sink.send_results(slot.tickets, reply, slot)


def test_what_lies_together_leaves_together_as_far_as_a_table_goes(rig):
    """Bundles of several messages may make one message, but none that no client takes."""
    numbers = itertools.count(1)
    bundles = [place(rig, itertools.islice(numbers, count)) for count in (MAX_PARTS, 7, 9, MAX_PARTS - 8)]
    send_results(rig)
    assert rig.recorder.sent == [
        ("bundle", bundles[0]),
        ("bundle", bundles[1] + bundles[2]),
        ("bundle", bundles[3]),
    ]


@pytest.mark.parametrize(
    ("row_bytes", "messages"), [(200_000, [[1, 2, 3, 4, 5], [6, 7]]), (1 << 20, [[i] for i in range(1, 8)])]
)
def test_large_answers_do_not_wait_for_each_other(rig, row_bytes, messages):
    for id_ in range(1, 8):
        rig.place(id_, {"x": np.zeros((1, 1), np.float32)})
    send_results(rig, row_bytes)
    assert [ids for _, ids in rig.recorder.sent] == messages


def test_a_request_that_is_left_alone_is_answered_alone(rig):
    place(rig, [5])
    send_results(rig)
    assert rig.recorder.sent == [("alone", [5])]


def test_an_error_is_told_to_all_that_share_a_ticket(rig):
    ids = place(rig, range(1, 6), millis=10)
    (ticket,) = rig.batcher.expire(rig.now + 1.0)
    ticket.sink.send_error(ticket, DeadlineExceeded("late"))
    assert rig.recorder.sent == [(DeadlineExceeded, ids)]
