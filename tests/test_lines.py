"""The front's end of lines, on real servers: who gets one, what comes over it, and clients that do harm."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from pool import AsyncClient, Client, Retry, errors, packets, wire
from pool.backends import drill as drill_backend
from pool.endpoints import side_path
from pool.errors import Cancelled, Unavailable, WireError, WorkerLost
from pool.front.clients import Clients
from pool.front.doorway import Doorway
from pool.front.lines import Lines
from pool.wire import Flag, Header, Kind
from tests.mutation import Mutator
from tests.raw import (
    RawLine,
    anonymous_bytes,
    await_room,
    await_that,
    bound,
    drill,
    drill_bundle,
    drill_meta,
    drill_tensors,
    ids,
)
from tests.test_fuzz import answers_due
from tests.test_wire import documented_messages
from tests.test_withdrawing import kinds, queue_rows, stopped_worker

MIB = 1 << 20
MAX_UNREAD_BYTES = 4 * MIB
KERNEL_BYTES = MIB  # in the buffers of a line; a quarter of that here
FUZZED = 8_000
UNDER_WAY = 40  # requests without an answer at a time: few enough that their rows find room

# Replies of 64 KiB a row: of two rows and more, in several packets.
WIDE_ITEMS = 16_384
WIDE_BYTES = 4 * WIDE_ITEMS
CONFIG = """
[models.m]
backend = "drill"
path = "{folder}/m"
max_batch_size = 4
slots = 5
max_inflight_rows = 20
warm_up = false

[models.wide]
backend = "drill"
path = "{folder}/wide"
max_batch_size = 32
slots = 6
warm_up = false
"""
ROWS = 20  # of the arena of m
PATIENT = Retry(attempts=1000, first_pause=0.01, longest_pause=0.05)


def write_models(folder):
    for name, items in (("m", 4), ("wide", WIDE_ITEMS)):
        (folder / name).mkdir()
        (folder / name / "drill.toml").write_text(f"row_items = {items}")
    return CONFIG.format(folder=folder)


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    text = write_models(folder)
    with start_server(folder, text, server=f"max_unread_bytes = {MAX_UNREAD_BYTES}") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    """Looks on, through ZeroMQ."""
    with Client(server.endpoint, share_memory=False) as made:
        assert made.live()
        yield made


@pytest.fixture
def line(server):
    with RawLine(server.endpoint) as made:
        await_room(made, "m", ROWS)
        yield made
        made.question(Kind.LIVE)  # and nothing else is left to come


def front(client):
    return client.status()["front"]


def descriptors(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def inputs(rows, items=4, value=0.0):
    return {
        "x": np.arange(rows * items, dtype=np.float32).reshape(rows, items) + np.float32(value),
        "fault": np.zeros(rows, np.int32),
        "argument": np.zeros(rows, np.float32),
    }


def wide(rows, value=1.0, id_=None):
    header = Header(Kind.PREDICT, id_ or next(ids), drill_meta("wide", WIDE_ITEMS, ("y",)), rows=rows)
    return [wire.encode_header(header), *drill_tensors(rows, WIDE_ITEMS, value)]


def question(kind=Kind.LIVE, id_=None):
    return wire.encode_header(Header(kind, id_ or next(ids), b""))


# -- who gets one --------------------------------------------------------------------------------------


def test_who_says_hello_is_welcome(server):
    with RawLine(server.endpoint) as line:
        assert line.greeting == packets.WELCOME.pack(b"plln", 1, packets.REQUEST_MAX_BYTES)
        assert line.question(Kind.LIVE) == {"live": True}


HELLOS = {
    "another version": (struct.pack("<4sI", b"plln", 2), 0, "a line of version 2; wanted 1"),
    "too short": (b"plln\1\0\0", 0, "7 bytes and 0 descriptors; wanted 8 and 0"),
    "too long": (struct.pack("<4sII", b"plln", 1, 0), 0, "12 bytes and 0 descriptors; wanted 8 and 0"),
    "far too long": (b"plln" + bytes(5000), 0, "17 bytes and 0 descriptors; wanted 8 and 0"),
    "a descriptor": (struct.pack("<4sI", b"plln", 1), 1, "8 bytes and 1 descriptors; wanted 8 and 0"),
    "descriptors": (struct.pack("<4sI", b"plln", 1), 9, "8 bytes and 2 descriptors; wanted 8 and 0"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_other_hellos_are_refused_and_leave_nothing(server, client, name):
    data, fds, sentence = HELLOS[name]
    before = descriptors(server)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(30)
            sock.connect(side_path(server.endpoint))
            socket.send_fds(sock, [data], [sock.fileno()] * fds)
            refused = wire.decode_error(wire.decode_header(sock.recv(65_536)))
            assert (type(refused), refused.message) == (WireError, sentence)
            assert sock.recv(1) == b""
    assert front(client)["lines"] == 0
    await_that(lambda: descriptors(server) <= before)


def test_lines_of_one_process_are_so_many_and_no_more(server, client):
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(RawLine(server.endpoint)) for _ in range(66)]
        welcome, refused = lines[:64], lines[64:]
        assert {line.greeting[:4] for line in welcome} == {b"plln"}
        for line in refused:
            error = wire.decode_error(wire.decode_header(line.greeting))
            assert isinstance(error, Unavailable)
            assert error.message == ("64 lines of this process and 64 in all; wanted at most 64 and 128")
        assert front(client)["lines"] == 64
        with subprocess.Popen(
            [sys.executable, "-c", OPEN_ALL, side_path(server.endpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout.readline() == b"64\n"
            welcome.pop().close()
            await_that(lambda: front(client)["lines"] == 127)
            with RawLine(server.endpoint) as line:
                assert line.question(Kind.LIVE) == {"live": True}
                with Client(server.endpoint) as polite:  # one too many: it does without
                    for _ in range(5):
                        assert polite.predict("m", inputs(1))["y"].shape == (1, 4)
                assert front(client)["lines"] == 128
            other.kill()
        await_that(lambda: front(client)["lines"] == 63)
    await_that(lambda: front(client)["lines"] == 0)


OPEN_ALL = """
import socket, sys
found = []
while True:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(sys.argv[1])
    sock.send(b"plln" + (1).to_bytes(4, "little"))
    if sock.recv(1000)[:4] != b"plln":
        break
    found.append(sock)
print(len(found), flush=True)
sys.stdin.read()
"""


# -- requests ------------------------------------------------------------------------------------------


def test_requests_of_all_kinds_are_answered(line):
    assert line.question(Kind.LIVE) == {"live": True}
    assert line.question(Kind.MODELS)["models"].keys() == {"m", "wide"}
    assert line.question(Kind.STATUS)["front"]["lines"] == 1
    ready = wire.encode_meta(wire.SignatureMeta("m"))
    id_ = line.send([wire.encode_header(Header(Kind.READY, next(ids), ready))])
    assert line.collect(1)[id_]["ready"] is True
    alone, bundled, split = line.send(drill("m")), [next(ids) for _ in range(3)], line.send(drill("m", 5))
    line.send(drill_bundle("m", [(id_, 0, 1) for id_ in bundled]))
    urgent = line.send(drill("m", 2, priority=0))
    found = line.collect(6)
    assert kinds(found) == dict.fromkeys([alone, split, urgent, *bundled], list)
    assert len(found[split][0]) == 5 * 16


def test_errors_are_answered_with_their_ids(line):
    wrong = {
        line.send(drill("nobody")): errors.ModelNotFound,
        line.send([*drill("m"), b"more"]): WireError,
        line.send(drill("m")[:-1]): WireError,
        line.send([question(Kind.LIVE), b"more"]): WireError,
        line.send([*drill("m")[:-1], b"short"]): errors.InvalidInput,
    }
    header = bytearray(question(id_=77))
    header[2] = 9
    line.send_frames([bytes(header)])
    wrong[77] = errors.ProtocolVersionError
    found = kinds(line.collect(len(wrong)))
    assert found == wrong or all(issubclass(found[i], errors.PoolError) for i in wrong)
    assert found.keys() == wrong.keys()
    line.send_frames([b"hello"])
    assert kinds(line.collect(1)) == {0: WireError}


def test_large_replies_come_whole(server):
    rows = 50
    x = np.random.default_rng(5).random((rows, WIDE_ITEMS), np.float32)
    given = {"x": x, "fault": np.zeros(rows, np.int32), "argument": np.zeros(rows, np.float32)}
    fewer = {name: array[:15] for name, array in given.items()}  # three of which may wait at a time
    wanted = drill_backend.answer(x, 1)

    async def go():
        async with AsyncClient(server.endpoint) as many:
            small = inputs(1)
            for _ in range(4):
                await many.predict("m", small)
            calls = []
            for _ in range(3):  # small ones in between
                calls += [many.predict("wide", fewer), many.predict("m", small)]
            for got, of in zip(await asyncio.gather(*calls), [wanted[:15], None] * 3, strict=True):
                if of is None:
                    np.testing.assert_array_equal(got["y"], drill_backend.answer(small["x"], 1))
                else:
                    assert got["y"].tobytes() == of.tobytes()
            assert many._exchange._connection.line is not None

    asyncio.run(go())
    with Client(server.endpoint) as one:
        for _ in range(5):
            assert one.predict("wide", given)["y"].tobytes() == wanted.tobytes()
        assert one._idle[0].line is not None


def test_replies_that_come_while_a_large_one_waits_follow_it(line):
    """Packets of one message follow each other; what is answered meanwhile does not come in between."""
    sent = []
    for _ in range(6):
        sent += [line.send(wide(5)), line.send(drill("m")), line.send_kind(Kind.LIVE)]
    found = line.collect(len(sent))
    assert found.keys() == set(sent)
    assert {len(found[id_][0]) for id_ in sent[::3]} == {5 * WIDE_BYTES}


def test_a_reply_of_a_packet_exactly(line):
    """Lengths about the size at which a reply is cut."""
    header, *_ = wide(2)
    for rows in (1, 2, 3):
        id_ = line.send(wide(rows))
        (found,) = line.collect(1).items()
        assert found[0] == id_
        assert found[1] == [np.full((rows, WIDE_ITEMS), 3.0, np.float32).tobytes()]
    assert len(header)


# -- giving up -----------------------------------------------------------------------------------------


def test_requests_are_cancelled_over_their_own_line_alone(server, client, line):
    with stopped_worker(client), RawLine(server.endpoint) as other:
        running, *waiting = [line.send(drill("m", 4)) for _ in range(5)]
        for id_ in waiting:
            other.send_kind(Kind.CANCEL, id_)
        assert other.question(Kind.LIVE) == {"live": True}
        line.send_kind(Kind.CANCEL, waiting[0])
        assert kinds(line.collect(1)) == {waiting[0]: Cancelled}
        assert queue_rows(client) == 12
    assert kinds(line.collect(4)) == dict.fromkeys([running, *waiting[1:]], list)


def test_a_client_withdraws_what_it_gives_up(server, client, line):
    async def go():
        async with AsyncClient(server.endpoint) as many:
            await many.signature("m")
            for _ in range(4):
                await many.live()
            calls = [asyncio.ensure_future(many.predict("m", inputs(4))) for _ in range(3)]
            while queue_rows(client) < 12:
                await asyncio.sleep(0.005)
            calls[1].cancel()
            while queue_rows(client) > 8:
                await asyncio.sleep(0.005)
            with pytest.raises(errors.DeadlineExceeded):
                await many.predict("m", inputs(4), timeout=0.1)
            while queue_rows(client) > 8:
                await asyncio.sleep(0.005)
            line.send_frames([question(id_=1)])
            os.kill(client.status()["models"]["m"]["workers"][0]["pid"], signal.SIGCONT)
            await asyncio.gather(calls[0], calls[2])

    with stopped_worker(client):
        running = line.send(drill("m", 1))
        await_that(lambda: queue_rows(client) == 0)
        asyncio.run(go())
    assert line.collect(2).keys() == {running, 1}


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_the_rows_of_a_client_that_is_gone_are_freed(server, client, line, how):
    code = textwrap.dedent(f"""
        import sys
        from tests.raw import *
        line = RawLine({server.endpoint!r})
        for _ in range(5):
            line.send(drill("m", 4))
        line.question(Kind.LIVE)
        print("sent", flush=True)
        sys.stdin.readline()
        line.close()
        sys.stdin.readline()
    """)
    before = descriptors(server)
    with stopped_worker(client):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"sent\n"
            id_ = line.send(drill("m"))
            assert kinds(line.collect(1)) == {id_: errors.Overloaded}
            assert front(client)["lines"] == 2
            if how == "closed":
                child.stdin.write(b"\n")
                child.stdin.flush()
            else:
                child.kill()
            await_that(lambda: queue_rows(client) == 0)
            await_that(lambda: front(client)["lines"] == 1)
            child.kill()
        mine = [line.send(drill("m", 4)) for _ in range(4)]  # all but the slot that runs
    assert kinds(line.collect(4)) == dict.fromkeys(mine, list)
    await_room(line, "m", ROWS)
    await_that(lambda: descriptors(server) <= before)


# -- nonsense ------------------------------------------------------------------------------------------

LIVE = packets.make_table([question(id_=5)]) + question(id_=5)


def padded(total):
    """A packet of so many bytes that is a message: to nobody."""
    frames = [question(id_=5), b""]
    frames[1] = bytes(total - len(packets.make_table(frames)) - len(frames[0]))
    return packets.make_table(frames) + b"".join(frames)


NONSENSE = {
    "noise": b"hello",
    "a byte": b"\0",
    "a long noise": os.urandom(100_000),
    "no frames": bytes(16),
    "many frames": struct.pack("<QQ", 16, 1 << 40),
    "cut": LIVE[:-1],
    "cut in the table": LIVE[:20],
    "extended": LIVE + b"\0",
    "a wrong sum": struct.pack("<Q", len(LIVE) + 1) + LIVE[8:],
    "a frame too long": LIVE[:16] + struct.pack("<Q", (1 << 64) - 1) + LIVE[24:],
    "the beginning of a longer one": padded(packets.REQUEST_MAX_BYTES)[:1000],
    "too large": padded(packets.REQUEST_MAX_BYTES + 1),
    "far too large": padded(600_000),
    "too large by what the table does not say": padded(packets.REQUEST_MAX_BYTES) + b"\0",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_is_no_message_ends_its_line_and_no_other(server, client, line, name):
    with stopped_worker(client), RawLine(server.endpoint) as liar:
        running = line.send(drill("m"))
        await_that(lambda: queue_rows(client) == 0)
        liar.send(drill("m", 4))
        await_that(lambda: queue_rows(client) == 4)
        liar.socket.send(NONSENSE[name])
        assert kinds(liar.collect(1)) == {0: WireError}
        with pytest.raises(ConnectionError):
            liar.receive_frames()
        await_that(lambda: front(client)["lines"] == 1)
        await_that(lambda: queue_rows(client) == 0)
    assert kinds(line.collect(1)) == {running: list}


def test_as_much_as_is_allowed_is_taken(line):
    line.socket.send(padded(packets.REQUEST_MAX_BYTES))
    assert kinds(line.collect(1)) == {5: WireError}  # a question with a tensor
    x = drill_tensors(5, WIDE_ITEMS, 1.0)
    assert len(x[0]) < packets.REQUEST_MAX_BYTES - 1000
    id_ = line.send(wide(5))
    assert line.collect(1)[id_] == [np.full((5, WIDE_ITEMS), 3.0, np.float32).tobytes()]


def test_a_packet_of_nothing_is_an_end(server, client):
    with RawLine(server.endpoint) as line:
        line.socket.send(b"")
        with pytest.raises(ConnectionError):
            line.receive_frames()
    await_that(lambda: front(client)["lines"] == 0)


def test_descriptors_in_messages_are_not_kept(server, line):
    before = descriptors(server)
    for _ in range(50):
        socket.send_fds(line.socket, [packets.make_table([question()]), question()], [0, 1, 2])
        (answered,) = line.receive()
        assert answered[1] == {"live": True}
    await_that(lambda: descriptors(server) <= before)


def good_packets():
    """Requests of every kind to the model `m`."""
    few = [frames for frames in documented_messages().values() if frames[0][3] not in (Kind.STATUS, 0x81)]
    many = [
        [question()],
        drill("m", 1),
        drill("m", 3, millis=60_000),
        drill("m", 9),
        drill("m", 2, priority=2),
        drill_bundle("m", [(next(ids), 60_000, rows) for rows in (1, 3, 0, 2)]),
        [wire.encode_header(Header(Kind.CANCEL, next(ids), b""))],
    ]
    return [*few, *many * 6]


class Fuzzer:
    """Sends damaged messages over lines, whole ones and broken ones, and counts what it is owed."""

    def __init__(self, endpoint, seed):
        self._endpoint = endpoint
        self._rng = random.Random(seed)
        self._frames = Mutator(good_packets(), seed)
        self._packets = Mutator([[packets.make_table(f) + b"".join(f)] for f in good_packets()], seed)
        self.kinds = {}
        self.ended = 0
        self._begin()

    def _begin(self):
        self.line = RawLine(self._endpoint)
        self.line.socket.settimeout(0)
        self._due = self._taken = 0

    def send(self):
        """Send one, and take what is there."""
        if self._rng.random() < 0.98:
            frames = self._frames.next()
            packet = packets.make_table(frames) + b"".join(frames)
        else:
            packet = self._packets.next()[0]
        if not packet:
            return
        try:
            frames = [bytes(frame) for frame in packets.split(memoryview(packet))]
        except WireError:
            self.line.socket.settimeout(30)
            self.await_answers()
            self.line.socket.send(packet)
            assert kinds(self.line.collect(1)) == {0: WireError}
            with pytest.raises(ConnectionError):
                self.line.receive_frames()
            self.line.close()
            self.ended += 1
            self._begin()
            return
        least, _ = answers_due(frames)
        self._due += least
        self.line.socket.settimeout(30)
        self.line.socket.send(packet)
        while self.line.has_message() or self._due - self._taken > UNDER_WAY:
            self._take()

    def _take(self):
        frames = self.line.receive_frames()
        header = wire.decode_header(frames[0])
        count = len(wire.split_parts(frames[1], header.rows)[0]) if header.flags & Flag.BUNDLE else 1
        if header.kind is Kind.ERROR and self._is_of_a_cancel(header):
            return
        self.kinds[header.kind] = self.kinds.get(header.kind, 0) + count
        self._taken += count

    @staticmethod
    def _is_of_a_cancel(header):
        return "CANCEL with" in wire.decode_error(header).message  # frames that it should not have

    def await_answers(self):
        """Every answer that is due, and none twice: a question asked last is answered last."""
        while self._taken < self._due:
            self._take()
        self.line.send_frames([question(id_=4711)])
        self._due += 1
        while self._taken < self._due:
            self._take()
        assert self._taken == self._due, "a message was answered twice"

    def close(self):
        self.line.close()


def test_damaged_messages_are_answered_once_each_and_the_server_serves_on(server, client, line):
    pid = server.process.pid
    before = front(client)["errors"].get("INTERNAL", 0)
    fuzzer = Fuzzer(server.endpoint, 7)
    try:
        for i in range(FUZZED):
            fuzzer.send()
            if i == FUZZED // 4:
                memory = psutil.Process(pid).memory_info().rss
        fuzzer.await_answers()
    finally:
        fuzzer.close()
    assert psutil.Process(pid).memory_info().rss - memory < 32 * MIB
    assert min(fuzzer.kinds[kind] for kind in (Kind.RESULT, Kind.INFO, Kind.ERROR)) > FUZZED // 50
    assert fuzzer.ended > FUZZED // 200
    assert front(client)["errors"].get("INTERNAL", 0) == before
    assert "Traceback" not in server.log.read_text()
    assert server.process.poll() is None
    await_that(lambda: front(client)["lines"] == 1)
    await_room(line, "m", ROWS)


# -- clients that do not read --------------------------------------------------------------------------


def rows_run(client):
    return client.status()["models"]["wide"]["rows"]


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_kept_for_a_client_that_does_not_read_is_bounded(server, client, line, rows):
    memory = anonymous_bytes(server.process.pid)
    dropped = front(client)["dropped_replies"]
    with RawLine(server.endpoint) as deaf:
        asked, begun = 0, rows_run(client)
        while asked * rows * WIDE_BYTES < 6 * MAX_UNREAD_BYTES:
            deaf.send(wide(rows))
            asked += 1
            if asked % 4 == 0:
                await_that(lambda wanted=begun + asked * rows: rows_run(client) >= wanted)
        reply_bytes = rows * WIDE_BYTES
        kept = asked - (front(client)["dropped_replies"] - dropped)
        assert kept * reply_bytes > MAX_UNREAD_BYTES // 2
        assert kept * reply_bytes < MAX_UNREAD_BYTES + KERNEL_BYTES + reply_bytes
        assert anonymous_bytes(server.process.pid) - memory < MAX_UNREAD_BYTES + 4 * reply_bytes + 2 * MIB

        # Others are served, over lines and through ZeroMQ.
        id_ = line.send(wide(4))
        assert kinds(line.collect(1)) == {id_: list}
        assert client.predict("m", inputs(2))["y"].shape == (2, 4)

        # What waited arrives when it reads, and then it is answered again.
        wanted = [np.full((rows, WIDE_ITEMS), 3.0, np.float32).tobytes()]
        assert list(deaf.collect(kept).values()) == [wanted] * kept
        for _ in range(3):
            id_ = deaf.send(wide(rows))
            assert deaf.collect(1) == {id_: wanted}


def test_small_replies_count_with_what_they_cost(server, client):
    asked = 2 * MAX_UNREAD_BYTES // 256
    memory = anonymous_bytes(server.process.pid)
    dropped = front(client)["dropped_replies"]
    with RawLine(server.endpoint) as deaf:
        for _ in range(asked):
            deaf.send_kind(Kind.LIVE)
        await_that(lambda: front(client)["dropped_replies"] > dropped + asked // 4)
        assert anonymous_bytes(server.process.pid) - memory < 2 * MAX_UNREAD_BYTES
        last = front(client)["dropped_replies"]
        assert len(deaf.collect(asked - (last - dropped))) == asked - (last - dropped)
        assert deaf.question(Kind.LIVE) == {"live": True}


def test_a_deaf_client_that_dies_leaves_nothing(server, client, line):
    memory = anonymous_bytes(server.process.pid)
    before = descriptors(server)
    for _ in range(4):
        with RawLine(server.endpoint) as deaf:
            begun = rows_run(client)
            for _ in range(10):
                deaf.send(wide(4))
            await_that(lambda wanted=begun + 40: rows_run(client) >= wanted)
    await_that(lambda: front(client)["lines"] == 1)
    await_that(lambda: descriptors(server) <= before)
    assert anonymous_bytes(server.process.pid) - memory < 2 * MIB
    id_ = line.send(wide(4))
    assert kinds(line.collect(1)) == {id_: list}


# -- processes that end --------------------------------------------------------------------------------


@pytest.fixture
def alone(start_server, tmp_path):
    text = write_models(tmp_path).replace("warm_up = false", "warm_up = false\nworkers = 2")
    with start_server(tmp_path, text, server="drain_timeout_s = 20") as running:
        yield running


def is_fine(answer):
    return isinstance(answer, (list, WorkerLost, errors.Overloaded))


def test_when_workers_are_killed_each_request_is_answered_once(alone):
    def workers():
        return [worker["pid"] for worker in client.status()["models"]["m"]["workers"]]

    with Client(alone.endpoint, share_memory=False) as client, RawLine(alone.endpoint) as line:
        seen = set(workers())
        found = {}
        for i in range(400):
            sent = [line.send(drill("m")), line.send(drill("m", 6))]
            bundle = [next(ids) for _ in range(3)]
            line.send(drill_bundle("m", [(id_, 0, 1) for id_ in bundle]))
            sent += bundle
            if i % 100 == 50:
                pid = workers()[i // 100 % 2]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                await_that(lambda pid=pid: pid not in workers())
                seen |= set(workers())
            got = line.collect(len(sent))
            assert got.keys() == set(sent)
            found |= got
        assert all(map(is_fine, found.values())), {type(answer) for answer in found.values()}
        assert sum(isinstance(answer, list) for answer in found.values()) > len(found) // 2
        assert len(seen) > 2
        assert line.question(Kind.LIVE) == {"live": True}
        await_that(lambda: len(workers()) == 2)


def test_what_was_admitted_is_answered_when_the_server_is_told_to_stop(alone):
    """Large replies, too, although the client reads them when the server has nothing else to do."""
    with Client(alone.endpoint, share_memory=False) as client, RawLine(alone.endpoint) as line:
        workers = [worker["pid"] for worker in client.status()["models"]["wide"]["workers"]]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        sent = [line.send(wide(5)) for _ in range(6)]
        line.question(Kind.LIVE)
        alone.process.send_signal(signal.SIGTERM)
        await_that(lambda: is_refused(line))
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        wanted = [np.full((5, WIDE_ITEMS), 3.0, np.float32).tobytes()]
        assert line.collect(6) == dict.fromkeys(sent, wanted)
        with pytest.raises(ConnectionError):
            line.receive_frames()
        assert alone.process.wait(30) == 0


def is_refused(line):
    id_ = line.send(drill("m"))
    (answer,) = (line.collect(1)[id_],)
    return isinstance(answer, Unavailable)


class Giver:
    """In place of admission, in this process: answers every message with as many bytes as it is told."""

    def __init__(self, size):
        self.routes = {}
        self._size = size

    def take(self, client, header, _frames, _now):
        assert client.line.send([header, bytes(self._size)])
        return 0


def test_what_waits_when_the_front_stops_is_sent_to_those_who_read(tmp_path):
    size = 3 * MIB
    endpoint = f"ipc://{tmp_path}/s"
    stops = threading.Event()

    def read(line):
        stops.wait()
        return line.receive_frames()

    async def go():
        engine = SimpleNamespace(turn=SimpleNamespace(started=0.0, ended=0.0))
        lines = Lines(engine, Clients(0), Giver(size), 64 * MIB, lambda: None)
        door = Doorway({packets.LINE_MAGIC: lines.take})
        loop = asyncio.get_running_loop()
        with bound(endpoint):
            door.listen(endpoint)
        reading, deaf = [await loop.run_in_executor(None, RawLine, endpoint) for _ in range(2)]
        with reading, deaf, ThreadPoolExecutor(1) as threads:
            for line in (reading, deaf):
                line.send_frames([question(id_=5)])
            call = threads.submit(read, reading)
            while not all(line.has_message() for line in (reading, deaf)):
                await asyncio.sleep(0)
            stops.set()
            lines.close()  # waits for both, in vain for one
            door.close()
            assert call.result() == [question(id_=5), bytes(size)]
            for line in (reading, deaf):
                with pytest.raises(ConnectionError):  # the deaf one's in the middle of its message
                    line.receive_frames()

    asyncio.run(go())


def test_a_server_that_stops_does_not_wait_for_clients_that_do_not_read(alone):
    with Client(alone.endpoint, share_memory=False) as client, RawLine(alone.endpoint) as deaf:
        begun = rows_run(client)
        for _ in range(10):
            deaf.send(wide(4))
        await_that(lambda: rows_run(client) >= begun + 40)
        assert alone.stop() == 0


def test_a_front_that_is_killed_is_gone_at_once_and_the_next_is_found(tmp_path):
    config = tmp_path / "pool.toml"
    config.write_text(f'[server]\nendpoints = ["ipc://{tmp_path}/pool.sock"]\n{write_models(tmp_path)}')
    endpoint = f"ipc://{tmp_path}/pool.sock"
    command = [sys.executable, "-m", "pool", "serve", str(config)]

    def ask(call):
        try:
            return call("m", inputs(1))
        except Unavailable as e:
            return e

    with (
        Client(endpoint, timeout=600.0, connect_timeout=60.0) as client,
        Client(endpoint, share_memory=False) as watcher,
        ThreadPoolExecutor(3) as threads,
    ):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            await_that(client.ready)
            for _ in range(5):
                client.predict("m", inputs(1))
            assert client._idle[0].line is not None
            (worker,) = watcher.status()["models"]["m"]["workers"]
            with Client(endpoint, timeout=600.0) as other:
                for _ in range(3):
                    other.live()
                began = front(watcher)["requests"]
                os.kill(worker["pid"], signal.SIGSTOP)
                calls = [threads.submit(ask, each.predict) for each in (client, client, other)]
                await_that(lambda: front(watcher)["requests"] == began + 3)
                process.kill()
                outcomes = [call.result() for call in calls]
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            for _ in range(5):
                assert client.predict("m", inputs(1), retry=PATIENT)["y"].shape == (1, 4)
            assert client._idle[-1].line is not None
            process.terminate()
            assert process.wait(30) == 0
