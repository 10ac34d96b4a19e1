"""Which endpoint is used: the preference by itself, and dialling real sockets."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import tempfile

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from pool.client import dial as dial_module
from pool.client.connection import choose_front
from pool.client.core import ClientCore
from pool.client.dial import Dial, Preference
from pool.endpoints import front_endpoint
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


def wait_for(connections) -> None:
    """Wait until all of these are connected."""
    left = list(connections)
    while left := [each for each in left if not each.is_connected()]:
        zmq.zmq_poll([(each.monitor, zmq.POLLIN) for each in left], -1)


def test_the_first_in_order_is_taken_of_those_that_answer(directory, context):
    names = [directory + each for each in "abc"]
    with (
        scripted_server(names[1]),
        scripted_server(names[2]),
        contextlib.closing(Dial(context, Preference(names), None, 0.0)) as dial,
    ):
        wait_for(dial.connections[1:])
        connection = dial.take(0.0)
        assert connection.endpoint == names[1]
        connection.close()
        assert len(dial.connections) == 2


def test_one_that_is_avoided_is_taken_when_no_other_answers(directory, context):
    nobody, there = directory + "a", directory + "b"
    preference = Preference([nobody, there])
    preference.avoid(there, 0.0)
    with scripted_server(there), contextlib.closing(Dial(context, preference, None, 0.0)) as dial:
        wait_for(dial.connections[1:])
        assert 0 < dial.decides_at < dial_module._AVOID_S
        assert dial.take(dial.decides_at - 0.01) is None
        connection = dial.take(dial.decides_at)
        assert connection.endpoint == there
        connection.close()
        assert preference.is_avoided(nobody, dial.decides_at)  # so that it is not waited for again soon
        assert not preference.has_better(there, dial.decides_at)


def test_one_that_is_avoided_is_not_taken_when_another_answers(directory, context):
    names = [directory + "a", directory + "b"]
    preference = Preference(names)
    preference.avoid(names[0], 0.0)
    with (
        scripted_server(names[0]),
        scripted_server(names[1]),
        contextlib.closing(Dial(context, preference, None, 0.0)) as dial,
    ):
        wait_for(dial.connections)
        connection = dial.take(0.0)
        assert connection.endpoint == names[1]
        connection.close()


def test_a_sole_endpoint_is_taken_as_soon_as_it_answers(directory, context):
    preference = Preference([directory + "a"])
    preference.avoid(directory + "a", 0.0)
    with (
        scripted_server(directory + "a"),
        contextlib.closing(Dial(context, preference, None, 0.0)) as dial,
    ):
        assert dial.decides_at == math.inf
        wait_for(dial.connections)
        dial.take(0.0).close()


def test_closing_a_connection_disturbs_no_other(directory, context):
    # Events of one that is closed while it connects must not stop the thread that serves them all.
    names = [directory + "a", directory + "b"]
    core = ClientCore()
    with scripted_server(names[0]), scripted_server(names[1]):
        for _ in range(200):
            with contextlib.closing(Dial(context, Preference(names), None, 0.0)) as dial:
                while (connection := dial.take(0.0)) is None:
                    zmq.zmq_poll([(each.monitor, zmq.POLLIN) for each in dial.connections], -1)
            request = core.live_request()
            connection.send(request.message())
            assert connection.socket.poll(30_000)
            assert core.receive(connection.receive()).id == request.id
            connection.close()


def test_of_a_servers_fronts_any_is_met_but_one_that_is_gone(directory):
    endpoint = directory + "pool.sock"
    others = [front_endpoint(endpoint, number) for number in (1, 2, 5)]
    with contextlib.ExitStack() as stack:
        listening = {}
        for each in (endpoint, *others):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(each.removeprefix("ipc://"))
            sock.listen(1_000)
            listening[each] = sock
        assert {choose_front(endpoint) for _ in range(200)} == {endpoint, *others}
        listening[others[0]].close()  # killed: its file is still there
        assert {choose_front(endpoint) for _ in range(200)} == {endpoint, *others[1:]}
        os.unlink(endpoint.removeprefix("ipc://"))  # hidden, for want of descriptors
        assert {choose_front(endpoint) for _ in range(200)} == set(others[1:])
        for each in others[1:]:
            listening[each].close()
        assert choose_front(endpoint) == endpoint


def test_a_server_with_one_front_is_not_touched_before_it_is_met(directory):
    endpoint = directory + "pool.sock"
    assert choose_front(endpoint) == endpoint
    assert choose_front("tcp://127.0.0.1:1") == "tcp://127.0.0.1:1"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(endpoint.removeprefix("ipc://"))
        sock.listen()
        sock.setblocking(False)
        assert choose_front(endpoint) == endpoint
        with pytest.raises(BlockingIOError):
            sock.accept()
