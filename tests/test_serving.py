"""Batches that a worker has ahead of the one it runs: whatever becomes of the worker, they run once.

Real workers of the drill backend. One that got SIGSTOP stands for one that is busy, for as long as the test
likes; batches are of one row, so each is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import numpy as np
import pytest

from pool import Pool, errors
from pool.backends import drill
from pool.backends.drill import Fault
from pool.embedded.calls import Calls

X = np.arange(4, dtype=np.float32).reshape(1, 4)
ANSWER = drill.answer(X, 1)
PATIENCE_S = 40.0


def row(fault=Fault.NONE):
    return {"x": X, "fault": np.full(1, fault, np.int32), "argument": np.zeros(1, np.float32)}


def run(tmp_path, scenario, **settings):
    """`scenario(pool)` with a model `m` of batches of one row."""
    (tmp_path / "drill.toml").write_text("row_items = 4")
    lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
    file = tmp_path / "pool.toml"
    file.write_text(f'[models.m]\nbackend = "drill"\npath = "{tmp_path}"\nmax_batch_size = 1\n{lines}')

    async def main():
        async with Pool.from_file(file) as pool:
            await scenario(pool)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


async def figures(pool):
    return (await pool.status())["models"]["m"]


async def that(condition):
    while not await condition():
        await asyncio.sleep(0.005)


async def queued(pool, rows):
    """Wait until so many rows are admitted that no worker is known to have begun with."""

    async def condition():
        return (await figures(pool))["queue_rows"] == rows

    await that(condition)


@contextlib.asynccontextmanager
async def stopped(pool):
    """All workers are; gives their pids. Those that are left go on afterwards."""
    pids = [worker["pid"] for worker in (await figures(pool))["workers"]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def ask(pool, *rows, **options):
    return [asyncio.create_task(pool.predict("m", each, **options)) for each in rows]


async def answers(calls):
    for answer in await asyncio.gather(*calls):
        assert np.array_equal(answer["y"], ANSWER)


def test_an_idle_worker_takes_what_another_has_ahead(tmp_path):
    async def scenario(pool):
        async with stopped(pool) as (first, _):
            calls = ask(pool, *[row()] * 4)
            await queued(pool, 2)
            os.kill(first, signal.SIGCONT)

            async def condition():
                return sum(call.done() for call in calls) == 3

            await that(condition)
            assert (await figures(pool))["queue_rows"] == 0
        await answers(calls)
        assert (await figures(pool))["rows"] == 4

    run(tmp_path, scenario, workers=2)


def test_what_was_ahead_of_a_worker_that_died_runs_though_nothing_may_run_twice(tmp_path):
    async def scenario(pool):
        async with stopped(pool):
            (guilty,) = ask(pool, row(Fault.SEGFAULT))
            await asyncio.sleep(0)
            others = ask(pool, row(), row())
            await queued(pool, 2)
        with pytest.raises(errors.WorkerLost, match="SIGSEGV"):
            await guilty
        await answers(others)

    run(tmp_path, scenario, retry="false")


def test_rows_that_expired_ahead_never_start(tmp_path):
    async def scenario(pool):
        async with stopped(pool):
            calls = ask(pool, row())
            await queued(pool, 0)
            (late,) = ask(pool, row(), timeout=0.05)
            with pytest.raises(errors.DeadlineExceeded):
                await late
            await queued(pool, 0)
        await answers([*calls, *ask(pool, row())])
        assert (await figures(pool))["rows"] == 2

    run(tmp_path, scenario)


def test_a_worker_that_leaves_runs_what_it_has_ahead(tmp_path):
    async def scenario(pool):
        async with stopped(pool):
            calls = ask(pool, row(), row())
            await queued(pool, 1)
            leaving = asyncio.create_task(pool.stop())
            await asyncio.sleep(0)
        await answers(calls)
        await leaving

    run(tmp_path, scenario)


def test_of_batches_that_would_all_be_too_late_only_the_last_runs(tmp_path):
    async def scenario(pool):
        async with stopped(pool):
            calls = ask(pool, row(), row())  # of which one runs and one is ahead
            await queued(pool, 1)
            late, last = ask(pool, row(), row())
            await queued(pool, 3)
            forecast = pool._engine.models["m"].serving.generation.batcher._forecast
            forecast.done_at = lambda *_: time.monotonic() + 1e6
        with pytest.raises(errors.Overloaded, match="would answer too late"):
            await late
        await answers([*calls, last])
        assert (await figures(pool))["rows"] == 3

    run(tmp_path, scenario)


def test_a_defect_while_answers_are_sent_costs_no_slot_and_is_told(tmp_path, monkeypatch, caplog):
    async def scenario(pool):
        send = Calls.send_results

        def fail(*_):
            monkeypatch.setattr(Calls, "send_results", send)
            raise ZeroDivisionError

        for _ in range(4):  # more often than there are slots
            monkeypatch.setattr(Calls, "send_results", fail)
            (call,) = ask(pool, row())
            with pytest.raises(errors.InternalError, match="ZeroDivisionError while the answer was sent"):
                await call
        await answers(ask(pool, row()))

    run(tmp_path, scenario, slots=2)
    caplog.clear()  # its tracebacks have views of slots
