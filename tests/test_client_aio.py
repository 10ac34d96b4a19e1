"""`AsyncClient` against a scripted server, on asyncio's loop and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import tempfile
import threading

import numpy as np
import pytest
import uvloop

from pool import AsyncClient, wire
from pool.client.route import COPY_BYTES
from pool.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    Unavailable,
    WireError,
)
from pool.wire import Header, Kind
from tests.scripted_server import answer_properly, on_predict, refuse, result, rows, scripted_server


@pytest.fixture
def endpoint():
    # Not tmp_path: its name may be longer than the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        yield f"ipc://{directory}/s"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine to its end; fails if anything was reported to the loop instead of a caller."""

    def run(coroutine):
        loop = request.param()
        reports = []
        loop.set_exception_handler(lambda _loop, context: reports.append(context))
        try:
            value = loop.run_until_complete(coroutine)
            gc.collect()  # a future that was dropped with an exception reports when it is collected
            loop.run_until_complete(asyncio.sleep(0))
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        assert reports == []
        return value

    return run


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def never(_header, _tensors):
    return None


async def predicted(server, count=1):
    """Wait until the server has received that many more predictions."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.run_in_executor(None, server.predicted.acquire)


# -- calls -----------------------------------------------------------------------------------------


def test_all_calls(run, endpoint):
    async def main(endpoint):
        async with AsyncClient(endpoint) as client:
            assert await client.live()
            assert await client.ready()
            assert await client.ready("m")
            assert list(await client.models()) == ["m"]
            assert await client.status() == {"models": {}, "front": {"pid": 1}}
            assert (await client.signature("m")).version == 7
            np.testing.assert_array_equal((await client.predict("m", rows(2)))["y"], rows(2))
            outputs = await client.predict("m", {"a": [1, 2], "b": [["x", "y"]] * 2}, signature="pair")
            assert outputs["b"].tolist() == [[b"x", b"y"]] * 2
            got = await client.predict("m", rows(2), signature="whole")
            np.testing.assert_array_equal(got["x"], rows(2))
            with pytest.raises(ModelNotFound, match="no model 'other'"):
                await client.predict("other", rows(1))
            with pytest.raises(ModelNotFound):
                await client.ready("other")

    with scripted_server(endpoint):
        run(main(endpoint))
    with scripted_server("tcp://127.0.0.1:*") as server:
        run(main(server.endpoint))


def test_many_at_once_get_their_own_answers(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            inputs = [rows(1 + i % 3) + np.float32(i) for i in range(1000)]
            answers = await asyncio.gather(*(client.predict("m", array) for array in inputs))
            for array, answer in zip(inputs, answers, strict=True):
                np.testing.assert_array_equal(answer["y"], array)
            assert client._exchange._pending == {}

    with scripted_server(endpoint):
        run(main())


def test_large_tensors_come_back_whole_and_writable(run, endpoint):
    async def main():
        arrays = [np.random.default_rng(i).integers(0, 255, (2, 2_000_000), np.uint8) for i in range(3)]
        async with AsyncClient(endpoint) as client:
            answers = await asyncio.gather(*(client.predict("m", a, signature="large") for a in arrays))
            for array, answer in zip(arrays, answers, strict=True):
                np.testing.assert_array_equal(answer["x"], array)
                answer["x"] += 1

    with scripted_server(endpoint):
        run(main())


def test_a_refusal_costs_no_message(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            await client.predict("m", rows(1))
            with pytest.raises(InvalidInput, match="wanted float32"):
                await client.predict("m", rows(1).astype(np.float64))
            assert server.kinds() == [Kind.SIGNATURE, Kind.PREDICT]
            await client.predict("m", rows(1).astype(np.float64), cast="same_kind")

    with scripted_server(endpoint) as server:
        run(main(server))


def test_errors_carry_their_advice(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            with pytest.raises(Overloaded) as caught:
                await client.predict("m", rows(1))
            assert caught.value.retry_after_ms == 30

    with scripted_server(endpoint, refuse(Overloaded("full", retry_after_ms=30))):
        run(main())


def test_more_than_the_socket_queues_is_sent_when_there_is_room(run, endpoint):
    may_answer = threading.Event()

    def wait(header, tensors):
        may_answer.wait()
        return answer_properly(header, tensors)

    async def main():
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            # Too large to travel in bundles: a message each, more than the socket queues.
            calls = [
                asyncio.ensure_future(
                    client.predict("m", np.full((1, COPY_BYTES + 1), i % 251, np.uint8), signature="large")
                )
                for i in range(6000)
            ]
            while not client._exchange._unsent:
                await asyncio.sleep(0)
            given_up = calls[-500:]
            for call in given_up:
                call.cancel()
            await asyncio.sleep(0)
            assert len(client._exchange._pending) == 5500
            may_answer.set()
            for i, call in enumerate(calls[:-500]):
                assert (await call)["x"][0, 0] == i % 251
            assert not client._exchange._unsent
            await asyncio.gather(*given_up, return_exceptions=True)

    with scripted_server(endpoint, on_predict(wait)) as server:
        try:
            run(main())
        finally:
            may_answer.set()
        assert server.kinds().count(Kind.PREDICT) <= 5500  # what was given up in time was never sent


# -- time ------------------------------------------------------------------------------------------


def test_timeouts(run, endpoint):
    async def main():
        async with AsyncClient(endpoint, timeout=math.inf) as client:
            await client.signature("m")
            calls = [client.predict("m", rows(1), timeout=t) for t in (0.2, 0.05, 0.1, 0.05)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, DeadlineExceeded)
                assert endpoint in outcome.message
            assert client._exchange._pending == {}
            assert await client.live()

    with scripted_server(endpoint, on_predict(never)):
        run(main())


def test_a_late_reply_is_not_taken_for_the_next(run, endpoint):
    def late(header, tensors):
        if header.millis < 1000:
            return None
        old = Header(Kind.PREDICT, header.id - 1, header.meta, rows=header.rows)
        return [result(old, [bytes(12)]), result(header, tensors)]

    async def main():
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
                await client.predict("m", rows(1), timeout=0.05)
            np.testing.assert_array_equal((await client.predict("m", rows(1)))["y"], rows(1))

    with scripted_server(endpoint, on_predict(late)):
        run(main())


def test_no_time_left_is_no_call(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            for timeout in (0, -1, math.nan):
                with pytest.raises(DeadlineExceeded, match="wanted more than 0 s"):
                    await client.predict("m", rows(1), timeout=timeout)

    run(main())


def test_deadlines_of_the_answered_do_not_pile_up(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            for _ in range(10):
                await asyncio.gather(*(client.predict("m", rows(1)) for _ in range(100)))
            assert len(client._exchange._deadlines) <= 2 * 100 + 257

    with scripted_server(endpoint):
        run(main())


def test_cancelling_a_call_gives_it_up(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            call = asyncio.ensure_future(client.predict("m", rows(1)))
            await predicted(server)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert client._exchange._pending == {}
            header = server.requests[-1]
            server.say(result(header, [bytes(12)]))  # finds nobody
            assert await client.live()

    with scripted_server(endpoint, on_predict(never)) as server:
        run(main(server))


def test_wait_for_works(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.predict("m", rows(1)), 0.05)
            assert client._exchange._pending == {}

    with scripted_server(endpoint, on_predict(never)):
        run(main())


# -- servers that are not there, or not any more ---------------------------------------------------


def test_nobody_at_the_endpoint(run, endpoint):
    other = endpoint + "2"

    async def main():
        async with AsyncClient([endpoint, other], connect_timeout=0.05) as client:
            assert await client.live() is False
            assert await client.ready() is False
            calls = [client.predict("m", rows(1)) for _ in range(3)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
                assert f"no pool server answered at {endpoint}, {other} within 0.05 s" in outcome.message
            with pytest.raises(DeadlineExceeded):
                await client.predict("m", rows(1), timeout=0.01)

    run(main())


def test_a_server_that_starts_late_is_waited_for(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            early = asyncio.ensure_future(client.live())
            await asyncio.sleep(0)
            with scripted_server(endpoint):
                assert await early

    run(main())


def test_the_first_endpoint_that_answers_is_used(run, endpoint):
    nobody, second = endpoint + "1", endpoint + "2"

    async def main():
        async with AsyncClient([nobody, second]) as client:
            assert await client.live()

    with scripted_server(second) as used:
        run(main())
        assert used.kinds() == [Kind.LIVE]


@pytest.mark.parametrize("where", ["ipc", "tcp"])
def test_a_server_that_goes_away_fails_every_call_under_way(run, endpoint, where):
    async def main(server):
        async with AsyncClient(server.endpoint, timeout=math.inf) as client:
            await client.signature("m")
            calls = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(20)]
            await predicted(server, 20)
            await asyncio.get_running_loop().run_in_executor(None, server.stop)
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
                assert "went away before it answered" in outcome.message
            with scripted_server(server.endpoint):
                np.testing.assert_array_equal((await client.predict("m", rows(1)))["y"], rows(1))

    address = endpoint if where == "ipc" else "tcp://127.0.0.1:*"
    with scripted_server(address, on_predict(never)) as server:
        run(main(server))


def test_what_the_server_said_before_it_went_away_counts(run, endpoint):
    async def main(server):
        async with AsyncClient(server.endpoint) as client:
            call = asyncio.ensure_future(client.predict("m", rows(1)))
            await predicted(server)
            server.say(result(server.requests[-1], [rows(1).tobytes()]))
            await asyncio.get_running_loop().run_in_executor(None, server.stop)
            np.testing.assert_array_equal((await call)["y"], rows(1))

    with scripted_server(endpoint, on_predict(never), linger_ms=10_000) as server:
        run(main(server))


def test_a_restarted_server_is_found_again(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            await client.predict("m", rows(1))
            server.stop()
            with scripted_server(endpoint) as again:
                outputs = None
                while outputs is None:
                    # Unavailable: sent before the end of the old connection was heard of.
                    with contextlib.suppress(Unavailable):
                        outputs = await client.predict("m", rows(1))
                np.testing.assert_array_equal(outputs["y"], rows(1))
                assert Kind.PREDICT in again.kinds()

    with scripted_server(endpoint) as server:
        run(main(server))


# -- servers that talk nonsense --------------------------------------------------------------------


def damaged(header: Header) -> dict[str, list[list[bytes]]]:
    return {
        "no header": [[b"HTTP/1.1 400 Bad Request\r\n\r\n"]],
        "another version": [[b"pl\x02" + wire.encode_error(header.id, Overloaded("x"))[3:]]],
        "a request": [[wire.encode_header(Header(Kind.LIVE, header.id, b""))]],
        "no tensor": [result(header, [])],
        "no meta": [[wire.encode_header(Header(Kind.RESULT, header.id, b"")), b""]],
        "a tensor too short": [result(header, [bytes(11)])],
        "an answer to something else": [
            [wire.encode_header(Header(Kind.INFO, header.id, wire.encode_info({"live": True})))]
        ],
    }


NONSENSE = [
    "no header",
    "another version",
    "a request",
    "no tensor",
    "no meta",
    "a tensor too short",
    "an answer to something else",
]


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_error_and_the_next_call_works(run, endpoint, name):
    async def main():
        async with AsyncClient(endpoint, timeout=30) as client:
            for _ in range(2):
                with pytest.raises(WireError):
                    await client.predict("m", rows(1))
                assert await client.live()

    with scripted_server(endpoint, on_predict(lambda header, _: damaged(header)[name])):
        run(main())


def test_a_bad_body_harms_only_its_own_request(run, endpoint):
    def every_third(header, tensors):
        return [result(header, [tensors[0][:-1] if header.id % 3 == 0 else tensors[0]])]

    async def main():
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            calls = [client.predict("m", rows(1)) for _ in range(30)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(each, WireError) for each in outcomes) == 10
            assert sum(isinstance(each, dict) for each in outcomes) == 20

    with scripted_server(endpoint, on_predict(every_third)):
        run(main())


# -- life and death of a client --------------------------------------------------------------------


def test_closing_cancels_calls_under_way(run, endpoint):
    async def main(server):
        client = AsyncClient(endpoint)
        calls = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(3)]
        await predicted(server, 3)
        await client.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, Cancelled)
            assert outcome.message == "the client was closed"
        await client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            await client.live()

    with scripted_server(endpoint, on_predict(never)) as server:
        run(main(server))


def test_closing_while_connecting(run, endpoint):
    async def main():
        client = AsyncClient(endpoint)
        call = asyncio.ensure_future(client.live())
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(Cancelled):
            await call

    run(main())


def test_a_client_that_was_never_used_closes(run, endpoint):
    async def main():
        async with AsyncClient(endpoint):
            pass

    run(main())


def test_no_file_stays_open(run, endpoint):
    async def main(server):
        before = open_files()
        async with AsyncClient(endpoint) as client:
            await client.live()
            with pytest.raises(DeadlineExceeded):
                await client.predict("m", rows(1), timeout=0.05)
        async with AsyncClient(endpoint + "2", connect_timeout=0.01) as client:
            assert not await client.live()
        client = AsyncClient(endpoint, timeout=math.inf)
        call = asyncio.ensure_future(client.predict("m", rows(1)))
        await predicted(server, 2)
        server.stop()
        with pytest.raises(Unavailable):
            await call
        await client.close()
        assert open_files() <= before

    with scripted_server(endpoint, on_predict(never)) as server:
        run(main(server))


def test_a_client_belongs_to_one_loop(endpoint):
    client = AsyncClient(endpoint, connect_timeout=0.01)
    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(client.live()) is False
        other = asyncio.new_event_loop()
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            other.run_until_complete(client.live())
        other.close()
        loop.run_until_complete(client.close())
    finally:
        loop.close()


def test_a_client_may_be_closed_after_its_loop(endpoint):
    client = AsyncClient(endpoint)
    with scripted_server(endpoint):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(client.live())
        loop.close()
        asyncio.run(client.close())
