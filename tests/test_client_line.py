"""The client's end of lines: when it has one and what goes over it, and fronts that lie, refuse or go away.

A scripted front (`tests/scripted_line.py`) lies beside a scripted server, so that a test sees which way
each message took.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import uvloop
import zmq

from pool import AsyncClient, Client, Retry, packets, wire
from pool.client.connection import Connection
from pool.client.line import Approach, Line
from pool.endpoints import side_path
from pool.errors import Cancelled, DeadlineExceeded, PoolError, Unavailable, WireError
from pool.wire import Header, Kind, ResultMeta, TensorMeta
from tests.raw import await_that, no_descriptors
from tests.scripted_line import cut, scripted_lines, welcome
from tests.scripted_server import answer_properly, info, never, on_predict, result, rows, scripted_server

REPOSITORY = Path(__file__).resolve().parent.parent
QUICK = Retry(first_pause=0.001, longest_pause=0.002)


@pytest.fixture
def endpoint():
    # Not tmp_path: its name may be longer than the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        yield f"ipc://{directory}/s"


class Async:
    """An `AsyncClient` called as a `Client` is: its loop runs for the length of each call."""

    new_event_loop = staticmethod(asyncio.new_event_loop)

    def __init__(self, endpoint, **keywords):
        self._loop = self.new_event_loop()
        self._reports = []
        self._loop.set_exception_handler(lambda _, context: self._reports.append(context))
        self.client = AsyncClient(endpoint, **keywords)

    def __getattr__(self, name):
        def call(*args, **keywords):
            return self._loop.run_until_complete(getattr(self.client, name)(*args, **keywords))

        return call

    def run(self, coroutine):
        return self._loop.run_until_complete(coroutine)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._loop.run_until_complete(self.client.close())
        gc.collect()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        assert self._reports == []


class Uvloop(Async):
    new_event_loop = staticmethod(uvloop.new_event_loop)


@pytest.fixture(params=[Client, Async, Uvloop], ids=["sync", "asyncio", "uvloop"])
def made(request):
    """Makes a client of any kind."""
    return request.param


@pytest.fixture(params=[Async, Uvloop], ids=["asyncio", "uvloop"])
def made_async(request):
    return request.param


def with_a_line(client, lines):
    """Ask until an answer came over a line."""
    for _ in range(100):
        before = len(lines.requests)
        assert client.live()
        if len(lines.requests) > before:
            return
    raise AssertionError("no line")


# -- when there is one -------------------------------------------------------------------------------


def test_it_is_asked_for_with_the_second_message_and_used_from_its_welcome_on(made, endpoint):
    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint, greeting=None) as lines,
        made(endpoint) as client,
    ):
        client.live()
        assert not lines.came.acquire(timeout=0.05)
        client.live()
        lines.came.acquire()
        client.live()
        assert len(server.requests) == 3
        lines.greet()
        for _ in range(5):
            client.live()
        assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
        assert len(server.requests) == 3
        assert lines.kinds() == [*[Kind.LIVE] * 5, Kind.SIGNATURE, Kind.PREDICT]
        assert len(lines.peers) == 1
        assert not lines.came.acquire(blocking=False), "one for a connection"


def test_every_kind_of_call_goes_over_it(made, endpoint):
    strings = {"a": np.arange(2), "b": np.array([[b"", b"one"], [b"two" * 9999, b"3"]], object)}
    with scripted_server(endpoint) as server, scripted_lines(endpoint) as lines, made(endpoint) as client:
        with_a_line(client, lines)
        before = len(server.requests)
        assert client.live()
        assert client.ready()
        assert client.ready("m")
        assert client.status()["front"] == {"pid": 1}
        assert list(client.models()) == ["m"]
        got = client.predict("m", strings, signature="pair")
        assert got["b"].tolist() == strings["b"].tolist()
        assert got["a"].tolist() == [0, 1]
        got = client.predict("m", np.ones((2, 3), np.float32), signature="whole")["x"]
        assert got.flags.writeable
        assert len(server.requests) == before


def test_many_at_once_get_their_own_answers(made_async, endpoint):
    async def ask(client):
        sent = [rows(1 + i % 3) + np.float32(i) for i in range(400)]
        got = await asyncio.gather(*[client.predict("m", x) for x in sent])
        for x, outputs in zip(sent, got, strict=True):
            np.testing.assert_array_equal(outputs["y"], x)

    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint) as lines,
        made_async(endpoint) as client,
    ):
        with_a_line(client, lines)
        client.signature("m")
        before = len(server.requests)
        for _ in range(3):
            client.run(ask(client.client))
        assert lines.kinds().count(Kind.PREDICT) + len(server.requests) - before == 1200
        assert lines.kinds().count(Kind.PREDICT) > 400


def test_threads_have_a_line_each(endpoint):
    def ask(number):
        for i in range(30):
            x = rows(1) + np.float32(100 * number + i)
            np.testing.assert_array_equal(client.predict("m", x)["y"], x)

    with (
        scripted_server(endpoint),
        scripted_lines(endpoint) as lines,
        Client(endpoint) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        list(threads.map(ask, range(4)))
        assert 1 <= len(lines.peers) <= 4
        assert lines.kinds().count(Kind.PREDICT) > 60


def test_there_is_none_where_there_can_be_none():
    for path in (side_path("tcp://127.0.0.1:5600"), side_path(f"ipc:///{'x' * 104}")):
        assert Approach(path).is_over
    with scripted_server("tcp://127.0.0.1:*") as server, Client(server.endpoint) as client:
        for _ in range(5):
            assert client.live()


def test_nobody_there_and_no_descriptors_mean_that_there_is_none(endpoint):
    def steps(approach, count):
        return [approach.step() for _ in range(count) if not approach.is_over]

    nobody = Approach(side_path(endpoint))
    assert steps(nobody, 2) == [None, None]
    assert nobody.is_over
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(side_path(endpoint))
        refused = Approach(side_path(endpoint))  # bound, but nobody listens
        assert steps(refused, 2) == [None, None]
        assert refused.is_over
        listener.listen()
        poor = Approach(side_path(endpoint))
        with no_descriptors():
            assert steps(poor, 2) == [None, None]
        assert poor.is_over
        busy = [Approach(side_path(endpoint)) for _ in range(200)]  # more than wait to be accepted
        for approach in busy:
            steps(approach, 3)
        assert {approach.is_over for approach in busy} == {True, False}
        for approach in busy:
            approach.close()


# -- fronts that lie ---------------------------------------------------------------------------------

GREETINGS = {
    "refusal": wire.encode_error(0, Unavailable("no more")),
    "another version": welcome(version=2),
    "another magic": welcome(magic=b"plrg"),
    "noise": b"hello",
    "much noise": bytes(100_000),
    "a result": wire.encode_header(Header(Kind.RESULT, 0, b"\x92\x07\x90")),
    "silence": None,
    "its end": b"",
    "nothing taken": welcome(0),
    "little taken": welcome(packets.TABLE_MAX_BYTES + 1),
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS)
def test_without_a_welcome_everything_goes_through_zeromq(made, endpoint, greeting):
    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint, greeting=greeting) as lines,
        made(endpoint) as client,
    ):
        for _ in range(2):
            client.live()
        lines.came.acquire()
        for _ in range(4):
            client.live()
        assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
        assert len(server.requests) == 8
        assert lines.requests == []
        assert not lines.came.acquire(blocking=False), "asked for once"


def test_a_front_that_takes_everything_gets_what_the_socket_takes(made, endpoint):
    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint, greeting=welcome(2**64 - 1)) as lines,
        made(endpoint) as client,
    ):
        with_a_line(client, lines)
        for size in (1, 100_000, 3_000_000):
            image = np.random.default_rng(1).integers(0, 255, (1, size), np.uint8)
            got = client.predict("m", image, signature="large")
            assert got["x"].tobytes() == image.tobytes()
        assert lines.kinds().count(Kind.PREDICT) == 2
        assert server.kinds().count(Kind.PREDICT) == 1


SIZES = {
    "as they are": (packets.PACKET_MAX_BYTES,),
    "the table alone": (32, packets.PACKET_MAX_BYTES),
    "small": (1000,),
    "odd": (33, 77_777, 13),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("size", [1, 131_072, 350_000])
def test_replies_come_whole_in_whatever_packets(made, endpoint, sizes, size):
    if sizes[-1] < 1000 and size > 131_072:
        sizes = (*sizes[:-1], 1313)
    image = np.random.default_rng(size).integers(0, 255, (1, size), np.uint8)
    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint, sizes=sizes) as lines,
        made(endpoint) as client,
    ):
        with_a_line(client, lines)
        before = len(server.requests)
        for _ in range(3):
            got = client.predict("m", image, signature="large")["x"]
            assert got.tobytes() == image.tobytes()
            assert got.flags.writeable
        assert len(server.requests) == before


ONE = cut(info(9, {"live": True}))[0]
LONG = cut([wire.encode_header(Header(Kind.RESULT, 9, b"\x92\x07\x90")), bytes(9000)])[0]
NONSENSE = {
    "noise": [b"hello"],
    "a byte": [b"\0"],
    "no frames": [bytes(16)],
    "cut in the table": [ONE[:20]],
    "one byte more": [ONE + b"\0"],
    "a packet too long": [LONG[:4000], LONG[4000:] + b"\0"],
    "a wrong table": [(len(ONE) + 1).to_bytes(8, "little") + ONE[8:]],
    "no header": cut([b""]),
    "another header": cut([b"hello"]),
    "a request": cut([wire.encode_header(Header(Kind.LIVE, 9, b""))]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_error_and_the_next_call_works(made, endpoint, name):
    def script(header, tensors):
        if header.kind is Kind.PREDICT and not is_over:
            is_over.append(True)
            lines.say(NONSENSE[name])
            return None
        return answer_properly(header, tensors)

    is_over = []
    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, script) as lines,
        made(endpoint, timeout=30) as client,
    ):
        with_a_line(client, lines)
        with pytest.raises(WireError):
            client.predict("m", rows(1))
        assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
        with_a_line(client, lines)
        await_that(lambda: len(lines.peers) == 1)


def broken_result(header, tensors):
    """RESULTs that a ROUTER's client would not even take in, and one that it would."""
    frames = result(header, tensors)
    return {"without tensors": frames[:1], "two tensors": [*frames, *tensors], "cut": [frames[0], b"abc"]}


@pytest.mark.parametrize("name", ["without tensors", "two tensors", "cut"])
def test_a_broken_result_concerns_its_request_alone(made, endpoint, name):
    script = on_predict(lambda header, tensors: [broken_result(header, tensors)[name]])
    with scripted_server(endpoint), scripted_lines(endpoint, script) as lines, made(endpoint) as client:
        with_a_line(client, lines)
        for _ in range(2):
            with pytest.raises(WireError):
                client.predict("m", rows(1))
            assert client.live()
        assert len(lines.peers) == 1


def test_strange_ids_are_nobodys(made, endpoint):
    def strange(header, tensors):
        other = Header(header.kind, header.id + 1000, header.meta, rows=header.rows)
        return [[wire.encode_error(0, WireError("?"))], result(other, [bytes(12)]), result(header, tensors)]

    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, on_predict(strange)) as lines,
        made(endpoint) as client,
    ):
        with_a_line(client, lines)
        for i in range(3):
            x = rows(1) + np.float32(i)
            np.testing.assert_array_equal(client.predict("m", x)["y"], x)


# -- what goes which way -----------------------------------------------------------------------------


def test_what_does_not_fit_or_finds_no_room_goes_through_zeromq(made_async, endpoint):
    gate = threading.Event()

    def held(header, tensors):
        gate.wait()
        return answer_properly(header, tensors)

    async def ask(client):
        image = [np.random.default_rng(i).integers(0, 255, (1, 100_000), np.uint8) for i in range(40)]
        calls = [asyncio.ensure_future(client.predict("m", x, signature="large")) for x in image]
        _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert waiting
        gate.set()
        for x, call in zip(image, calls, strict=True):
            assert (await call)["x"].tobytes() == x.tobytes()

    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint) as lines,
        made_async(endpoint) as client,
    ):
        with_a_line(client, lines)
        client.signature("m")
        lines.answer = on_predict(held)
        client.run(ask(client.client))
        assert lines.kinds().count(Kind.PREDICT)
        assert server.kinds().count(Kind.PREDICT)
        assert lines.kinds().count(Kind.PREDICT) + server.kinds().count(Kind.PREDICT) == 40


@contextlib.contextmanager
def pair(endpoint):
    """A connection whose line is a socket of the test's, and the server."""
    context = zmq.Context()
    with (
        scripted_server(endpoint) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        listener.bind(side_path(endpoint))
        listener.listen()
        connection = Connection(context, endpoint)
        live = wire.encode_header(Header(Kind.LIVE, 1, b""))
        try:
            for _ in range(2):
                connection.send([live])
            peer, _ = listener.accept()
            peer.recv(100)
            peer.send(welcome())
            for _ in range(2):
                assert connection.receive_within(30)
            yield connection, peer, server
            peer.close()
        finally:
            connection.close()
            context.term()


def test_what_the_line_takes_and_what_not(endpoint):
    with pair(endpoint) as (connection, peer, server):

        def way(size):
            frames = [wire.encode_header(Header(Kind.PREDICT, 7, b"")), bytes(size - wire.FIXED_BYTES)]
            heard = len(server.requests)
            connection.send(frames)
            try:
                got = peer.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                await_that(lambda: len(server.requests) > heard)
                return "zeromq"
            assert packets.split(memoryview(got)) == frames
            return "line"

        server.answer = never
        most = packets.REQUEST_MAX_BYTES - packets.TABLE_MAX_BYTES
        assert [way(size) for size in (24, 1000, 100_000)] == ["line"] * 3
        room = connection.line._most_bytes - packets.TABLE_MAX_BYTES
        assert room <= most
        assert [way(size) for size in (room - 1, room, room + 1)] == ["line", "line", "zeromq"]


def test_a_line_that_is_never_empty_does_not_keep_zeromqs_replies_waiting(endpoint):
    with pair(endpoint) as (connection, peer, server):
        connection.send([wire.encode_header(Header(Kind.LIVE, 2, b""))])  # takes the line
        heard = len(server.requests)
        connection._queue([wire.encode_header(Header(Kind.LIVE, 3, b""))])
        await_that(lambda: len(server.requests) > heard)
        found = 0
        for _ in range(1000):
            peer.send(cut([wire.encode_error(99, Unavailable("no"))])[0])
            found += wire.peek_id(connection.receive()[0]) == 3
        assert found == 1
        assert wire.peek_id(connection.receive()[0]) == 99
        with pytest.raises(zmq.Again):
            connection.receive()


@contextlib.contextmanager
def quiet(endpoint):
    """As `pair`, with nothing to read when it was looked last, and then an answer through ZeroMQ."""
    with pair(endpoint) as (connection, peer, server):
        connection.send([wire.encode_header(Header(Kind.LIVE, 2, b""))])  # takes the line
        assert connection.is_connected()
        connection.wait(0)
        server.say(info(9, {"live": True}))
        assert select.select([connection.socket.fileno()], [], [], 30)[0]
        yield connection, peer, server


@pytest.mark.parametrize(
    "look",
    [
        lambda connection: connection.wait(30_000),
        Connection.has_room,
        Connection.has_message,
        Connection.is_broken,
        lambda connection: select.select(connection.descriptors(), [], [], 30),
    ],
    ids=["wait", "has_room", "has_message", "is_broken", "descriptors"],
)
def test_what_comes_through_zeromq_beside_a_quiet_line_is_met(endpoint, look):
    with quiet(endpoint) as (connection, _, _):
        look(connection)
        assert wire.peek_id(connection.receive()[0]) == 9


def test_the_end_of_a_line_does_not_hide_it(endpoint):
    with quiet(endpoint) as (connection, peer, _):
        peer.close()
        assert wire.peek_id(connection.receive()[0]) == 9
        assert connection.is_broken()


def test_the_end_of_zeromqs_connection_is_noticed_beside_a_quiet_line(endpoint):
    with quiet(endpoint) as (connection, _, server):
        assert connection.receive_within(5)
        connection.wait(0)
        assert not connection.is_broken()
        server.stop()
        await_that(connection.is_broken)


def test_what_the_front_says_is_the_receivers_own(endpoint):
    with pair(endpoint) as (connection, peer, _):
        connection.send([wire.encode_header(Header(Kind.LIVE, 2, b""))])
        header = wire.encode_header(Header(Kind.RESULT, 2, b"\x92\x07\x90"))
        peer.send(cut([header, b"first"])[0])
        peer.send(cut([header, b"other"])[0])
        first, other = connection.receive(), connection.receive()
        assert (first, other) == ([header, b"first"], [header, b"other"])
        first[1][:] = b"taken"
        assert other == [header, b"other"]


# -- lines that end ----------------------------------------------------------------------------------


def test_its_end_is_the_end_of_what_was_under_way(made, endpoint):
    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, on_predict(never)) as lines,
        made(endpoint, timeout=math.inf) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        with_a_line(client, lines)
        client.signature("m")
        call = threads.submit(client.predict, "m", rows(1))
        lines.predicted.acquire()
        lines.hang_up()
        with pytest.raises(Unavailable, match=f"the server at {endpoint} went away before it answered"):
            call.result()
        lines.answer = answer_properly
        assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
        with_a_line(client, lines)


def test_what_is_lost_with_it_is_tried_again(made, endpoint):
    def dying(header, tensors):
        if len(lost) < 2:
            lost.append(header.id)
            lines.hang_up()
            return None
        return answer_properly(header, tensors)

    lost = []
    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint, on_predict(dying)) as lines,
        made(endpoint, retry=QUICK) as client,
    ):
        for _ in range(2):
            with_a_line(client, lines)
            assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
        assert len(lost) == 2
        assert server.kinds().count(Kind.PREDICT) == 2


def test_its_end_concerns_what_went_through_zeromq_too(made_async, endpoint):
    async def go(client, server, lines):
        loop = asyncio.get_running_loop()
        await client.signature("m")  # the first message
        by_zeromq = [asyncio.ensure_future(client.predict("m", rows(1)))]  # the second
        await loop.run_in_executor(None, server.predicted.acquire)
        await loop.run_in_executor(None, lines.came.acquire)
        by_line = [asyncio.ensure_future(client.predict("m", rows(1)))]
        await loop.run_in_executor(None, lines.predicted.acquire)
        lines.hang_up()
        outcomes = await asyncio.gather(*by_zeromq, *by_line, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable] * 2
        server.answer = lines.answer = answer_properly
        assert (await client.predict("m", rows(2)))["y"].tolist() == rows(2).tolist()

    script = on_predict(never)
    with (
        scripted_server(endpoint, script) as server,
        scripted_lines(endpoint, script) as lines,
        made_async(endpoint, timeout=math.inf) as client,
    ):
        client.run(go(client.client, server, lines))


def test_an_idle_one_that_ends_is_replaced(made, endpoint):
    with scripted_server(endpoint), scripted_lines(endpoint) as lines, made(endpoint, retry=QUICK) as client:
        for _ in range(3):
            with_a_line(client, lines)
            lines.hang_up()
            await_that(lambda: not lines.peers)
            assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()


def test_what_the_front_said_before_it_ended_counts(endpoint):
    """It did not read all that was sent: the kernel then says so before it gives what was said."""
    with pair(endpoint) as (connection, peer, _):
        for id_ in (2, 3):
            connection.send([wire.encode_header(Header(Kind.LIVE, id_, b""))])
        image = bytes(200_000)
        header = wire.encode_header(Header(Kind.RESULT, 2, b"\x92\x07\x90"))
        for part in cut([header, image]):
            peer.send(part)
        peer.close()
        got = None
        while got is None:
            with contextlib.suppress(zmq.Again):
                got = connection.receive()
        assert got == [header, image]
        with pytest.raises(zmq.Again):
            connection.receive()
        assert connection.is_broken()


@pytest.mark.parametrize("length", [32, 70_000, 199_999])
def test_an_end_in_the_middle_of_a_message_is_an_end(made, endpoint, length):
    def half(header, tensors):
        if header.kind is not Kind.PREDICT or len(lost) == 2:
            return answer_properly(header, tensors)
        lost.append(header.id)
        said = b"".join(cut(result(header, tensors)))[:length]
        lines.say([said[at : at + 60_000] for at in range(0, len(said), 60_000)])
        lines.hang_up()
        return None

    lost = []
    image = np.ones((1, 200_000), np.uint8)
    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, half) as lines,
        made(endpoint, timeout=30) as client,
    ):
        for _ in range(2):
            with_a_line(client, lines)
            with pytest.raises(Unavailable):
                client.predict("m", image, signature="large")
        assert client.predict("m", image, signature="large")["x"].tobytes() == image.tobytes()


# -- time, and giving up -----------------------------------------------------------------------------


def test_a_deadline_passes_over_a_line(made, endpoint):
    with (
        scripted_server(endpoint) as server,
        scripted_lines(endpoint, on_predict(never)) as lines,
        made(endpoint) as client,
    ):
        with_a_line(client, lines)
        with pytest.raises(DeadlineExceeded, match=rf"no answer from {endpoint} within 0\.05 s"):
            client.predict("m", rows(1), timeout=0.05)
        assert lines.kinds()[-1] in (Kind.PREDICT, Kind.CANCEL)
        lines.answer = answer_properly
        assert client.predict("m", rows(2), timeout=30)["y"].tolist() == rows(2).tolist()
        assert Kind.PREDICT not in server.kinds() or made is Client


@pytest.mark.parametrize("timeout", [math.inf, 1e9, 2.0**31 / 1000 + 1, 30.0])
def test_any_timeout_will_do(made, endpoint, timeout):
    def slow(header, tensors):
        threading.Event().wait(0.02)  # so that the client waits
        return answer_properly(header, tensors)

    with scripted_server(endpoint), scripted_lines(endpoint) as lines, made(endpoint) as client:
        with_a_line(client, lines)
        client.signature("m")
        lines.answer = on_predict(slow)
        assert client.predict("m", rows(2), timeout=timeout)["y"].tolist() == rows(2).tolist()
        assert lines.kinds()[-1] is Kind.PREDICT


def test_a_late_reply_is_not_taken_for_the_next(made_async, endpoint):
    def late(header, tensors):
        if header.millis < 1000:
            return None
        old = Header(Kind.PREDICT, header.id - 1, header.meta, rows=header.rows)
        return [result(old, [bytes(12)]), result(header, tensors)]

    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, on_predict(late)) as lines,
        made_async(endpoint) as client,
    ):
        with_a_line(client, lines)
        client.signature("m")
        with pytest.raises(DeadlineExceeded):
            client.predict("m", rows(1), timeout=0.05)
        np.testing.assert_array_equal(client.predict("m", rows(1))["y"], rows(1))
        assert len(lines.peers) == 1


def test_a_cancelled_call_is_withdrawn_whichever_way_it_went(made_async, endpoint):
    async def withdrawn(there, number):
        while there.ids(Kind.PREDICT)[number] not in there.ids(Kind.CANCEL):
            await asyncio.get_running_loop().run_in_executor(None, there.cancelled.acquire)

    async def go(client, server, lines):
        loop = asyncio.get_running_loop()
        await client.signature("m")
        by_zeromq = asyncio.ensure_future(client.predict("m", rows(1)))
        await loop.run_in_executor(None, server.predicted.acquire)
        await loop.run_in_executor(None, lines.came.acquire)
        by_line = asyncio.ensure_future(client.predict("m", rows(1)))  # the line has come up meanwhile
        await loop.run_in_executor(None, lines.predicted.acquire)
        for call, there in ((by_zeromq, server), (by_line, lines)):
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await withdrawn(there, 0)
        with pytest.raises(DeadlineExceeded):
            await client.predict("m", rows(1), timeout=0.1)
        await withdrawn(lines, 1)
        assert client._exchange._pending == {}
        assert await client.live()

    script = on_predict(never)
    with (
        scripted_server(endpoint, script) as server,
        scripted_lines(endpoint, script) as lines,
        made_async(endpoint) as client,
    ):
        client.run(go(client.client, server, lines))


# -- life and death of a client ----------------------------------------------------------------------


def test_closing_cancels_calls_that_wait_on_lines(endpoint):
    with (
        scripted_server(endpoint),
        scripted_lines(endpoint) as lines,
        ThreadPoolExecutor(2) as threads,
    ):
        client = Client(endpoint, timeout=math.inf)
        client.signature("m")
        lines.answer = on_predict(never)
        with_a_line(client, lines)
        call = threads.submit(client.predict, "m", rows(1))
        lines.predicted.acquire()
        client.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            call.result()
        await_that(lambda: not lines.peers)


def test_threads_of_a_closing_client_do_not_meet_a_crash(endpoint):
    with (
        scripted_server(endpoint),
        scripted_lines(endpoint) as lines,
        ThreadPoolExecutor(4) as threads,
    ):
        client = Client(endpoint)
        started = threading.Barrier(5)

        def call():
            started.wait()
            with contextlib.suppress(Cancelled):
                while True:
                    client.predict("m", rows(1))

        calls = [threads.submit(call) for _ in range(4)]
        started.wait()
        await_that(lambda: lines.kinds().count(Kind.PREDICT) > 50)
        client.close()
        for each in calls:
            each.result()
        await_that(lambda: not lines.peers)


def test_a_connection_that_is_looked_at_as_its_client_closes_is_closed(endpoint, monkeypatch):
    def ended(connection):
        looked_at.append(connection)
        raise zmq.ContextTerminated

    looked_at = []
    with scripted_server(endpoint), scripted_lines(endpoint), Client(endpoint) as client:
        client.predict("m", rows(1))
        monkeypatch.setattr(Connection, "is_broken", ended)
        with pytest.raises(Cancelled):
            client.predict("m", rows(1))
        assert [connection.socket.closed for connection in looked_at] == [True]


def test_closing_an_asyncio_client_cancels_what_is_under_way(made_async, endpoint):
    async def go(client, lines):
        call = asyncio.ensure_future(client.predict("m", rows(1)))
        await asyncio.get_running_loop().run_in_executor(None, lines.predicted.acquire)
        await client.close()
        with pytest.raises(Cancelled):
            await call

    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, on_predict(never)) as lines,
        made_async(endpoint) as client,
    ):
        with_a_line(client, lines)
        client.run(go(client.client, lines))
        await_that(lambda: not lines.peers)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_no_file_stays_open(made, endpoint):
    with scripted_server(endpoint), scripted_lines(endpoint) as lines:

        def use():
            with made(endpoint, timeout=30) as client:
                with_a_line(client, lines)
                lines.answer = on_predict(never)
                with pytest.raises(DeadlineExceeded):
                    client.predict("m", rows(1), timeout=0.02)
                lines.hang_up()
                client.live()
                lines.answer = answer_properly
                with_a_line(client, lines)
            await_that(lambda: not lines.peers)

        def use_without_welcome():
            lines._greeting = None
            with made(endpoint) as client:
                for _ in range(4):
                    client.live()
            await_that(lambda: not lines.peers)
            lines.greet()

        use()  # what is made once and kept
        before = open_files()
        use()
        use_without_welcome()
        await_that(lambda: open_files() <= before)  # the server's ZeroMQ closes its end when it comes to it


FORKING = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons on fork with threads, which is the point
from pool import Client
from tests.scripted_server import rows
client = Client(sys.argv[1])
for _ in range(5):
    client.predict("m", rows(1))
child = os.fork()
for _ in range(50):
    assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()
if child == 0:
    client.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert client.predict("m", rows(2))["y"].tolist() == rows(2).tolist()  # the child's end is not this one's
client.close()
print("done")
"""


def test_a_client_works_on_both_sides_of_a_fork(endpoint):
    with scripted_server(endpoint) as server, scripted_lines(endpoint) as lines:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", FORKING, endpoint],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("done\n", "")
        assert lines.kinds().count(Kind.PREDICT) > 90
        assert server.kinds().count(Kind.PREDICT) < 10


def test_a_line_says_nothing_that_it_was_not_asked_for(endpoint):
    """What its socket has no room for is not sent in part."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(side_path(endpoint))
        listener.listen()
        line = Line(side_path(endpoint))
        peer, _ = listener.accept()
        assert not line.is_welcome()
        peer.recv(100)
        peer.send(welcome())
        assert line.is_welcome()
        frames = [bytes(24), bytes(30_000)]
        sent = 0
        while line.send(frames, 30_024):
            sent += 1
        assert sent > 1
        for _ in range(sent):
            assert packets.split(memoryview(peer.recv(1 << 20))) == frames
        assert line.send(frames, 30_024), "there is room again"
        assert line.receive() is None
        assert not line.is_lost
        peer.close()
        while not line.is_lost:
            assert line.receive() is None
        assert not line.send(frames, 30_024)
        line.close()


def test_errors_are_what_the_front_says(made, endpoint):
    script = on_predict(lambda header, _: [[wire.encode_error(header.id, PoolError("own words"))]])
    with scripted_server(endpoint), scripted_lines(endpoint, script) as lines, made(endpoint) as client:
        with_a_line(client, lines)
        with pytest.raises(PoolError, match="own words"):
            client.predict("m", rows(1))


def test_bundled_replies_come_over_it(made_async, endpoint):
    """The answers of several requests in one message, more of them than a packet takes."""
    held = []

    def together(header, tensors):
        held.append((header, tensors))
        if len(held) < 8:
            return None
        total = sum(header.rows for header, _ in held)
        outputs = (TensorMeta("x", "uint8", (20_000,)),)
        head = wire.HEAD.pack(wire.head(Kind.RESULT, wire.Flag.BUNDLE), 0, 0, total)
        table = b"".join(wire.PART.pack(header.id, 0, header.rows) for header, _ in held)
        rows_ = b"".join(bytes(tensor) for _, (tensor,) in held)
        return [[head + wire.encode_meta(ResultMeta(7, outputs)), table, rows_]]

    async def ask(client):
        sent = [np.full((1, 20_000), i, np.uint8) for i in range(8)]
        got = await asyncio.gather(*[client.predict("m", x, signature="large") for x in sent])
        for x, outputs in zip(sent, got, strict=True):
            np.testing.assert_array_equal(outputs["x"], x)

    with (
        scripted_server(endpoint),
        scripted_lines(endpoint, on_predict(together)) as lines,
        made_async(endpoint) as client,
    ):
        with_a_line(client, lines)
        client.run(ask(client.client))
        assert lines.kinds().count(Kind.PREDICT) == 8
