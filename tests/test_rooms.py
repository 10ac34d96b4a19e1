"""Answers in the memory of their client: real servers, and clients that lie about it."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from pool import AsyncClient, Client, wire
from pool.client import connection as client_connection
from pool.client import region as client_region
from pool.client.region import Region
from pool.endpoints import side_path
from pool.errors import InvalidInput, Unavailable, WireError
from pool.front import regions, rooms
from pool.front.doorway import Doorway
from pool.wire import REFERENCE, Flag, Header, Kind, PredictMeta, TensorMeta
from tests import models
from tests.raw import bound

CONFIG = """\
[models.any]
path = "{unknown_rank}"
max_batch_size = 4
slots = 4
max_rows_bytes = 4194304

[models.text]
path = "{strings}"
max_batch_size = 8
slots = 4
max_rows_bytes = 4194304
"""
ANSWER_TIMEOUT_MS = 20_000
KEEP_SIZE, PUNCH_HOLE = 1, 2  # <linux/falloc.h>
LARGE = rooms.PUT_BYTES


@pytest.fixture(scope="module")
def server(start_server):
    text = CONFIG.format(**{name: models.path(name) for name in ("unknown_rank", "strings")})
    with (
        tempfile.TemporaryDirectory(prefix="pool-") as made,
        start_server(Path(made), text, server="max_message_bytes = 8388608") as running,
    ):
        yield running


def told(server):
    with Client(server.endpoint, share_memory=False) as client:
        return client.status()["front"]["regions"]


def ask_until_put(server, client, model, inputs):
    """Predict until an answer came by a room; that answer."""
    for _ in range(10):
        before = told(server)["answers"]
        outputs = client.predict(model, inputs)
        if told(server)["answers"] > before:
            return outputs
    raise AssertionError("no answer was put into a room")


def test_large_answers_come_by_room_the_same_to_the_bit(server):
    array = np.random.default_rng(0).standard_normal((2, 50_000)).astype(np.float32)
    with Client(server.endpoint) as client, Client(server.endpoint, share_memory=False) as plain:
        outputs = ask_until_put(server, client, "any", {"x": array})
        kept = outputs["y"].tobytes()
        assert kept == plain.predict("any", {"x": array})["y"].tobytes() == (array * 2).tobytes()
        outputs["y"][:] = 0  # the caller's own
        second = client.predict("any", {"x": array + 1})["y"]
        assert not outputs["y"].any()
        assert second.tobytes() == ((array + 1) * 2).tobytes()


def test_answers_of_several_batches_are_joined_there(server):
    array = np.random.default_rng(1).standard_normal((9, 10_000)).astype(np.float32)  # of 4 to a batch
    with Client(server.endpoint) as client:
        outputs = ask_until_put(server, client, "any", {"x": array})
        assert outputs["y"].tobytes() == (array * 2).tobytes()


def test_strings_come_there_too(server):
    texts = np.array([b"a" * 70_000, b"b" * 90_000, b""], object)
    with Client(server.endpoint) as client:
        outputs = ask_until_put(server, client, "text", {"text": texts})
        assert outputs["upper"].tolist() == [text.upper() for text in texts]
        assert outputs["length"].tolist() == [70_000, 90_000, 0]


def test_an_answer_that_outgrows_its_room_comes_by_message_and_the_next_one_has_more(server):
    with Client(server.endpoint) as client:
        small = np.array([b"a" * 140_000, b""], object)
        ask_until_put(server, client, "text", {"text": small})
        large = np.array([b"b" * 140_000, b"c" * 40_000], object)  # the same kind of request
        before = told(server)["answers"]
        assert client.predict("text", {"text": large})["upper"].tolist() == [b"B" * 140_000, b"C" * 40_000]
        assert told(server)["answers"] == before
        assert client.predict("text", {"text": large})["upper"].tolist() == [b"B" * 140_000, b"C" * 40_000]
        assert told(server)["answers"] == before + 1


def test_small_answers_and_clients_that_want_no_shared_memory_get_messages(server):
    before = told(server)["answers"]
    with Client(server.endpoint) as client, Client(server.endpoint, share_memory=False) as plain:
        for _ in range(4):
            client.predict("any", np.ones((1, 10), np.float32))
            plain.predict("any", np.ones((1, LARGE), np.float32))
    assert told(server)["answers"] == before


def test_many_at_once_over_one_connection_get_their_own_answers(server):
    async def go():
        before = told(server)["answers"]
        async with AsyncClient(server.endpoint) as client:
            rng = np.random.default_rng(4)
            for _ in range(6):
                sent = [rng.standard_normal((1, n)).astype(np.float32) for n in (40_000, 50_000, 60_000) * 4]
                got = await asyncio.gather(*[client.predict("any", array) for array in sent])
                for array, outputs in zip(sent, got, strict=True):
                    assert outputs["y"].tobytes() == (array * 2).tobytes()
            assert not client._exchange._connection.regions.live
        assert told(server)["answers"] >= before + 12

    asyncio.run(go())


def test_a_time_line_comes_by_message(server):
    array = np.ones((1, LARGE), np.float32)
    with Client(server.endpoint) as client:
        ask_until_put(server, client, "any", {"x": array})
        before = told(server)["answers"]
        answer = client.predict("any", {"x": array}, timeline=True)
        assert answer["y"].tobytes() == (array * 2).tobytes()
        assert told(server)["answers"] == before


# -- lies ----------------------------------------------------------------------------------------------


def await_grant(region):
    deadline = time.monotonic() + 10
    while not region.is_granted():
        assert time.monotonic() < deadline


class Liar:
    """A client with a room, which says of it what it likes."""

    def __init__(self, server, size=4 * LARGE):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = ANSWER_TIMEOUT_MS
        self.socket.connect(server.endpoint)
        self.room = Region(side_path(server.endpoint), size, is_room=True)
        await_grant(self.room)
        self._ids = itertools.count(1)

    def close(self):
        self.room.close()
        self.socket.close()
        self._context.term()

    def ask(self, *frames, items=LARGE // 4, flags=Flag.ROOM):
        """One row of so many ones, behind which the frames come; flags and frames of the answer."""
        id_ = next(self._ids)
        meta = wire.encode_meta(PredictMeta("any", None, None, (TensorMeta("x", "float32", (items,)),)))
        header = wire.encode_header(Header(Kind.PREDICT, id_, meta, rows=1, flags=flags))
        self.socket.send_multipart([header, *frames])
        first, *tensors = self.socket.recv_multipart()
        decoded = wire.decode_header(first)
        assert decoded.id == id_
        if decoded.kind is Kind.ERROR:
            raise wire.decode_error(decoded)
        return decoded.flags, tensors


ONES = np.ones(LARGE // 4, np.float32).tobytes()


@pytest.fixture
def liar(server):
    made = Liar(server)
    yield made
    flags, (reference,) = made.ask(ONES, REFERENCE.pack(made.room.token, 64, 2 * LARGE))
    assert flags == Flag.REGION
    assert reference == REFERENCE.pack(made.room.token, 64, LARGE)
    assert made.room.memory[64 : 64 + LARGE].view(np.float32).tolist() == [2.0] * (LARGE // 4), "it goes on"
    made.close()


@pytest.mark.parametrize(
    ("frames", "kind", "sentence"),
    [
        (lambda _: [], WireError, "no frame that says where the room is"),
        (lambda _: [ONES, bytes(31)], WireError, "the frame of the room has 31 bytes; wanted a reference of"),
        (lambda token: [ONES, REFERENCE.pack(token, 4 * LARGE, 1)], InvalidInput, "its region has 524288"),
        (lambda token: [ONES, REFERENCE.pack(token, 2**64 - 1, 1)], InvalidInput, "its region has 524288"),
        (lambda token: [REFERENCE.pack(token, 0, LARGE)], WireError, "tensor frames"),
        (lambda token: [ONES, ONES, REFERENCE.pack(token, 0, LARGE)], WireError, "tensor frames"),
    ],
)
def test_a_lie_is_answered_with_a_sentence(liar, frames, kind, sentence):
    with pytest.raises(kind, match=sentence):
        liar.ask(*frames(liar.room.token))


@pytest.mark.parametrize("size", [0, LARGE - 1])
def test_without_enough_room_the_answer_is_in_the_message(liar, size):
    flags, (tensor,) = liar.ask(ONES, REFERENCE.pack(liar.room.token, 0, size))
    assert flags == 0
    assert np.frombuffer(tensor, np.float32).tolist() == [2.0] * (LARGE // 4)


def test_a_room_that_is_not_there_is_none(liar):
    flags, _ = liar.ask(ONES, REFERENCE.pack(bytes(16), 0, LARGE))
    assert flags == 0


def test_nothing_is_read_from_a_room_and_nothing_written_to_a_region(server, liar):
    with pytest.raises(Unavailable, match="a region that is not there"):
        liar.ask(REFERENCE.pack(liar.room.token, 0, LARGE), flags=Flag.REGION)
    region = Region(side_path(server.endpoint), LARGE)
    await_grant(region)
    flags, _ = liar.ask(ONES, REFERENCE.pack(region.token, 0, LARGE))
    assert flags == 0
    assert not region.memory.any()
    region.close()


def test_a_bundle_with_room_is_refused_for_each_of_its_requests(liar):
    meta = wire.encode_meta(PredictMeta("any", None, None, (TensorMeta("x", "float32", (4,)),)))
    header = wire.encode_header(Header(Kind.PREDICT, 0, meta, rows=2, flags=Flag.ROOM | Flag.BUNDLE))
    table = b"".join(wire.PART.pack(id_, 0, 1) for id_ in (801, 802))
    liar.socket.send_multipart([header, table, bytes(32), REFERENCE.pack(liar.room.token, 0, 32)])
    frame, table = liar.socket.recv_multipart()
    assert "a bundle with references" in wire.decode_error(wire.decode_header(frame)).message
    assert wire.split_parts(table, 0)[0] == [801, 802]


def test_pages_punched_out_of_a_room_are_made_anew(server, monkeypatch):
    """Its client may do that: no seal forbids it without forbidding the server to write."""
    fds = []
    make = client_region._make_memfd

    def keep(size):
        fd = make(size)
        fds.append(os.dup(fd))
        return fd

    monkeypatch.setattr(client_region, "_make_memfd", keep)
    made = Liar(server)
    long = ctypes.c_long
    assert ctypes.CDLL(None).fallocate(fds[0], KEEP_SIZE | PUNCH_HOLE, long(0), long(4 * LARGE)) == 0
    assert os.fstat(fds[0]).st_blocks == 0
    flags, _ = made.ask(ONES, REFERENCE.pack(made.room.token, 0, LARGE))
    assert flags == Flag.REGION
    assert made.room.memory[:LARGE].view(np.float32).tolist() == [2.0] * (LARGE // 4)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fds[0], 0)
    os.close(fds[0])
    made.close()


def test_a_client_that_dies_before_its_answer_harms_nobody(server):
    for _ in range(3):
        made = Liar(server)
        meta = wire.encode_meta(PredictMeta("any", None, None, (TensorMeta("x", "float32", (LARGE // 4,)),)))
        header = wire.encode_header(Header(Kind.PREDICT, 1, meta, rows=1, flags=Flag.ROOM))
        made.socket.send_multipart([header, ONES, REFERENCE.pack(made.room.token, 0, LARGE)])
        made.close()
    with Client(server.endpoint) as client:
        assert client.predict("any", np.ones((1, 4), np.float32))["y"].tolist() == [[2.0] * 4]
    deadline = time.monotonic() + 10
    while told(server)["open"]:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK | 0x10], ids=["unsealed", "not to be written"])
def test_memory_that_could_be_cut_or_cannot_be_written_is_no_room(server, monkeypatch, seals):
    monkeypatch.setattr(client_region, "_ROOM_SEALS", seals)
    room = Region(side_path(server.endpoint), 4096, is_room=True)
    with pytest.raises((InvalidInput, Unavailable), match=r"wanted F_SEAL_SHRINK|cannot be mapped"):
        await_grant(room)
    room.close()


def test_there_are_so_many_bytes_of_rooms_and_no_more(monkeypatch):
    monkeypatch.setattr(regions, "_ROOMS_MAX_BYTES", 3 * 4096)

    async def granted(region):
        for _ in range(100):
            await asyncio.sleep(0)
            if region.is_granted():
                return
        raise AssertionError("no answer")

    async def go(folder):
        endpoint = f"ipc://{folder}/s"
        there = regions.Regions()
        door = Doorway({wire.REGION_MAGIC: there.take, wire.ROOM_MAGIC: there.take})
        with bound(endpoint):
            door.listen(endpoint)
        path = side_path(endpoint)
        first, second = Region(path, 2 * 4096, is_room=True), Region(path, 2 * 4096, is_room=True)
        await granted(first)
        with pytest.raises(
            Unavailable, match="a room of 8192 bytes beside 8192 of others; wanted at most 12288"
        ):
            await granted(second)
        tensors = Region(path, 2 * 4096)  # these are counted by themselves
        await granted(tensors)
        for region in (first, second, tensors):
            region.close()
        door.close()
        there.close()

    with tempfile.TemporaryDirectory(prefix="pool-") as folder:
        asyncio.run(go(folder))


@pytest.mark.usefixtures("everything_in_rooms")
def test_small_answers_would_be_right_too(server):
    with Client(server.endpoint) as client:
        for items in (1, 3, 16, 5000):
            array = np.arange(2 * items, dtype=np.float32).reshape(2, items)
            for _ in range(4):
                assert client.predict("any", array)["y"].tolist() == (array * 2).tolist()


@pytest.fixture
def everything_in_rooms(monkeypatch):
    """The client brings room for every answer."""
    monkeypatch.setattr(client_connection, "SHARE_BYTES", 1)
    monkeypatch.setattr(client_region, "SHARE_BYTES", 1)
