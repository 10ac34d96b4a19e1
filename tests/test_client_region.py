"""The client's shared memory: fronts that grant it, refuse it or go away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile

import numpy as np
import pytest

from pool import AsyncClient, Client, wire
from pool.client import region
from pool.client.region import Regions
from pool.endpoints import side_path
from pool.errors import Unavailable, WireError
from pool.front import regions as front
from pool.front.doorway import Doorway
from pool.wire import REFERENCE, Flag, Header, Kind
from tests.raw import bound, no_descriptors
from tests.scripted_server import scripted_server

LARGE = region.SHARE_BYTES


@pytest.fixture
def endpoint():
    # Not tmp_path: its name may be longer than the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        yield f"ipc://{directory}/s"


# -- with a front in this process --------------------------------------------------------------------


def request(id_, size=LARGE, fill=1, flags=0, kind=Kind.PREDICT):
    return [
        wire.encode_header(Header(kind, id_, b"meta", rows=1, flags=flags)),
        memoryview(np.full(size, fill, np.uint8)),
    ]


def reply(id_):
    return wire.encode_header(Header(Kind.RESULT, id_, b""))


@contextlib.asynccontextmanager
async def regions_of(endpoint):
    """A client's regions, and the front's."""
    there = front.Regions()
    door = Doorway({wire.REGION_MAGIC: there.take, wire.ROOM_MAGIC: there.take})
    with bound(endpoint):
        door.listen(endpoint)
    here = Regions(side_path(endpoint))
    try:
        yield here, there
    finally:
        here.close()
        door.close()
        there.close()


async def turn():
    """Let the front see to its sockets."""
    for _ in range(5):
        await asyncio.sleep(0)


async def granted(here, size=LARGE):
    """Place requests until one finds a region; its reply came."""
    for id_ in range(1 << 40, (1 << 40) + 10):
        frames = request(id_, size)
        if here.place(frames) is not frames:
            here.answered([reply(id_)])
            return
        await turn()
    raise AssertionError("no region")


def offset_of(frames):
    return REFERENCE.unpack(frames[1])[1]


def test_the_first_large_request_asks_for_nothing_the_second_does_and_later_ones_are_placed(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, there):
            for id_ in (1, 2):
                frames = request(id_)
                assert here.place(frames) is frames
                await turn()
                assert there.describe()["open"] == id_ - 1
            header, reference = here.place(request(3, fill=7))
            decoded = wire.decode_header(header)
            assert (decoded.id, decoded.flags, decoded.meta) == (3, Flag.REGION, b"meta")
            (tensor,), _ = there.resolve([memoryview(reference)])
            assert tensor == bytes([7]) * LARGE

    asyncio.run(go())


def test_tensors_of_a_request_lie_side_by_side_aligned(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            arrays = [np.random.default_rng(0).bytes(size) for size in (1, LARGE, 0, 65, 64)]
            _, *references = here.place([request(1)[0], *arrays])
            found, _ = there.resolve([memoryview(r) for r in references])
            assert list(map(bytes, found)) == arrays
            assert all(REFERENCE.unpack(r)[1] % 64 == 0 for r in references)
            del found

    asyncio.run(go())


def test_a_block_is_used_again_when_the_reply_came_and_not_before(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, _):
            await granted(here)
            first = offset_of(here.place(request(1)))
            assert offset_of(here.place(request(2))) != first
            here.answered([reply(9)])  # of a request that was not placed
            assert offset_of(here.place(request(3))) != first
            here.answered([reply(1)])
            assert offset_of(here.place(request(4))) == first

    asyncio.run(go())


@pytest.mark.parametrize("kind", [Kind.RESULT, Kind.ERROR])
def test_a_bundle_of_replies_ends_the_use_of_all_its_blocks(endpoint, kind):
    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            places = [offset_of(here.place(request(id_))) for id_ in (1, 2, 3)]
            table = wire.PART.pack(1, 0, 1) + wire.PART.pack(3, 0, 3) + wire.PART.pack(77, 0, 0)
            header = wire.encode_header(Header(kind, 0, b"meta", rows=4, flags=Flag.BUNDLE))
            answer = [header, table] if kind is Kind.ERROR else [header, table, bytes(LARGE // 3 * 4 + 4)]
            for bad in ([], [b"short"], [table[:-1]]):
                assert here.answered([header, *bad]) == [header, *bad]
            assert len(here.live) == 3
            assert here.answered(answer) is answer
            assert [int.from_bytes(id_, "little") for id_ in here.live] == [2]
            assert offset_of(here.place(request(4))) == places[0]
            assert offset_of(here.place(request(5))) == places[2]
            here.answered([reply(4)])
            await turn()
            # Of the answers that came, the one of three rows was large enough for a room of its own.
            here.place(request(6))
            await turn()
            here.answered([reply(6)])
            here.place(request(7))
            assert there.describe()["open"] == 1 + (kind is Kind.RESULT)

    asyncio.run(go())


def test_memory_grows_with_what_is_in_flight_up_to_its_bound(endpoint, monkeypatch):
    monkeypatch.setattr(region, "REGIONS_MAX_BYTES", 4 << 20)

    async def go():
        async with regions_of(endpoint) as (here, there):
            placed = 0
            for id_ in range(1, 60):
                frames = request(id_)
                placed += here.place(frames) is not frames
                await turn()
            assert there.describe()["open"] == 3
            assert there.describe()["bytes"] == 4 << 20
            assert placed == (4 << 20) // LARGE
            for id_ in range(1, 60):
                here.answered([reply(id_)])
            assert not here.live
            frames = request(99, 5 << 20)
            assert here.place(frames) is frames, "more than the bound"

    asyncio.run(go())


@pytest.mark.parametrize(
    "frames",
    [request(1, flags=Flag.BUNDLE), request(1, kind=Kind.STATUS), request(1, flags=Flag.REGION)],
    ids=["bundle", "question", "references"],
)
def test_what_has_no_tensors_of_one_request_goes_as_it_is(endpoint, frames):
    async def go():
        async with regions_of(endpoint) as (here, _):
            await granted(here)
            assert here.place(frames) is frames

    asyncio.run(go())


def test_an_id_that_is_in_use_is_not_placed_twice(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, _):
            await granted(here)
            frames = request(1)
            assert here.place(frames) is not frames
            assert here.place(frames) is frames
            here.answered([reply(1)])
            frames = request(2, region._REGION_MIN_BYTES)
            assert here.place(frames) is not frames, "all of it is free"

    asyncio.run(go())


def test_what_was_not_used_for_long_is_given_back(endpoint, monkeypatch):
    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            here.trim()
            await turn()
            assert there.describe()["open"] == 1
            monkeypatch.setattr(region, "IDLE_S", 0.0)
            here.place(request(1))
            here.trim()
            await turn()
            assert there.describe()["open"] == 1, "a request is under way"
            here.answered([reply(1)])
            here.trim()
            await turn()
            assert there.describe() == {"open": 0, "bytes": 0, "requests": 0, "answers": 0}
            await granted(here)  # and made again when wanted

    asyncio.run(go())


def test_a_front_that_went_away_is_noticed_before_a_request_relies_on_it(endpoint, monkeypatch):
    monkeypatch.setattr(region, "_CHECK_S", 0.0)

    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            there.close()
            frames = request(1)
            assert here.place(frames) is frames
            assert not here.live

    asyncio.run(go())


def test_the_memory_of_a_closed_client_is_gone_at_once(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            here.place(request(1))
            here.close()
            await turn()
            assert there.describe()["open"] == 0
            assert not regions_mapped()

    asyncio.run(go())


# -- room for answers --------------------------------------------------------------------------------


def result(id_, *tensors, flags=0):
    return [wire.encode_header(Header(Kind.RESULT, id_, b"meta", rows=1, flags=flags)), *tensors]


async def with_room(here, id_):
    """Place requests whose answers are large until one has room."""
    for other in range(1 << 41, (1 << 41) + 10):
        frames = here.place(request(other))
        if len(frames) == 3:
            here.answered(result(other, bytes(LARGE)))
            break
        here.answered(result(other, bytes(LARGE)))
        await turn()
    return here.place(request(id_))


def test_a_request_like_one_whose_answer_was_large_brings_room_for_as_much(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            header, _, room = await with_room(here, 1)
            assert wire.decode_header(header).flags == Flag.REGION | Flag.ROOM
            assert REFERENCE.unpack(room)[2] == LARGE
            assert len(there.find_room(memoryview(room))[2]) == LARGE
            assert there.describe()["open"] == 2
            other = [header.replace(b"meta", b"more") for header in request(2)[:1]] + request(2)[1:]
            assert len(here.place(other)) == 2, "nothing is known of its answer"

    asyncio.run(go())


def test_an_answer_in_its_room_is_copied_from_there_and_the_room_used_again(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, there):
            await granted(here)
            rooms = []
            for id_ in (1, 2):
                _, _, reference = await with_room(here, id_)
                token, offset, memory = there.find_room(memoryview(reference))
                memory[:3], memory[64:66] = b"abc", b"de"
                references = [REFERENCE.pack(token, offset, 3), REFERENCE.pack(token, offset + 64, 2)]
                header, *tensors = here.answered(result(id_, *references, flags=Flag.REGION | Flag.WHOLE))
                assert tensors == [b"abc", b"de"]
                assert wire.decode_header(header).flags == Flag.WHOLE
                memory[:3] = b"xyz"
                assert tensors[0] == b"abc", "their owner's alone"
                rooms.append(offset)
            assert rooms[0] == rooms[1]
            assert not here.live

    asyncio.run(go())


def test_room_that_was_not_used_is_free_again(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, _):
            await granted(here)
            _, _, first = await with_room(here, 1)
            here.answered(result(1, bytes(8)))
            _, _, second = here.place(request(2))
            assert second == first
            here.answered([wire.encode_error(2, Unavailable("no"))])
            _, _, third = here.place(request(3))
            assert third == first

    asyncio.run(go())


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (lambda token, at: REFERENCE.pack(token[::-1], at, 1), "beyond the room"),
        (lambda token, at: REFERENCE.pack(token, at - 1, 1), "beyond the room"),
        (lambda token, at: REFERENCE.pack(token, at, LARGE + 1), "beyond the room"),
        (lambda token, _: REFERENCE.pack(token, 2**64 - 1, 2), "beyond the room"),
        (lambda token, at: REFERENCE.pack(token, at, 1)[1:], "a reference of 31 bytes; wanted 32"),
    ],
)
def test_a_server_that_refers_to_something_else_is_not_believed(endpoint, reference, sentence):
    async def go():
        async with regions_of(endpoint) as (here, _):
            await granted(here)
            await with_room(here, 1)
            here.answered(result(1, bytes(8)))
            here.place(request(2, fill=2))  # below it, so that there is something before it
            _, _, room = here.place(request(3))
            token, at, _ = REFERENCE.unpack(room)
            with pytest.raises(WireError, match=sentence):
                here.answered(result(3, reference(token, at), flags=Flag.REGION))

    asyncio.run(go())


def test_a_server_that_was_given_no_room_cannot_have_put_anything_there(endpoint):
    async def go():
        async with regions_of(endpoint) as (here, _):
            await granted(here)
            here.place(request(1))
            with pytest.raises(WireError, match="which its request had not"):
                here.answered(result(1, REFERENCE.pack(bytes(16), 0, 1), flags=Flag.REGION))

    asyncio.run(go())


def regions_mapped():
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "memfd:pool-region" in line]


# -- with fronts that do not grant -------------------------------------------------------------------


@contextlib.contextmanager
def listener(endpoint):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.bind(endpoint.removeprefix("ipc://") + ".fd")
        made.listen()
        yield made


ANSWERS = {
    "refusal": wire.encode_error(0, Unavailable("no more")),
    "another version": wire.REGION_GRANT.pack(wire.REGION_MAGIC, 2, bytes(16), 1 << 30),
    "noise": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_without_a_grant_requests_go_as_they_are_and_the_server_is_left_in_peace(endpoint, answer):
    here = Regions(side_path(endpoint))
    with listener(endpoint) as there:
        frames = request(1)
        assert here.place(frames) is frames
        assert here.place(frames) is frames
        peer, _ = there.accept()
        with peer:
            if answer:
                peer.send(answer)
        for _ in range(5):
            assert here.place(frames) is frames
        there.setblocking(False)
        with pytest.raises(BlockingIOError):
            there.accept()
        here.close()
    assert not regions_mapped()


def test_a_grant_that_never_comes_is_not_waited_for(endpoint):
    here = Regions(side_path(endpoint))
    with listener(endpoint):
        frames = request(1)
        for _ in range(5):
            assert here.place(frames) is frames
        here.close()


def test_without_descriptors_or_memory_requests_go_as_they_are(endpoint, monkeypatch):
    here, poor = Regions(side_path(endpoint)), Regions(side_path(endpoint))
    frames = request(1)
    with listener(endpoint):
        here.place(frames)
        with no_descriptors():
            assert here.place(frames) is frames
        poor.place(frames)
        monkeypatch.setattr(region, "available_bytes", lambda: 4096)
        assert poor.place(frames) is frames
    assert not regions_mapped()


def test_a_server_without_regions_gets_large_requests_whole(endpoint):
    image = np.random.default_rng(1).integers(0, 255, (1, 2 * LARGE), np.uint8)
    with scripted_server(endpoint), Client(endpoint) as client:
        for _ in range(4):
            got = client.predict("m", image, signature="large")
            assert got["x"].tobytes() == image.tobytes()


@pytest.mark.parametrize("made", [Client, AsyncClient])
@pytest.mark.parametrize("share_memory", [True, False])
def test_whoever_wants_nothing_but_zeromq_gets_nothing_else(made, share_memory, endpoint):
    image = np.zeros((1, LARGE), np.uint8)

    async def ask():
        async with AsyncClient(endpoint, share_memory=share_memory) as client:
            for _ in range(4):
                await client.predict("m", image, signature="large")

    with listener(endpoint) as there, scripted_server(endpoint):
        if made is AsyncClient:
            asyncio.run(ask())
        else:
            with Client(endpoint, share_memory=share_memory) as client:
                for _ in range(4):
                    client.predict("m", image, signature="large")
        there.setblocking(False)
        if share_memory:
            there.accept()[0].close()
        else:
            with pytest.raises(BlockingIOError):
                there.accept()


def test_tcp_has_no_regions():
    here = Regions(side_path("tcp://127.0.0.1:5600"))
    frames = request(1)
    for _ in range(3):
        assert here.place(frames) is frames
