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

from pool import AsyncClient, Retry, wire
from pool.client import dial
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
from pool.wire import Flag, Header, Kind
from tests.scripted_server import (
    answer_properly,
    in_turn,
    never,
    on_predict,
    refuse,
    result,
    rows,
    scripted_server,
)


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


async def acquired(semaphore, count=1):
    """Wait for a server that many times."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        if not semaphore.acquire(blocking=False):
            await loop.run_in_executor(None, semaphore.acquire)


async def predicted(server, count=1):
    """Wait until the server has received that many more predictions."""
    await acquired(server.predicted, count)


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
            # Between the two, 2,000 messages are queued (ZeroMQ's defaults), and a few in the kernel.
            while not 0 < len(client._exchange._unsent) < 4500:
                await asyncio.sleep(0)
            # Of these, more were sent than there is room to tell the server of; others were not.
            given_up = calls[:1500] + calls[-500:]
            for call in given_up:
                call.cancel()
            await asyncio.sleep(0)
            assert len(client._exchange._pending) == 4000
            may_answer.set()
            for i, call in enumerate(calls[1500:-500], 1500):
                assert (await call)["x"][0, 0] == i % 251
            assert not client._exchange._unsent
            await asyncio.gather(*given_up, return_exceptions=True)

    with scripted_server(endpoint, on_predict(wait)) as server:
        try:
            run(main())
        finally:
            may_answer.set()
        assert server.kinds().count(Kind.PREDICT) <= 5500  # what was given up in time was never sent
        assert set(server.ids(Kind.CANCEL)) <= set(server.ids(Kind.PREDICT))


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


# -- giving up -------------------------------------------------------------------------------------


def test_cancelling_a_call_withdraws_its_request(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            call = asyncio.ensure_future(client.predict("m", rows(1)))
            await predicted(server)
            header = server.requests[-1]
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert client._exchange._pending == {}
            await acquired(server.cancelled)
            assert server.ids(Kind.CANCEL) == [header.id]
            server.say(result(header, [bytes(12)]))  # finds nobody
            assert await client.live()

    with scripted_server(endpoint, on_predict(never)) as server:
        run(main(server))


def test_a_timeout_withdraws_the_request(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            calls = [client.predict("m", rows(1), timeout=t) for t in (0.05, 30, 0.05)]
            server.answer = on_predict(lambda h, t: answer_properly(h, t) if h.millis > 1000 else None)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in outcomes] == [DeadlineExceeded, dict, DeadlineExceeded]
            await acquired(server.cancelled, 2)
            predicts = server.ids(Kind.PREDICT)
            assert sorted(server.ids(Kind.CANCEL)) == [predicts[0], predicts[2]]

    with scripted_server(endpoint) as server:
        run(main(server))


def test_a_storm_of_cancellations_withdraws_what_was_sent_and_nothing_else(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            server.answer = on_predict(never)
            sent = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(500)]
            await predicted(server, 500)
            unsent = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(500)]
            await asyncio.sleep(0)
            assert len(client._exchange._unsent) == 500
            for call in sent + unsent:
                call.cancel()
            outcomes = await asyncio.gather(*sent, *unsent, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in outcomes)
            assert client._exchange._pending == {}
            server.answer = answer_properly
            np.testing.assert_array_equal((await client.predict("m", rows(2)))["y"], rows(2))
            predicts = server.ids(Kind.PREDICT)
            assert len(predicts) == 501
            assert sorted(server.ids(Kind.CANCEL)) == predicts[:500]

    with scripted_server(endpoint) as server:
        run(main(server))


def test_what_was_given_up_before_a_server_was_there_is_never_heard_of(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            with pytest.raises(DeadlineExceeded, match=rf"no answer from {endpoint} within 0\.01 s"):
                await client.predict("m", rows(1), timeout=0.01)
            call = asyncio.ensure_future(client.models())
            await asyncio.sleep(0)
            call.cancel()
            with scripted_server(endpoint) as server:
                assert await client.live()
                assert server.kinds() == [Kind.LIVE]

    run(main())


def test_what_is_given_up_as_the_server_is_met_is_never_heard_of(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            call = asyncio.ensure_future(client.models())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with scripted_server(endpoint) as server:
                (connection,) = client._exchange._dial.connections
                while not connection.is_connected():  # the loop stands still meanwhile
                    connection.monitor.poll(10)
                call.cancel()
                await asyncio.sleep(0)
                client._exchange._on_dialled()  # as the loop does, in the same turn
                assert await client.live()
                assert server.kinds() == [Kind.LIVE]

    run(main())


def test_an_answer_that_came_in_time_is_not_withdrawn(run, endpoint):
    async def main(server):
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            for _ in range(10):
                call = asyncio.ensure_future(client.predict("m", rows(1)))
                await asyncio.sleep(0)
                while client._exchange._pending:
                    await asyncio.sleep(0)
                call.cancel()  # its answer is there; the task has not seen it yet
                await asyncio.gather(call, return_exceptions=True)
            assert await client.live()
            assert server.ids(Kind.CANCEL) == []

    with scripted_server(endpoint) as server:
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


# -- trying again ----------------------------------------------------------------------------------

QUICK = Retry(first_pause=0.001, longest_pause=0.002)
STOPPING = Unavailable("the server is stopping")


def test_what_was_refused_is_tried_again_with_what_remains_of_the_time(run, endpoint):
    full = refuse(Overloaded("full", retry_after_ms=20))

    async def main():
        async with AsyncClient(endpoint, retry=QUICK, timeout=30) as client:
            outputs = await client.predict("m", rows(1), priority=2)
            np.testing.assert_array_equal(outputs["y"], rows(1))

    with scripted_server(endpoint, in_turn(full, full, answer_properly)) as server:
        run(main())
        predicts = [each for each in server.requests if each.kind is Kind.PREDICT]
        first, second, third = (each.millis for each in predicts)
        assert 30_000 - 20 >= first - 20 >= second >= third + 20
        assert [each.priority for each in predicts] == [2, 2, 2]


def test_priorities_travel_in_bundles_of_their_own(run, endpoint):
    async def main():
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            priorities = [None, None, 0, 0, 3, 3]
            await asyncio.gather(*(client.predict("m", rows(1), priority=each) for each in priorities))

    with scripted_server(endpoint) as server:
        run(main())
        seen = [(each.flags, each.priority) for each in server.requests if each.kind is Kind.PREDICT]
        assert seen == [(0, 0)] * 2 + [(Flag.PRIORITY, 0)] * 2 + [(Flag.PRIORITY, 3)] * 2


def test_the_signature_is_asked_for_again_too(run, endpoint):
    left = [Unavailable("model 'm' is loading")] * 2

    def loading(header, tensors):
        return [[wire.encode_error(header.id, left.pop())]] if left else answer_properly(header, tensors)

    async def main():
        async with AsyncClient(endpoint) as client:
            await client.predict("m", rows(1), retry=QUICK)

    with scripted_server(endpoint, loading) as server:
        run(main())
        assert server.kinds() == [Kind.SIGNATURE] * 3 + [Kind.PREDICT]


def test_a_call_that_fails_after_all_says_how_often_it_was_tried(run, endpoint):
    async def main():
        async with AsyncClient(endpoint, retry=QUICK) as client:
            with pytest.raises(Overloaded, match=r"^full; gave up after 5 attempts over [\d.]+ s$") as caught:
                await client.predict("m", rows(1))
            assert caught.value.retry_after_ms == 1
            assert isinstance(caught.value.__cause__, Overloaded)
            with pytest.raises(Overloaded, match=r"^full$"):
                await client.predict("m", rows(1), retry=Retry(attempts=1))

    with scripted_server(endpoint, refuse(Overloaded("full", retry_after_ms=1))) as server:
        run(main())
        assert server.kinds().count(Kind.PREDICT) == 6


def test_attempts_end_with_the_timeout(run, endpoint):
    endless = Retry(attempts=1_000_000, first_pause=0.01, longest_pause=0.01)

    async def main():
        async with AsyncClient(endpoint) as client:
            await client.signature("m")
            with pytest.raises((Overloaded, DeadlineExceeded), match="gave up after") as caught:
                await client.predict("m", rows(1), timeout=0.2, retry=endless)
            assert isinstance(caught.value.__cause__, Overloaded)

    with scripted_server(endpoint, refuse(Overloaded("full"))) as server:
        run(main())
        left = [each.millis for each in server.requests if each.kind is Kind.PREDICT]
        assert left == sorted(left, reverse=True)
        assert 1 <= left[-1] < left[0] <= 200


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_pause_can_be_ended(run, endpoint, how):
    slow = Retry(first_pause=3600, longest_pause=3600)

    async def main(server):
        async with AsyncClient(endpoint, timeout=math.inf, retry=slow) as client:
            call = asyncio.ensure_future(client.predict("m", rows(1)))
            await predicted(server)
            while client._exchange._pending:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            if how == "close":
                await client.close()
                with pytest.raises(Cancelled):
                    await call
            else:
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await client.live()
                assert server.ids(Kind.CANCEL) == []

    with scripted_server(endpoint, refuse(Overloaded("full", retry_after_ms=3_600_000))) as server:
        run(main(server))


# -- several servers -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Let no pause of a busy machine decide which endpoint is used."""
    monkeypatch.setattr(dial, "_AVOID_S", 3600.0)
    monkeypatch.setattr(dial, "_GRACE_S", 3600.0)


@contextlib.asynccontextmanager
async def client_of_two(prefix, first_answer, **kwargs):
    """A client connected to the first of two servers; the second, which came later, answers properly."""
    endpoints = [prefix + "1", prefix + "2"]
    with scripted_server(endpoints[0]) as first:
        async with AsyncClient(endpoints, **kwargs) as client:
            await client.signature("m")
            first.answer = first_answer
            with scripted_server(endpoints[1]) as second:
                yield client, first, second


def stopping_after(count):
    """A script that answers no prediction; all after so many are refused, since the server stops."""
    return in_turn(*[never] * count, refuse(STOPPING))


def test_a_server_that_stops_is_left_and_what_it_admitted_is_waited_for(run, endpoint):
    async def main():
        async with client_of_two(endpoint, stopping_after(3), retry=QUICK) as (client, first, second):
            admitted = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(3)]
            await predicted(first, 3)
            headers = first.requests[-3:]
            # Refused there, all at once, they are tried again here.
            await asyncio.gather(*(client.predict("m", rows(1)) for _ in range(20)))
            await client.predict("m", rows(1))
            assert len(first.ids(Kind.PREDICT)) == 23
            assert len(second.ids(Kind.PREDICT)) == 21
            assert not any(call.done() for call in admitted)
            assert list(client._exchange._retired.values()) == [{header.id for header in headers}]
            for i, header in enumerate(headers):
                first.say(result(header, [(rows(1) + np.float32(i)).tobytes()]))
            for i, outputs in enumerate(await asyncio.gather(*admitted)):
                np.testing.assert_array_equal(outputs["y"], rows(1) + i)
            assert client._exchange._retired == {}
            await client.predict("m", rows(1))
            assert len(second.ids(Kind.PREDICT)) == 22

    before = open_files()
    run(main())
    assert open_files() <= before


def test_what_a_stopping_server_never_answers_ends_with_it(run, endpoint):
    async def main():
        async with client_of_two(endpoint, stopping_after(2)) as (client, first, second):
            admitted = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(2)]
            await predicted(first, 2)
            with pytest.raises(Unavailable, match=r"^the server is stopping$"):
                await client.predict("m", rows(1))
            await client.predict("m", rows(1))
            await asyncio.get_running_loop().run_in_executor(None, first.stop)
            for outcome in await asyncio.gather(*admitted, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
                assert f"the server at {first.endpoint} went away" in outcome.message
            assert client._exchange._retired == {}
            await client.predict("m", rows(1))
            assert second.kinds() == [Kind.PREDICT] * 2

    run(main())


def test_what_is_given_up_is_withdrawn_from_the_server_that_has_it(run, endpoint):
    async def main():
        async with client_of_two(endpoint, stopping_after(3)) as (client, first, second):
            cancelled = asyncio.ensure_future(client.predict("m", rows(1)))
            late = asyncio.ensure_future(client.predict("m", rows(1), timeout=0.2))
            held = asyncio.ensure_future(client.predict("m", rows(1)))
            await predicted(first, 3)
            with pytest.raises(Unavailable):
                await client.predict("m", rows(1))
            await client.predict("m", rows(1))
            cancelled.cancel()
            with pytest.raises(DeadlineExceeded, match=f"no answer from {first.endpoint} within"):
                await late
            await acquired(first.cancelled, 2)
            assert first.ids(Kind.CANCEL) == first.ids(Kind.PREDICT)[:2]
            assert await client.live()
            assert second.kinds() == [Kind.PREDICT, Kind.LIVE]
            held.cancel()
            while client._exchange._retired:
                await asyncio.sleep(0)
            assert await client.live()

    run(main())


def test_without_a_policy_the_next_call_goes_elsewhere(run, endpoint):
    async def main():
        async with client_of_two(endpoint, refuse(STOPPING)) as (client, first, second):
            with pytest.raises(Unavailable, match=r"^the server is stopping$"):
                await client.predict("m", rows(1))
            await client.predict("m", rows(1))
            assert client._exchange._retired == {}
            assert second.kinds() == [Kind.PREDICT]
            assert first.kinds() == [Kind.SIGNATURE, Kind.PREDICT]

    run(main())


def test_a_server_that_is_gone_is_left_for_another(run, endpoint):
    async def main():
        async with client_of_two(endpoint, on_predict(never), retry=QUICK) as (client, first, second):
            calls = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(20)]
            await predicted(first, 20)
            await asyncio.get_running_loop().run_in_executor(None, first.stop)
            for outputs in await asyncio.gather(*calls):
                np.testing.assert_array_equal(outputs["y"], rows(1))
            assert second.kinds() == [Kind.PREDICT] * 20

    run(main())


def test_a_server_that_is_unavailable_is_used_if_there_is_no_other(run, endpoint, monkeypatch):
    monkeypatch.setattr(dial, "_GRACE_S", 0.01)

    async def main(server):
        async with AsyncClient([endpoint + "2", endpoint], retry=QUICK) as client:
            with pytest.raises(Unavailable, match="stopping; gave up after 5 attempts"):
                await client.predict("m", rows(1))
            assert server.kinds() == [Kind.SIGNATURE] + [Kind.PREDICT] * 5
            server.answer = answer_properly
            await client.predict("m", rows(1))

    with scripted_server(endpoint, refuse(STOPPING)) as server:
        run(main(server))


def test_where_all_are_unavailable_calls_do_not_hurry_from_one_to_the_next(run, endpoint):
    async def main():
        async with client_of_two(endpoint, refuse(STOPPING), retry=QUICK) as (client, first, second):
            second.answer = refuse(STOPPING)
            calls = [client.predict("m", rows(1)) for _ in range(20)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(each, Unavailable) for each in outcomes)
            assert len(first.ids(Kind.PREDICT)) == 20
            assert len(second.ids(Kind.PREDICT)) == 80
            second.answer = answer_properly
            await client.predict("m", rows(1))
            assert client._exchange._connection.endpoint == second.endpoint

    run(main())


def test_endpoints_change_under_load_without_a_failed_call(run, endpoint):
    async def main():
        async with client_of_two(endpoint, answer_properly, retry=QUICK) as (client, first, second):
            calls = [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(300)]
            await predicted(first, 100)
            first.answer = refuse(STOPPING)
            calls += [asyncio.ensure_future(client.predict("m", rows(1))) for _ in range(300)]
            for outputs in await asyncio.gather(*calls):
                np.testing.assert_array_equal(outputs["y"], rows(1))
            assert client._exchange._pending == {}
            assert Kind.PREDICT in second.kinds()

    run(main())


# -- servers that talk nonsense --------------------------------------------------------------------


def damaged(header: Header) -> dict[str, list[list[bytes]]]:
    return {
        "no header": [[b"HTTP/1.1 400 Bad Request\r\n\r\n"]],
        "another version": [[b"pl\x02" + wire.encode_error(header.id, Overloaded("x"))[3:]]],
        "a request": [[wire.encode_header(Header(Kind.LIVE, header.id, b""))]],
        "no tensor": [result(header, [])],
        "no table": [[wire.head(Kind.ERROR, Flag.BUNDLE) + wire.encode_error(0, Overloaded("x"))[8:]]],
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
    "no table",
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


def test_refusals_come_in_bundles_too(run, endpoint):
    waiting = []

    def refuse_by_threes(header, _tensors):
        waiting.append(header.id)
        if len(waiting) % 3:
            return None
        alone = wire.encode_error(0, Overloaded("full", retry_after_ms=7))
        table = b"".join(wire.PART.pack(id_, 0, 0) for id_ in waiting[-3:])
        return [[wire.head(Kind.ERROR, Flag.BUNDLE) + alone[wire.HEAD_BYTES :], table]]

    async def main():
        async with AsyncClient(endpoint) as client:
            calls = [client.predict("m", rows(1)) for _ in range(9)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Overloaded)
                assert outcome.retry_after_ms == 7
            assert await client.live()

    with scripted_server(endpoint, on_predict(refuse_by_threes)):
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
