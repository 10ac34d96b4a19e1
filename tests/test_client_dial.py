"""Which endpoint is used: the preference by itself, and dialling real sockets."""

from __future__ import annotations

import contextlib
import socket
import tempfile

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from pool.client import dial as dial_module
from pool.client.dial import Dial, Preference
from tests.scripted_server import scripted_server

NAMES = ("a", "b", "c")


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0, 20)), max_size=8), st.floats(0, 60))
def test_an_endpoint_is_avoided_for_a_while(marks, later):
    preference = Preference(NAMES)
    last: dict[str, float] = {}
    for name, when in sorted(marks, key=lambda mark: mark[1]):
        preference.avoid(name, when)
        last[name] = when
    now = 20 + later
    avoided = {name for name in NAMES if name in last and now < last[name] + dial_module._AVOID_S}
    for name in NAMES:
        assert preference.is_avoided(name, now) is (name in avoided)
        assert preference.has_better(name, now) is (name in avoided and len(avoided) < len(NAMES))


def test_a_sole_endpoint_is_always_good_enough():
    preference = Preference(["a"])
    preference.avoid("a", 0.0)
    assert preference.is_avoided("a", 1.0)
    assert not preference.has_better("a", 1.0)


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="pool-") as path:
        yield f"ipc://{path}/"


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


def settled(dial: Dial) -> None:
    """Wait until every attempt to connect has succeeded or failed once."""
    left = list(dial.connections)
    while left:
        zmq.zmq_poll([(each.monitor, zmq.POLLIN) for each in left], -1)
        left = [each for each in left if not each.is_connected() and not each.has_failed]


def test_the_first_in_order_is_taken_of_those_that_answer(directory, context):
    names = [directory + each for each in "abc"]
    with (
        scripted_server(names[1]),
        scripted_server(names[2]),
        contextlib.closing(Dial(context, Preference(names), 0.0)) as dial,
    ):
        settled(dial)
        connection = dial.take(0.0)
        assert connection.endpoint == names[1]
        connection.close()
        assert len(dial.connections) == 2


def test_one_that_is_avoided_is_taken_when_the_others_are_not_there(directory, context):
    nobody, there = directory + "a", directory + "b"
    preference = Preference([nobody, there])
    preference.avoid(there, 0.0)
    with scripted_server(there), contextlib.closing(Dial(context, preference, 0.0)) as dial:
        assert dial.take(0.0) is None
        settled(dial)
        connection = dial.take(0.0)
        assert connection.endpoint == there
        connection.close()
    assert preference.is_avoided(nobody, 0.0)  # so that it is not dialled again soon
    assert not preference.has_better(there, 0.0)


def test_one_that_is_avoided_waits_for_those_that_say_nothing(directory, context):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        there = directory + "b"
        preference = Preference([address, there])
        preference.avoid(there, 0.0)
        with scripted_server(there), contextlib.closing(Dial(context, preference, 0.0)) as dial:
            while not dial.connections[1].is_connected():
                zmq.zmq_poll([(dial.connections[1].monitor, zmq.POLLIN)], -1)
            assert 0 < dial.decides_at < dial_module._AVOID_S
            assert dial.take(dial.decides_at - 0.01) is None
            connection = dial.take(dial.decides_at)
            assert connection.endpoint == there
            connection.close()
