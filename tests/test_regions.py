"""Memory of clients in the front: what is taken and what is not, lies about it, and clients that end; then
the same answers by region and by socket from a real server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from pool import AsyncClient, Client, errors, wire
from pool.client import connection as client_connection
from pool.client.region import SHARE_BYTES, Region
from pool.endpoints import side_path
from pool.errors import InvalidInput, TooLarge, Unavailable, WireError
from pool.front import regions
from pool.front.doorway import Doorway
from pool.front.regions import Regions
from pool.wire import (
    REFERENCE,
    REGION_GRANT,
    REGION_MAGIC,
    REGION_OFFER,
    Flag,
    Header,
    Kind,
    PredictMeta,
    TensorMeta,
)
from tests import models
from tests.raw import bound

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = mmap.PAGESIZE
FUTURE_WRITE = 0x0010
ALL_SEALS = fcntl.F_SEAL_SHRINK | FUTURE_WRITE
KEEP_SIZE, PUNCH_HOLE = 1, 2
MADV_REMOVE = 9
libc = ctypes.CDLL(None, use_errno=True)


def memfd(size=PAGE, seals=ALL_SEALS, data=None, name="pool-region", flags=os.MFD_ALLOW_SEALING):
    fd = os.memfd_create(name, flags)
    os.ftruncate(fd, size)
    os.pwrite(fd, bytes(size) if data is None else data, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def offer(size=PAGE, magic=REGION_MAGIC, version=1):
    return REGION_OFFER.pack(magic, version, size)


def mapped(pid="self", name="memfd:pool-region"):
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if name in line]


# -- a front's regions in this process ----------------------------------------------------------------


class Front:
    """Regions, and clients that may send anything."""

    def __init__(self, endpoint):
        self.path = side_path(endpoint)
        self.regions = Regions()
        self.doorway = Doorway({REGION_MAGIC: self.regions.take})
        with bound(endpoint):
            self.doorway.listen(endpoint)

    def close(self):
        self.doorway.close()
        self.regions.close()

    async def connect(self):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.path)
        return sock

    async def tell(self, sock, data, fds):
        """Send a packet and give the answer's token, or raise the error it is."""
        if fds:
            socket.send_fds(sock, [data], fds)
        else:
            sock.send(data)
        answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65_536), 10)
        if len(answer) == REGION_GRANT.size:
            magic, version, token, most = REGION_GRANT.unpack(answer)
            assert (magic, version, most) == (REGION_MAGIC, 1, regions.REGION_MAX_BYTES)
            return token
        raise wire.decode_error(wire.decode_header(answer))

    async def give(self, fd, size=PAGE):
        """Offer a memfd, which is closed; the connection and the token."""
        sock = await self.connect()
        try:
            return sock, await self.tell(sock, offer(size), [fd])
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(fd)

    def resolve(self, *references):
        tensors, loans = self.regions.resolve(list(map(memoryview, references)))
        assert [len(tensor) for tensor in tensors] == [REFERENCE.unpack(each)[2] for each in references]
        assert [loan.offset for loan in loans] == [REFERENCE.unpack(each)[1] for each in references]
        return tensors


@pytest.fixture
def in_front():
    """Runs a test's coroutine function with a `Front`; nothing may be left of it."""
    with tempfile.TemporaryDirectory(prefix="pool-") as folder:

        def run(go):
            async def inside():
                front = Front(f"ipc://{folder}/s")
                try:
                    await go(front)
                finally:
                    front.close()
                assert os.listdir(folder) == []

            files = set(os.listdir("/proc/self/fd"))
            asyncio.run(inside())
            assert set(os.listdir("/proc/self/fd")) == files
            assert not mapped()

        yield run


def test_a_region_is_read_where_a_reference_says(in_front):
    async def go(front):
        data = np.random.default_rng(0).bytes(3 * PAGE)
        sock, token = await front.give(memfd(3 * PAGE, data=data), 3 * PAGE)
        spans = [(0, 3 * PAGE), (5, 10), (PAGE, 2 * PAGE), (3 * PAGE, 0)]
        got = front.resolve(*[REFERENCE.pack(token, *span) for span in spans])
        assert [bytes(view) for view in got] == [data[at : at + size] for at, size in spans]
        assert all(view.readonly for view in got)
        assert front.regions.describe() == {
            "open": 1,
            "bytes": 3 * PAGE,
            "requests": 1,
            "answers": 0,
        }
        sock.close()

    in_front(go)


def test_tokens_are_random_and_a_region_is_known_by_its_own(in_front):
    async def go(front):
        given = [await front.give(memfd(data=bytes([i]) * PAGE)) for i in range(8)]
        assert len({token for _, token in given}) == 8
        got = front.resolve(*[REFERENCE.pack(token, 0, 1) for _, token in given])
        assert b"".join(got) == bytes(range(8))
        for sock, _ in given:
            sock.close()

    in_front(go)


def test_a_region_ends_with_its_connection_and_no_other_does(in_front):
    async def go(front):
        (first, gone), (second, stays) = await front.give(memfd()), await front.give(memfd())
        first.close()
        while front.regions.describe()["open"] > 1:
            await asyncio.sleep(0)
        assert len(mapped()) == 1
        with pytest.raises(Unavailable, match="refers to a region that is not there"):
            front.resolve(REFERENCE.pack(gone, 0, 1))
        front.resolve(REFERENCE.pack(stays, 0, 1))
        second.close()

    in_front(go)


def hole():
    fd = os.memfd_create("pool-region", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    return fd


def blocks_beyond_the_end():
    """As many bytes are allocated as the file is long, but not those that are in it."""
    fd = os.memfd_create("pool-region", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    assert libc.fallocate(fd, KEEP_SIZE, ctypes.c_long(PAGE), ctypes.c_long(PAGE)) == 0
    assert os.fstat(fd).st_blocks * 512 == PAGE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    return fd


def file_on_disk():
    with tempfile.TemporaryFile() as file:
        file.write(bytes(PAGE))
        return os.dup(file.fileno())


def end_of_a_pipe():
    reading, writing = os.pipe()
    os.close(writing)
    return reading


REFUSED = {
    "unsealed": (lambda: memfd(seals=0), PAGE, InvalidInput, "has the seals 0x0; wanted F_SEAL_SHRINK and"),
    "can be punched": (lambda: memfd(seals=fcntl.F_SEAL_SHRINK), PAGE, InvalidInput, "has the seals 0x2"),
    "can be cut": (lambda: memfd(seals=FUTURE_WRITE), PAGE, InvalidInput, "has the seals 0x10"),
    "not sealable": (lambda: memfd(seals=0, flags=0), PAGE, InvalidInput, "has the seals 0x1;"),
    "hole": (hole, PAGE, InvalidInput, "has a hole at 0; wanted every page to be written"),
    "blocks beyond the end": (blocks_beyond_the_end, PAGE, InvalidInput, "has a hole at 0"),
    "too short": (
        lambda: memfd(PAGE),
        PAGE + 1,
        InvalidInput,
        f"has {PAGE} bytes; the offer says {PAGE + 1}",
    ),
    "file": (file_on_disk, PAGE, InvalidInput, "is not one of an ordinary memfd"),
    "pipe": (end_of_a_pipe, PAGE, InvalidInput, "is not one of an ordinary memfd"),
    "nothing": (memfd, 0, TooLarge, "a region of 0 bytes; wanted 1 to"),
    "too large": (memfd, regions.REGION_MAX_BYTES + 1, TooLarge, "a region of 1073741825 bytes; wanted 1 to"),
}


@pytest.mark.parametrize(("make", "size", "kind", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_could_fault_or_be_too_much_is_not_taken(in_front, make, size, kind, sentence):
    async def go(front):
        with pytest.raises(kind, match=sentence):
            await front.give(make(), size)
        sock, token = await front.give(memfd())  # the next one is
        front.resolve(REFERENCE.pack(token, 0, PAGE))
        sock.close()

    in_front(go)


@pytest.mark.parametrize(
    ("data", "count", "sentence"),
    [
        (offer()[:-1], 1, "15 bytes; wanted an offer of 16"),
        (offer() + b"x", 1, "17 bytes; wanted an offer of 16"),
        (offer(magic=b"what"), 1, "b'what'; wanted one of .b'plrg'"),
        (offer(version=2), 1, "an offer of version 2; wanted 1"),
        (offer(), 0, "0 descriptors with an offer; wanted 1"),
        (offer(), 2, "2 descriptors with an offer; wanted 1"),
    ],
)
def test_an_offer_that_is_none_is_refused(in_front, data, count, sentence):
    async def go(front):
        fds = [memfd() for _ in range(count)]
        with await front.connect() as sock:
            with pytest.raises(WireError, match=sentence):
                await front.tell(sock, data, fds)
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b"", "closed"
        for fd in fds:
            os.close(fd)

    in_front(go)


def test_a_second_offer_over_a_connection_ends_it_and_the_region(in_front):
    async def go(front):
        sock, token = await front.give(memfd())
        fd = memfd()
        with pytest.raises(WireError, match="a second region over one connection"):
            await front.tell(sock, offer(), [fd])
        os.close(fd)
        sock.close()
        with pytest.raises(Unavailable):
            front.resolve(REFERENCE.pack(token, 0, 1))

    in_front(go)


@pytest.mark.parametrize("limit", ["_REGIONS_OF_ONE_MAX", "_REGIONS_MAX"])
def test_there_are_so_many_regions_and_no_more(in_front, monkeypatch, limit):
    monkeypatch.setattr(regions, limit, 2)

    async def go(front):
        held = [await front.give(memfd()) for _ in range(2)]
        with pytest.raises(Unavailable, match="2 regions of this process and 2 in all; wanted at most"):
            await front.give(memfd())
        held.pop()[0].close()
        while front.regions.describe()["open"] > 1:
            await asyncio.sleep(0)
        held.append(await front.give(memfd()))
        for sock, _ in held:
            sock.close()

    in_front(go)


def test_no_page_of_a_region_can_be_taken_away_again(in_front):
    """What the front relies on (`pool.front.regions`): the kernel forbids each way to make a read fault."""

    async def go(front):
        fd = memfd(2 * PAGE, seals=0)
        mine = mmap.mmap(fd, 2 * PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
        sock, token = await front.give(os.dup(fd), 2 * PAGE)
        (view,) = front.resolve(REFERENCE.pack(token, 0, 2 * PAGE))
        with pytest.raises(PermissionError):
            os.ftruncate(fd, PAGE)
        flags = PUNCH_HOLE | KEEP_SIZE
        assert libc.fallocate(fd, flags, ctypes.c_long(0), ctypes.c_long(PAGE)) == -1
        start = ctypes.c_char.from_buffer(mine)
        assert libc.madvise(ctypes.byref(start), ctypes.c_size_t(PAGE), MADV_REMOVE) == -1
        del start
        mine[:4] = b"mine"
        assert view[:4] == b"mine", "and yet its owner can write it"
        del view
        mine.close()
        os.close(fd)
        sock.close()

    in_front(go)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_frame_of_another_size_is_no_reference(in_front, size):
    async def go(front):
        with pytest.raises(WireError, match=f"tensor frame 0 has {size} bytes; wanted a reference of 32"):
            front.resolve(bytes(size))

    in_front(go)


@pytest.mark.parametrize("span", [(0, PAGE + 1), (PAGE, 1), (PAGE + 1, 0), (2**64 - 1, 2), (1, 2**64 - 1)])
def test_a_reference_beyond_its_region_is_refused(in_front, span):
    async def go(front):
        sock, token = await front.give(memfd())
        with pytest.raises(InvalidInput, match=f"its region has {PAGE}"):
            front.resolve(REFERENCE.pack(token, 0, 1), REFERENCE.pack(token, *span))
        sock.close()

    in_front(go)


# -- a server -----------------------------------------------------------------------------------------

CONFIG = """
[models.any]
path = "{unknown_rank}"
slots = 24
max_rows_bytes = 4194304

[models.text]
path = "{strings}"
slots = 4
max_rows_bytes = 1048576

[models.linear]
path = "{names}"
max_batch_size = 8
slots = 4

[models.whole]
path = "{fixed_rows}"
slots = 2

[models.alone]
path = "{unknown_rank}"
max_batch_size = 1
workers = 2
slots = 6
max_rows_bytes = 4194304
timeout_ms = 20000
"""
NAMES = ("unknown_rank", "strings", "names", "fixed_rows")
ANSWER_TIMEOUT_MS = 20_000


@pytest.fixture(scope="module")
def server(start_server):
    text = CONFIG.format(**{name: models.path(name) for name in NAMES})
    with tempfile.TemporaryDirectory(prefix="pool-") as made:
        with start_server(Path(made), text, server="max_message_bytes = 2097152") as running:
            assert stat.S_IMODE(os.stat(f"{made}/pool.sock.fd").st_mode) == 0o660
            yield running
        assert not [name for name in os.listdir(made) if "sock" in name], "socket file left"


def told(server):
    with Client(server.endpoint, share_memory=False) as client:
        return client.status()["front"]["regions"]


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert (
            got[name].tobytes() == array.tobytes()
            if array.dtype != object
            else got[name].tolist() == array.tolist()
        )


def calls():
    """Inputs of every kind a request can have: model and arrays."""
    rng = np.random.default_rng(3)
    big = rng.standard_normal((3, 50_000)).astype(np.float32)
    yield "any", {"x": big}
    yield "any", {"x": big[:, ::2]}  # not contiguous
    yield "any", {"x": big[:1, :1]}
    yield "any", {"x": np.zeros((0, 5), np.float32)}
    yield "any", {"x": rng.standard_normal((40, 40_000)).astype(np.float32)[:, :9000]}
    words = np.array([rng.bytes(n).replace(b"\0", b"x") for n in (0, 1, 70_000, 3, 80_000)], object)
    yield "text", {"text": np.array([b"a" * 1000] * 5 + [b"b" * n for n in (0, 1, 150_000)], object)}
    yield "text", {"text": words[:2]}
    for rows in (0, 1, 8, 9, 24):  # of 8 to a slot: some are split
        yield (
            "linear",
            {name: rng.standard_normal(rows).astype(np.float32) for name in ("zeta", "b", "alpha")},
        )


@pytest.fixture
def everything_by_region(monkeypatch):
    """Small requests, too: so every way through the front is taken."""
    monkeypatch.setattr(client_connection, "SHARE_BYTES", 1)


@pytest.mark.usefixtures("everything_by_region")
def test_answers_are_the_same_bit_for_bit_with_and_without(server):
    before = told(server)["requests"]
    with Client(server.endpoint) as shared, Client(server.endpoint, share_memory=False) as plain:
        for _ in range(4):  # to have a region
            shared.predict("any", np.ones((1, 3), np.float32))
        assert told(server)["requests"] > before
        for model, inputs in calls():
            wanted = plain.predict(model, inputs)
            before = told(server)["requests"]
            for _ in range(3):  # larger ones need a larger region first
                same(shared.predict(model, inputs), wanted)
            assert told(server)["requests"] > before or not any(map(len, inputs.values()))


@pytest.mark.usefixtures("everything_by_region")
def test_many_at_once_over_one_connection_get_their_own_answers(server):
    async def go():
        before = told(server)["requests"]
        async with AsyncClient(server.endpoint) as client:
            rng = np.random.default_rng(4)
            for _ in range(6):
                sent = [
                    rng.standard_normal((1, n)).astype(np.float32) for n in (40_000, 50_000, 3, 60_000) * 4
                ]
                got = await asyncio.gather(*[client.predict("any", array) for array in sent])
                for array, outputs in zip(sent, got, strict=True):
                    assert outputs["y"].tobytes() == (array * 2).tobytes()
            assert not client._exchange._connection.regions.live
        assert told(server)["requests"] >= before + 40

    asyncio.run(go())


def test_small_requests_go_by_socket(server):
    before = told(server)["requests"]
    with Client(server.endpoint) as client:
        for _ in range(5):
            client.predict("any", np.ones((1, SHARE_BYTES // 4 - 100), np.float32))
    assert told(server)["requests"] == before


def test_threads_share_a_client(server):
    failures = []

    def work(client, seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(10):
                array = rng.standard_normal((1, 40_000)).astype(np.float32)
                assert client.predict("any", array)["y"].tobytes() == (array * 2).tobytes()
        except BaseException as e:
            failures.append(e)

    before = told(server)["requests"]
    with Client(server.endpoint) as client:
        threads = [threading.Thread(target=work, args=(client, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert told(server)["requests"] > before


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_request_given_up_keeps_its_bytes_until_its_answer_came(server):
    async def go():
        async with AsyncClient(server.endpoint) as client:
            array = np.ones((1, 40_000), np.float32)
            for _ in range(4):
                await client.predict("any", array)
            held = client._exchange._connection.regions
            with stopped(server.process.pid):
                task = asyncio.ensure_future(client.predict("any", array))
                while not held.live:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert held.live, "the front may still read it"
            other = np.full((1, 40_000), 3, np.float32)
            assert (await client.predict("any", other))["y"].tobytes() == (other * 2).tobytes()
            while held.live:
                await client.live()

    asyncio.run(go())


FORKING = """
import os, sys, numpy as np
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from pool import Client
client = Client(sys.argv[1])
array = np.arange(40_000, dtype=np.float32)[None]
def ask():
    for _ in range(4):
        assert client.predict("any", array)["y"].tobytes() == (array * 2).tobytes()
ask()
child = os.fork()
ask()
if child == 0:
    client.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
ask()
client.close()
print("done")
"""


def python(script, server):
    return subprocess.Popen(
        [sys.executable, "-c", script, server.endpoint], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def test_a_client_works_on_both_sides_of_a_fork(server):
    with python(FORKING, server) as process:
        assert process.communicate(timeout=60)[0] == "done\n"
    assert process.returncode == 0


BUSY = """
import sys, numpy as np
from pool import Client
client = Client(sys.argv[1])
array = np.ones((1, 40_000), np.float32)
for i in range(10**9):
    client.predict("any", array)
    if i == 5:
        print("busy", flush=True)
"""


def test_nothing_is_left_of_a_client_that_was_killed(server):
    with Client(server.endpoint, share_memory=False) as watcher:
        front = watcher.status()["front"]["pid"]
        for _ in range(3):
            with python(BUSY, server) as process:
                assert process.stdout.readline() == "busy\n"
                assert mapped(front)
                process.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 10
            while watcher.status()["front"]["regions"]["open"]:
                assert time.monotonic() < deadline
            assert not mapped(front)
            links = [os.readlink(f"/proc/{front}/fd/{n}") for n in os.listdir(f"/proc/{front}/fd")]
            assert not [link for link in links if "pool-region" in link]
        array = np.ones((1, 40_000), np.float32)
        assert watcher.predict("any", array)["y"].tobytes() == (array * 2).tobytes()


# -- batches that run where they lie -------------------------------------------------------------------


def workers_of(client, model="alone"):
    return [worker["pid"] for worker in client.status()["models"][model]["workers"]]


def distinct(count):
    """Requests that may not be taken for each other."""
    return [np.full((1, 60_000), i, np.float32) for i in range(count)]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("model", ["alone", "any"])
def test_a_batch_is_run_on_where_its_client_put_it(server, model):
    async def go():
        async with AsyncClient(server.endpoint) as client:
            for _ in range(6):
                answers = await asyncio.gather(*[client.predict(model, x) for x in distinct(4)])
                for i, answer in enumerate(answers):
                    assert answer["y"].tolist() == [[2.0 * i] * 60_000]

    with Client(server.endpoint, share_memory=False) as watcher:
        pids = workers_of(watcher, model)
        with Client(server.endpoint) as client:
            for x in distinct(4):
                assert client.predict(model, x)["y"].tolist() == (2 * x).tolist()
            assert any(mapped(pid) for pid in pids)
        asyncio.run(go())
        until(lambda: not any(mapped(pid) for pid in pids))  # the clients are gone: so is their memory


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="pool-") as made:
        yield Path(made)


def test_its_worker_killed_it_runs_again_on_another(start_server, folder):
    table = """
[models.alone]
path = "{unknown_rank}"
max_batch_size = 1
workers = 2
slots = 8
max_rows_bytes = 1048576
max_inflight_rows = 8
"""
    # A server of its own: workers that replace others within a test would count as left behind by it.
    with (
        start_server(folder, table.format(unknown_rank=models.path("unknown_rank"))) as server,
        Client(server.endpoint, share_memory=False) as watcher,
        Client(server.endpoint) as client,
    ):
        for x in distinct(4):
            client.predict("alone", x)
        pids = workers_of(watcher)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        answers = []
        threads = [
            threading.Thread(target=lambda x=x: answers.append((x, client.predict("alone", x, timeout=60))))
            for x in distinct(5)
        ]
        for thread in threads:
            thread.start()
        until(lambda: watcher.status()["models"]["alone"]["queue_rows"] == 3)  # two run
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert sorted(x[0, 0] for x, _ in answers) == [0, 1, 2, 3, 4]
        for x, answer in answers:
            assert answer["y"].tolist() == (2 * x).tolist()


def test_batches_of_many_run_again_too_when_their_workers_are_killed(start_server, folder):
    table = f"""
[models.any]
path = "{models.path("unknown_rank")}"
max_batch_size = 4
workers = 2
slots = 6
max_rows_bytes = 4194304
"""

    async def go(server, watcher):
        pids = workers_of(watcher, "any")
        async with AsyncClient(server.endpoint) as client:
            for _ in range(4):  # to have regions
                await asyncio.gather(*[client.predict("any", x) for x in distinct(10)])
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            sent = distinct(12)  # of which two run alone, each on a worker
            calls = asyncio.gather(*[client.predict("any", x) for x in sent])
            while watcher.status()["models"]["any"]["queue_rows"] < 10:
                await asyncio.sleep(0.01)
            assert any(mapped(pid) for pid in pids)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            for x, answer in zip(sent, await calls, strict=True):
                assert answer["y"].tolist() == (2 * x).tolist()

    with (
        start_server(folder, table) as server,
        Client(server.endpoint, share_memory=False) as watcher,
    ):
        asyncio.run(go(server, watcher))


def test_a_client_that_dies_while_its_batch_runs_leaves_no_memory(server):
    with Client(server.endpoint, share_memory=False) as watcher:
        pids = workers_of(watcher)
        with python(BUSY.replace('"any"', '"alone"'), server) as process:
            assert process.stdout.readline() == "busy\n"
            until(lambda: any(mapped(pid) for pid in pids))
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            process.send_signal(signal.SIGKILL)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        until(lambda: not any(mapped(pid) for pid in pids))
        array = np.ones((1, 40_000), np.float32)
        assert watcher.predict("alone", array)["y"].tobytes() == (array * 2).tobytes()


# -- lies ----------------------------------------------------------------------------------------------


class Liar:
    """A client with a region, which says of it what it likes."""

    def __init__(self, server, data):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = ANSWER_TIMEOUT_MS
        self.socket.connect(server.endpoint)
        self.region = Region(side_path(server.endpoint), len(data))
        self.region.memory[:] = np.frombuffer(data, np.uint8)
        deadline = time.monotonic() + 10
        while not self.region.is_granted():
            assert time.monotonic() < deadline
        self._ids = itertools.count(1)

    def close(self):
        self.region.close()
        self.socket.close()
        self._context.term()

    def ask(
        self, references, tensor=TensorMeta("x", "float32", (4,)), model="any", rows=1, flags=Flag.REGION
    ):
        id_ = next(self._ids)
        meta = wire.encode_meta(PredictMeta(model, None, None, (tensor,)))
        header = wire.encode_header(Header(Kind.PREDICT, id_, meta, rows=rows, flags=flags))
        self.socket.send_multipart([header, *references])
        frame, *tensors = self.socket.recv_multipart()
        decoded = wire.decode_header(frame)
        assert decoded.id == id_
        if decoded.kind is Kind.ERROR:
            raise wire.decode_error(decoded)
        return tensors


@pytest.fixture
def liar(server):
    made = Liar(server, np.arange(PAGE // 4, dtype=np.float32).tobytes())
    yield made
    (tensor,) = made.ask([REFERENCE.pack(made.region.token, 4, 16)])
    assert np.frombuffer(tensor, np.float32).tolist() == [2.0, 4.0, 6.0, 8.0], "it goes on"
    made.close()


def test_where_no_framework_could_alias_it_a_tensor_is_copied(liar):
    for offset in (0, 4, 64, 100):
        (tensor,) = liar.ask([REFERENCE.pack(liar.region.token, offset, 16)], model="alone")
        wanted = [2.0 * (offset // 4 + i) for i in range(4)]
        assert np.frombuffer(tensor, np.float32).tolist() == wanted


@pytest.mark.parametrize(
    ("reference", "kind", "sentence"),
    [
        (lambda _: REFERENCE.pack(bytes(16), 0, 16), Unavailable, "a region that is not there"),
        (lambda token: REFERENCE.pack(token[::-1], 0, 16), Unavailable, "a region that is not there"),
        (lambda token: REFERENCE.pack(token, PAGE - 15, 16), InvalidInput, "its region has 4096"),
        (lambda token: REFERENCE.pack(token, 2**64 - 16, 16), InvalidInput, "its region has 4096"),
        (lambda token: REFERENCE.pack(token, 0, 15), WireError, "tensor frame 0 has 15 bytes; wanted 16"),
        (lambda token: REFERENCE.pack(token, 0, 17), WireError, "tensor frame 0 has 17 bytes; wanted 16"),
        (lambda _: bytes(16), WireError, "has 16 bytes; wanted a reference of 32"),
    ],
)
def test_a_lie_is_answered_with_a_sentence(liar, reference, kind, sentence):
    with pytest.raises(kind, match=sentence):
        liar.ask([reference(liar.region.token)])


def test_references_are_counted_like_tensors(liar):
    reference = REFERENCE.pack(liar.region.token, 0, 16)
    for number in (0, 2, 300):
        with pytest.raises(WireError, match="tensor frames"):
            liar.ask([reference] * number)


def test_answers_to_requests_that_ran_together_come_together(server, liar):
    meta = wire.encode_meta(PredictMeta("any", None, None, (TensorMeta("x", "float32", (4,)),)))
    with Client(server.endpoint, share_memory=False) as watcher:
        (pid,) = workers_of(watcher, "any")
        os.kill(pid, signal.SIGSTOP)
        for id_, offset in ((901, 0), (902, 64), (903, 80), (904, 96), (905, 1024)):  # the last is copied
            header = wire.encode_header(Header(Kind.PREDICT, id_, meta, rows=1, flags=Flag.REGION))
            liar.socket.send_multipart([header, REFERENCE.pack(liar.region.token, offset, 16)])
        until(lambda: watcher.status()["models"]["any"]["queue_rows"] == 4)  # the first was alone
        os.kill(pid, signal.SIGCONT)
    (_, first), (header, table, rest) = (liar.socket.recv_multipart() for _ in range(2))
    assert np.frombuffer(first, np.float32).tolist() == [0, 2, 4, 6]
    assert wire.decode_header(header).flags == Flag.BUNDLE
    assert wire.split_parts(table, 4)[0] == [902, 903, 904, 905]
    begins = np.array([[16.0], [20.0], [24.0], [256.0]])
    np.testing.assert_array_equal(np.frombuffer(rest, np.float32).reshape(4, 4), 2 * (begins + np.arange(4)))


def test_a_bundle_of_references_is_refused_for_each_of_its_requests(liar):
    meta = wire.encode_meta(PredictMeta("any", None, None, (TensorMeta("x", "float32", (4,)),)))
    header = wire.encode_header(Header(Kind.PREDICT, 0, meta, rows=2, flags=Flag.REGION | Flag.BUNDLE))
    table = b"".join(wire.PART.pack(id_, 0, 1) for id_ in (801, 802))
    liar.socket.send_multipart([header, table, REFERENCE.pack(liar.region.token, 0, 32)])
    frame, table = liar.socket.recv_multipart()
    assert "a bundle with references" in wire.decode_error(wire.decode_header(frame)).message
    assert wire.split_parts(table, 0)[0] == [801, 802]


def test_a_tensor_over_the_servers_limit_is_too_large_by_reference_too(server):
    made = Liar(server, bytes(2_097_152 + PAGE))
    with pytest.raises(TooLarge, match="has 2097156 bytes; the server takes at most 2097152"):
        made.ask([REFERENCE.pack(made.region.token, 0, 2_097_156)], TensorMeta("x", "float32", (524_289,)))
    made.close()


def test_whoever_writes_while_it_is_read_hurts_only_itself(server):
    """Offsets of strings are checked and then used: between the two nobody may change them."""
    payload = wire.encode_strings([b"abc", b"defg", b"", b"h" * 200])
    made = Liar(server, payload.ljust(PAGE, b"\0"))
    reference = REFERENCE.pack(made.region.token, 0, len(payload))
    stop = threading.Event()

    def scribble():
        offsets = made.region.memory[:40].view("<u8")
        good, bad = offsets.copy(), np.array([0, 1 << 40, 7, 1 << 63, len(payload) - 40], "<u8")
        while not stop.is_set():
            offsets[:] = bad
            offsets[:] = good

    thread = threading.Thread(target=scribble)
    thread.start()
    answered = refused = 0
    try:
        for _ in range(300):
            try:
                upper, lengths = made.ask([reference], TensorMeta("text", "string", ()), "text", 4)
            except errors.WireError:
                refused += 1
            else:
                answered += 1
                assert {len(upper), len(lengths)} > {16}
    finally:
        stop.set()
        thread.join()
        made.close()
    assert answered + refused == 300
    with Client(server.endpoint) as client:
        assert client.predict("text", np.array([b"ab"], object))["upper"].tolist() == [b"AB"]
