"""`Pool` in this process: what a client gets of a server, it gets too; and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvloop
import zmq

from pool import AsyncClient, Client, Pool, PoolError, Retry, errors
from pool.backends import drill
from pool.backends.drill import Fault
from pool.client.reply import SLICED_BYTES
from pool.client.route import COPY_BYTES
from pool.config import load_config
from pool.front import replicas
from tests import models

PATIENCE_S = 40.0


@pytest.fixture(autouse=True)
def _workers_that_hang_are_killed_soon(monkeypatch):
    monkeypatch.setattr(replicas, "_STOP_GRACE_S", 0.2)


# -- the same calls, embedded and remote -----------------------------------------------------------

MODELS = """
[models.linear]
path = "{names}"
max_batch_size = 8
slots = 4

[models.text]
path = "{strings}"
slots = 2
max_rows_bytes = 4096

[models.whole]
path = "{fixed_rows}"
slots = 2

[models.root]
path = "{raising}"
slots = 4
max_batch_size = 16

[models.many]
path = "{signatures}"
slots = 4

[models.double]
path = "{unknown_dims}"
slots = 4
max_rows_bytes = 4194304
"""
NAMES = ("names", "strings", "fixed_rows", "raising", "signatures", "unknown_dims")


def floats(*shape):
    return np.random.default_rng(len(shape)).random(shape, np.float32)


def linear(rows):
    return {name: floats(rows) + i for i, name in enumerate(("zeta", "b", "alpha"))}


CALLS = {
    "several inputs": lambda p: p.predict("linear", linear(2)),
    "some outputs, in their order": lambda p: p.predict("linear", linear(2), outputs=["y", "a"]),
    "no rows": lambda p: p.predict("linear", linear(0)),
    "more rows than a batch holds": lambda p: p.predict("linear", linear(20)),
    "more rows than there are": lambda p: p.predict("linear", linear(25)),
    "unequal rows": lambda p: p.predict("linear", linear(2) | {"b": floats(3)}),
    "missing": lambda p: p.predict("linear", {"b": floats(2)}),
    "unknown": lambda p: p.predict("linear", linear(2) | {"c": floats(2)}),
    "bare for several": lambda p: p.predict("linear", floats(2)),
    "version": lambda p: p.predict("linear", linear(1), version=1),
    "other version": lambda p: p.predict("linear", linear(1), version=2),
    "no version": lambda p: p.predict("linear", linear(1), version=-1),
    "no name": lambda p: p.predict(5, linear(1)),
    "other model": lambda p: p.predict("other", linear(1)),
    "other signature": lambda p: p.predict("linear", linear(1), signature="other"),
    "no outputs": lambda p: p.predict("linear", linear(1), outputs=[]),
    "one name for outputs": lambda p: p.predict("linear", linear(1), outputs="y"),
    "other output": lambda p: p.predict("linear", linear(1), outputs=["q"]),
    "bare": lambda p: p.predict("root", floats(3)),
    "bare, again": lambda p: p.predict("root", floats(4)),
    "sole in a dict": lambda p: p.predict("root", {"x": floats(1)}),
    "sole under another name": lambda p: p.predict("root", {"z": floats(1)}),
    "numbers": lambda p: p.predict("root", [1, 4]),
    "not contiguous": lambda p: p.predict("root", floats(9)[::3]),
    "a row without its axis": lambda p: p.predict("root", np.float32(1)),
    "another rank": lambda p: p.predict("root", floats(2, 2)),
    "a lossy cast": lambda p: p.predict("root", np.ones(2)),
    "a lossy cast that is asked for": lambda p: p.predict("root", np.ones(2), cast="same_kind"),
    "no cast": lambda p: p.predict("root", floats(2), cast="other"),
    "a priority": lambda p: p.predict("root", floats(2), priority=3),
    "no priority": lambda p: p.predict("root", floats(2), priority=4),
    "no time": lambda p: p.predict("root", floats(2), timeout=0),
    "any time": lambda p: p.predict("root", floats(2), timeout=math.inf),
    "what the model refuses": lambda p: p.predict("root", -floats(1)),
    "a full batch": lambda p: p.predict("root", floats(16)),
    "strings": lambda p: p.predict("text", {"text": ["å", b"b\0", ""]}),
    "string of one output": lambda p: p.predict("text", ["ab"], outputs=["upper"]),
    "many strings": lambda p: p.predict("text", [b"x" * 60] * 60),
    "whole tensors": lambda p: p.predict("whole", floats(1, 3)),
    "whole tensors of another shape": lambda p: p.predict("whole", floats(2, 3)),
    "signature": lambda p: p.predict("many", floats(2, 2), signature="double"),
    "no inputs": lambda p: p.predict("many", {}, signature="nothing"),
    "another row shape": lambda p: p.predict("double", floats(2, 5, 7)),
    "and another": lambda p: p.predict("double", floats(2, 7, 5)),
    "large rows": lambda p: p.predict("double", floats(3, 120, 120)),
    "tell of a model": lambda p: p.signature("linear"),
    "tell of another": lambda p: p.signature("other"),
    "tell of a version": lambda p: p.signature("linear", 2),
    "tell of no model": lambda p: p.signature(None),
    "tell in no time": lambda p: p.signature("linear", timeout=-1),
    "models": lambda p: p.models(),
    "live": lambda p: p.live(),
    "ready": lambda p: p.ready(),
    "one is ready": lambda p: p.ready("linear"),
    "another is ready": lambda p: p.ready("other"),
}


@pytest.fixture(scope="module")
def both(start_server, tmp_path_factory):
    """Runs a function of a predictor with a client of a server, and with a pool; gives both outcomes."""
    folder = tmp_path_factory.mktemp("both")
    text = MODELS.format(**{name: models.path(name) for name in NAMES})
    with start_server(folder, text) as server:
        loop = asyncio.new_event_loop()
        pool = Pool.from_file(server.config)
        client = AsyncClient(server.endpoint)
        loop.run_until_complete(pool.start())

        async def outcome(call, predictor):
            try:
                return await call(predictor)
            except PoolError as e:
                return type(e), e.message, e.retry_after_ms

        def run(call):
            return [loop.run_until_complete(outcome(call, predictor)) for predictor in (client, pool)]

        yield run
        loop.run_until_complete(client.close())
        loop.run_until_complete(pool.close())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_pool_answers_as_a_server_does(both, call):
    remote, embedded = both(call)
    if not isinstance(remote, dict) or not all(isinstance(value, np.ndarray) for value in remote.values()):
        assert embedded == remote
        return
    assert list(embedded) == list(remote)
    for name, array in embedded.items():
        assert array.dtype == remote[name].dtype
        np.testing.assert_array_equal(array, remote[name])
        assert array.flags.writeable
        assert array.flags.c_contiguous
        array[...] = array  # and it is the caller's


def test_the_status_says_the_same_of_both(both):
    remote, embedded = both(lambda p: p.predict("root", floats(1) - 1))
    assert remote[0] is embedded[0] is errors.ModelError
    remote, embedded = both(lambda p: p.status())
    assert embedded["models"].keys() == remote["models"].keys()
    for name, model in embedded["models"].items():
        assert model.keys() == remote["models"][name].keys()
    of_a_server = {"authorized_keys", "last_errors", "lines", "refused_connections", "regions", "reload"}
    assert remote["front"].keys() - embedded["front"].keys() == of_a_server
    assert embedded["front"]["pid"] == os.getpid()
    assert embedded["front"]["requests"] == remote["front"]["requests"]
    for key in ("requests", "clients", "replies", "dropped_replies"):
        assert isinstance(embedded["front"][key], int)
    assert embedded["front"]["errors"]["MODEL_ERROR"] == remote["front"]["errors"]["MODEL_ERROR"]


def test_answers_that_came_together_are_each_their_own(both):
    async def call(predictor):
        inputs = [floats(1 + i % 3) + np.float32(i) for i in range(200)]
        answers = await asyncio.gather(
            *(predictor.predict("root", x, retry=Retry(attempts=99)) for x in inputs)
        )
        for x, answer in zip(inputs, answers, strict=True):
            np.testing.assert_allclose(answer["y"], np.sqrt(x), rtol=1e-6)
            answer["y"][...] = -1  # which is nobody else's
        return [len(answer["y"]) for answer in answers]

    remote, embedded = both(call)
    assert remote == embedded


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_a_prediction_tells_where_its_time_went(both, rows):
    def call(predictor):
        return predictor.predict("root", floats(rows), timeline=True)

    for answer in both(call):
        np.testing.assert_allclose(answer["y"], np.sqrt(floats(rows)), rtol=1e-6)
        timeline = answer.timeline
        assert timeline.is_one_clock
        assert min(timeline.stages.values()) >= 0
        assert timeline.total_ns == sum(timeline.stages.values()) > timeline.model_ns
        assert (timeline.worker, timeline.batch_rows) == ((0, rows) if rows < 40 else (-1, 0))
    assert timeline.inbound_ns == 0  # of the pool: nothing lies between


def test_large_answers_that_came_together_share_no_memory(both):
    side = 60
    assert 4 * side * side * 8 > SLICED_BYTES
    assert 4 * side * side < COPY_BYTES

    async def call(predictor):
        inputs = [floats(1, side, side) + np.float32(i) for i in range(8)]
        answers = await asyncio.gather(*(predictor.predict("double", x) for x in inputs))
        for x, answer in zip(inputs, answers, strict=True):
            (array,) = answer.values()
            np.testing.assert_array_equal(array, x * 2)
            whole = array if array.base is None else array.base
            assert memoryview(whole).nbytes == x.nbytes  # not that of the batch

    both(call)


# -- pools of the drill backend --------------------------------------------------------------------

X = np.arange(4, dtype=np.float32).reshape(1, 4)
ANSWER = drill.answer(X, 1)


def row(fault=Fault.NONE, argument=0.0, rows=1):
    x = np.resize(X, (rows, 4))
    return {"x": x, "fault": np.full(rows, fault, np.int32), "argument": np.full(rows, argument, np.float32)}


@pytest.fixture
def folder():
    # Not tmp_path: its name may be longer than the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        yield Path(directory)


@pytest.fixture
def config(folder):
    """Writes a configuration with a drill model `m`; keywords are keys of its table."""

    def write(server="", **settings):
        (folder / "drill.toml").write_text("row_items = 4")
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        file = folder / "pool.toml"
        table = f'[models.m]\nbackend = "drill"\npath = "{folder}"\n{lines}'
        file.write_text(f"[server]\n{server}\n{table}")
        return file

    return write


def descriptors():
    """Those of this process; but uvloop keeps one of its own for pipes."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target != "/dev/null":
                found.append((name, target))
    return sorted(found)


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
on_both_loops = pytest.mark.parametrize("run", LOOPS, indirect=True)


@pytest.fixture
def run(request):
    """Runs a coroutine to its end; nothing may be reported to the loop, nor any descriptor be left."""

    def run(coroutine):
        loop = LOOPS[getattr(request, "param", "asyncio")]()
        loop.run_until_complete(asyncio.sleep(0))  # loops have descriptors of their own
        zmq.Frame(bytes(1), copy=False, copy_threshold=0)  # and pyzmq's collector, once it was used
        before = descriptors()
        reports = []
        loop.set_exception_handler(lambda _loop, context: reports.append(context))
        try:
            value = loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE_S))
            gc.collect()  # a future that was dropped with an exception reports when it is collected
            loop.run_until_complete(asyncio.sleep(0))
            assert asyncio.all_tasks(loop) == set()
            assert descriptors() == before
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        assert reports == []
        return value

    return run


async def that(condition):
    """Wait until an asynchronous condition holds; it asks the pool, which takes its time."""
    while not await condition():
        await asyncio.sleep(0.005)


async def figures(pool, model="m"):
    return (await pool.status(timeout=PATIENCE_S))["models"][model]


class Stopped:
    """`async with`: the worker of `m` holds the batch it has, and takes no other."""

    def __init__(self, pool):
        self.pool = pool

    async def __aenter__(self):
        (worker,) = (await figures(self.pool))["workers"]
        self.pid = worker["pid"]
        os.kill(self.pid, signal.SIGSTOP)

    async def __aexit__(self, *_):
        os.kill(self.pid, signal.SIGCONT)


async def queued(pool, rows):
    """Wait until so many rows wait for a worker."""

    async def condition():
        return (await figures(pool))["queue_rows"] == rows

    await that(condition)


@on_both_loops
def test_it_starts_answers_and_leaves(run, config):
    async def main():
        async with Pool.from_file(config()) as pool:
            assert await pool.live()
            assert await pool.ready("m")
            answers = await asyncio.gather(*(pool.predict("m", row()) for _ in range(100)))
            assert all(np.array_equal(answer["y"], ANSWER) for answer in answers)
            assert {int(answer["pid"][0]) for answer in answers} != {os.getpid()}
            used = await figures(pool)
            assert used["rows"] == 100
            assert used["batches"] < 100  # what is asked for in one turn of the loop runs together
        with pytest.raises(errors.Cancelled, match="the pool is closed"):
            await pool.predict("m", row())
        with pytest.raises(errors.Cancelled):
            await pool.live()
        await pool.close()
        assert await pool.stop()

    run(main())


def test_a_pool_that_is_not_started_is_unavailable(run, config):
    async def main():
        pool = Pool.from_file(config())
        assert not await pool.live()
        assert not await pool.ready()
        for call in (pool.predict("m", row()), pool.models(), pool.status(), pool.serve()):
            with pytest.raises(errors.Unavailable, match="the pool is not started"):
                await call
        await pool.close()
        with pytest.raises(errors.Cancelled):
            await pool.start()

    run(main())


def test_what_cannot_be_a_pool_is_said_before_anything_starts(folder, config):
    with pytest.raises(errors.InvalidInput, match="cast is 'any'"):
        Pool.from_file(config(), cast="any")
    with pytest.raises(errors.DeadlineExceeded):
        Pool.from_file(config(), timeout=0)
    with pytest.raises(errors.ConfigError, match="workers"):
        Pool.from_file(config(workers=0))
    with pytest.raises(errors.ConfigError, match="file"):
        Pool.from_file(folder / "nowhere.toml")


def test_it_belongs_to_one_loop_and_starts_once(config):
    async def main():
        async with Pool.from_file(config()) as pool:
            with pytest.raises(RuntimeError, match="started already"):
                await pool.start()
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, pool.predict("m", row()))
            assert (await pool.predict("m", row()))["y"].tolist() == ANSWER.tolist()

    asyncio.run(main())


def test_what_was_given_up_is_counted_as_by_a_server(config):
    """Once, whether a worker had begun it or not, and of the model and the whole."""

    async def main():
        async with Pool.from_file(config(max_batch_size=1)) as pool:
            (worker,) = (await pool.status())["models"]["m"]["workers"]
            os.kill(worker["pid"], signal.SIGSTOP)
            try:
                calls = [asyncio.create_task(pool.predict("m", row())) for _ in range(3)]
                while not (await pool.status())["models"]["m"]["queue_rows"]:
                    await asyncio.sleep(0)
                for call in calls[:2]:
                    call.cancel()
                await asyncio.wait(calls[:2])
            finally:
                os.kill(worker["pid"], signal.SIGCONT)
            assert (await calls[2])["y"].tolist() == ANSWER.tolist()
            status = await pool.status()
            assert status["models"]["m"]["answers"] == {"OK": 1, "CANCELLED": 2}
            assert status["front"]["errors"] == {"CANCELLED": 2}

    asyncio.run(main())


def test_the_application_keeps_its_signals_and_its_logging(config):
    async def main():
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        handlers = list(logging.getLogger().handlers)
        async with Pool.from_file(config()):
            after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
            assert after == before
            assert logging.getLogger().handlers == handlers

    asyncio.run(main())


def test_a_model_that_does_not_load_leaves_nothing(run, config):
    async def main():
        file = config()
        (file.parent / "drill.toml").write_text("row_items = 0")
        with pytest.raises(errors.ModelLoadError, match="row_items"):
            async with Pool.from_file(file):
                raise AssertionError("it does not come to this")

    run(main())


@on_both_loops
def test_a_start_that_is_given_up_leaves_nothing(run, config):
    async def main():
        for _ in range(2):
            task = asyncio.create_task(Pool.from_file(config()).start())
            await asyncio.sleep(0.05)  # a zygote takes longer
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        pool = Pool.from_file(config())
        task = asyncio.create_task(pool.start())
        await asyncio.sleep(0.05)
        await pool.close()
        with pytest.raises(errors.Cancelled, match="the pool was closed"):
            await task

    run(main())


@on_both_loops
def test_an_exception_inside_leaves_nothing_and_comes_through(run, config):
    async def main():
        calls = []

        async def application():
            async with Pool.from_file(config()) as pool:
                calls.extend(asyncio.create_task(pool.predict("m", row(Fault.HANG))) for _ in range(3))
                await asyncio.sleep(0)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await application()
        for call in calls:
            with pytest.raises(errors.Cancelled, match="the pool was closed"):
                await call

    run(main())


def test_a_task_that_is_cancelled_while_it_closes_leaves_nothing(run, config):
    async def main():
        pool = Pool.from_file(config())
        await pool.start()
        closes = [asyncio.create_task(pool.close()) for _ in range(2)]
        await asyncio.sleep(0)
        closes[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await closes[0]
        assert closes[1].done() or not await asyncio.wait([closes[1]], timeout=0)[1]
        await closes[1]

    run(main())


def test_stopping_finishes_what_is_admitted(run, config):
    async def main():
        async with Pool.from_file(config()) as pool:
            async with Stopped(pool):
                first = asyncio.create_task(pool.predict("m", row()))
                await asyncio.sleep(0)
                stop = asyncio.create_task(pool.stop())
                await asyncio.sleep(0)
                with pytest.raises(errors.Unavailable, match="stopping"):
                    await pool.predict("m", row())
                assert not await pool.ready()
            assert await stop
            assert (await first)["y"].tolist() == ANSWER.tolist()

    run(main())


def test_stopping_does_not_wait_for_ever(run, config):
    async def main():
        async with Pool.from_file(config()) as pool:
            call = asyncio.create_task(pool.predict("m", row(Fault.HANG)))
            await asyncio.sleep(0)
            assert not await pool.stop(timeout=0.01)
            with pytest.raises(errors.Cancelled):
                await call

    run(main())


@on_both_loops
def test_a_cancelled_call_leaves_no_row_in_the_arena(run, config):
    async def main():
        async with Pool.from_file(config(max_batch_size=4, slots=5, max_inflight_rows=20)) as pool:
            async with Stopped(pool):
                running = asyncio.create_task(pool.predict("m", row(rows=4)))
                await asyncio.sleep(0)  # it is placed
                await asyncio.sleep(0)  # and dispatched
                waiting = [asyncio.create_task(pool.predict("m", row(rows=n))) for n in (1, 2, 3, 7)]
                await queued(pool, 13)
                with pytest.raises(errors.Overloaded):
                    await pool.predict("m", row(rows=8))
                for call in waiting:
                    call.cancel()
                await asyncio.wait(waiting)
                assert all(call.cancelled() for call in waiting)
                assert (await figures(pool))["queue_rows"] == 0
                rest = asyncio.create_task(pool.predict("m", row(rows=16)))  # all there is
                await asyncio.sleep(0)
                running.cancel()
            assert len((await rest)["y"]) == 16
            assert (await pool.predict("m", row(rows=20)))["y"].shape == (20, 4)

    run(main())


@on_both_loops
def test_a_call_cancelled_in_the_turn_of_its_answer_is_cancelled(run, config):
    async def main():
        async with Pool.from_file(config()) as pool:
            for turns in range(12):
                call = asyncio.create_task(pool.predict("m", row()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                call.cancel()
                await asyncio.wait([call])
                assert call.cancelled() or call.result()["y"].tolist() == ANSWER.tolist()
            await queued(pool, 0)

    run(main())


def test_a_call_cancelled_when_its_answer_is_there_drops_it(run, config):
    async def main():
        async with Pool.from_file(config()) as pool:
            call = asyncio.create_task(pool.predict("m", row()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # its batch is with the worker
            call.cancel()
            time.sleep(0.05)  # the loop hears of the answer before the rows can be withdrawn
            await asyncio.wait([call])
            assert call.cancelled()
            assert (await pool.predict("m", row()))["y"].tolist() == ANSWER.tolist()

    run(main())


def test_the_application_is_one_client_of_several(run, config):
    async def main():
        async with Pool.from_file(config(max_batch_size=8, slots=4, max_inflight_rows=3)) as pool:
            async with Stopped(pool):
                calls = [asyncio.create_task(pool.predict("m", row())) for _ in range(3)]
                await asyncio.sleep(0)
                with pytest.raises(errors.Overloaded, match="it has 3 of at most 3"):
                    await pool.predict("m", row())
            await asyncio.gather(*calls)
            await pool.predict("m", row(rows=3))

    run(main())


def test_a_call_without_a_timeout_has_that_of_the_model(run, config):
    async def main():
        async with Pool.from_file(config(request_timeout_ms=20), timeout=math.inf) as pool:
            with pytest.raises(errors.DeadlineExceeded):
                await pool.predict("m", row(Fault.HANG))

    run(main())


@on_both_loops
def test_a_timeout_passes_while_a_request_waits_or_runs(run, config):
    async def main():
        async with Pool.from_file(config(max_batch_size=1), timeout=0.05) as pool:
            async with Stopped(pool):
                calls = [pool.predict("m", row(), timeout=0.02) for _ in range(3)]
                for outcome in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(outcome, errors.DeadlineExceeded)
                assert (await figures(pool))["queue_rows"] == 0
            with pytest.raises(errors.DeadlineExceeded):
                await pool.predict("m", row(Fault.HANG))  # within the pool's own timeout
            with pytest.raises(errors.DeadlineExceeded):
                await pool.status(timeout=1e-9)

    run(main())


def test_requests_of_a_higher_priority_go_first(run, config):
    async def main():
        settings = {"max_batch_size": 1, "priority_ageing_ms": 3_600_000}
        async with Pool.from_file(config(**settings)) as pool:
            done = []

            async def call(priority):
                await pool.predict("m", row(), priority=priority)
                done.append(priority)

            async with Stopped(pool):
                tasks = [asyncio.create_task(call(None))]
                await asyncio.sleep(0.01)  # it runs
                tasks += [asyncio.create_task(call(priority)) for priority in (3, 2, 1, 0)]
                await queued(pool, 4)
            await asyncio.gather(*tasks)
            assert done == [None, 0, 1, 2, 3]

    run(main())


def test_a_retry_waits_for_room(run, config):
    async def main():
        settings = {"max_batch_size": 1, "slots": 2, "max_inflight_rows": 2}
        async with Pool.from_file(config(**settings), retry=Retry(attempts=100, first_pause=0.01)) as pool:
            async with Stopped(pool):
                calls = [asyncio.create_task(pool.predict("m", row(), timeout=30)) for _ in range(6)]
                await asyncio.sleep(0)
                with pytest.raises(errors.Overloaded):
                    await pool.predict("m", row(), retry=Retry(attempts=1))
                with pytest.raises(errors.Overloaded, match="gave up after 2 attempts"):
                    await pool.predict("m", row(), retry=Retry(attempts=2, first_pause=1e-4))
            for answer in await asyncio.gather(*calls):
                assert answer["y"].tolist() == ANSWER.tolist()
            hangs = [asyncio.create_task(pool.predict("m", row(Fault.HANG))) for _ in range(2)]
            await asyncio.sleep(0)
            calls = [*hangs, *(asyncio.create_task(pool.predict("m", row())) for _ in range(3))]
            await asyncio.sleep(0.01)
            await pool.close()  # ends the pauses too
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, errors.Cancelled)

    run(main())


def test_one_bad_row_fails_alone(run, config):
    async def main():
        async with Pool.from_file(config(max_batch_size=8)) as pool:
            faults = [Fault.RAISE, Fault.NONE, Fault.EXIT, Fault.NONE, Fault.NONE]
            outcomes = await asyncio.gather(
                *(pool.predict("m", row(fault, 3)) for fault in faults), return_exceptions=True
            )
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds == [errors.ModelError, dict, errors.WorkerLost, dict, dict]
            # A request that killed its worker is refused at the door.
            with pytest.raises(errors.WorkerLost, match="the same request came before"):
                await pool.predict("m", row(Fault.EXIT, 3))
            assert (await pool.predict("m", row()))["y"].tolist() == ANSWER.tolist()

    run(main())


def test_an_error_of_many_is_an_error_each(run, config):
    async def main():
        async with Pool.from_file(config(retry="false")) as pool:
            calls = (pool.predict("m", row(fault)) for fault in (Fault.RAISE, 0, 0))
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {errors.ModelError}
            assert len({id(outcome) for outcome in outcomes}) == 3
            assert (await pool.status())["front"]["errors"] == {"MODEL_ERROR": 3}

    run(main())


def test_a_model_whose_workers_cannot_start_again_is_unavailable(run, config):
    async def main():
        async with Pool.from_file(config()) as pool:
            file = config()
            (file.parent / "drill.toml").unlink()
            (worker,) = (await figures(pool))["workers"]
            os.kill(worker["pid"], signal.SIGKILL)

            async def is_failed():
                return (await figures(pool))["state"] == "failed"

            await that(is_failed)
            assert not await pool.ready("m")
            with pytest.raises(errors.Unavailable, match="model 'm' is failed"):
                await pool.predict("m", row())

    run(main())


# -- serving others --------------------------------------------------------------------------------


@on_both_loops
def test_it_serves_its_models_to_others(run, config, folder):
    async def main():
        file = config(max_batch_size=4)
        endpoint = f"ipc://{folder}/s"
        async with Pool.from_file(file) as pool:
            assert await pool.serve(endpoint) == (endpoint,)
            async with AsyncClient(endpoint) as client:
                assert await client.ready()
                assert (await client.signature("m")) == (await pool.signature("m"))
                answer = await client.predict("m", row())
                assert answer["y"].tolist() == ANSWER.tolist()
                async with Stopped(pool):
                    first = asyncio.create_task(pool.predict("m", row()))
                    await asyncio.sleep(0.01)
                    calls = [asyncio.create_task(each.predict("m", row(rows=2))) for each in (client, pool)]
                    await queued(pool, 4)
                await asyncio.gather(first, *calls)
                used = await figures(pool)
                assert used["batch_sizes"].get("4") == 1  # one batch of both
                front = (await client.status())["front"]
                assert front["endpoints"] == [endpoint]
                own = (await pool.status())["front"]
                assert front["clients"] == own["clients"] == 1
                assert own["endpoints"] == [endpoint]
                assert np.array_equal((await asyncio.to_thread(ask, endpoint))["y"], ANSWER)
                # The application is nothing that a command could reload with a signal.
                reload = await asyncio.to_thread(
                    subprocess.run,
                    [sys.executable, "-m", "pool", "reload", "--endpoint", endpoint],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert reload.returncode == 2
                assert "embeds its pool" in reload.stderr
                # A pool that closes answers what its clients wait for.
                call = asyncio.create_task(client.predict("m", row(Fault.HANG)))
                await that_busy(pool)
                await pool.close()
                with pytest.raises(errors.Unavailable):
                    await call
        assert not (folder / "s").exists()

    run(main())


async def that_busy(pool):
    async def condition():
        (worker,) = (await figures(pool))["workers"]
        return worker["state"] == "busy"

    await that(condition)


def ask(endpoint):
    with Client(endpoint) as client:
        return client.predict("m", row())


def test_an_endpoint_that_cannot_be_bound_changes_nothing(run, config, folder):
    async def main():
        (folder / "file").touch()
        async with Pool.from_file(config(f'endpoints = ["ipc://{folder}/s"]')) as pool:
            with pytest.raises(errors.ConfigError, match="not a socket"):
                await pool.serve([f"ipc://{folder}/other", f"ipc://{folder}/file"])
            assert not (folder / "other").exists()
            with pytest.raises(errors.ConfigError, match="wanted ipc:"):
                await pool.serve("http://somewhere")
            assert (await pool.predict("m", row()))["y"].tolist() == ANSWER.tolist()
            assert await pool.serve() == (f"ipc://{folder}/s",)
            async with AsyncClient(f"ipc://{folder}/s") as client:
                await client.predict("m", row())
            await pool.predict("m", row())

    run(main())


# -- what it costs those who do not use it ----------------------------------------------------------


def test_a_client_imports_no_front():
    program = """
import sys
import pool
pool.AsyncClient, pool.Client, pool.Predictor
import pool.client.aio
assert not [name for name in sys.modules if name.startswith(("pool.front", "pool.embedded", "uvloop"))]
pool.Pool
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_pool_uses_the_configuration_it_is_given(run, config):
    async def main():
        async with Pool(load_config(config())) as pool:
            assert list(await pool.models()) == ["m"]

    run(main())


def test_threads_of_the_application_go_on(config):
    """The pool blocks nothing: a timer of the application is in time while models load."""

    async def main():
        beats = 0
        stop = threading.Event()

        async def beat():
            nonlocal beats
            while not stop.is_set():
                beats += 1
                await asyncio.sleep(0.01)

        task = asyncio.create_task(beat())
        async with Pool.from_file(config()):
            assert beats > 1
        stop.set()
        await task

    asyncio.run(main())
