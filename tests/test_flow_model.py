"""Predictions as steps: with a predictor of the test's own for orders and clocks, and with real pools."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import ModelError, Overloaded, Pool, errors
from pool.backends import drill
from pool.backends.drill import Fault
from pool.client.core import ModelInfo
from pool.flow import Model, Pipeline, Pipelines, Step
from tests.interleaving import run, turns

seeds = st.integers(0, 2**32 - 1)
ROOM = 3


class Desk:
    """Predicts that all is as it was, after a second; has room for so many at the same time."""

    def __init__(self, room=ROOM):
        self.room = room
        self.under_way = self.most = 0
        self.asked = 0
        self.timeouts = []

    async def predict(self, _model, inputs, **keywords):
        if self.under_way == self.room:
            raise Overloaded("no room")
        self.timeouts.append(keywords["timeout"])
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(1)
            return inputs
        finally:
            self.under_way -= 1

    async def signature(self, model):
        self.asked += 1
        await asyncio.sleep(1)
        if model != "m":
            raise errors.ModelNotFound(f"no model {model!r}")
        return ModelInfo(model, 1, (), self.room)


@given(seeds, st.integers(1, 12), st.lists(st.floats(0, 6) | st.none(), max_size=12), st.booleans())
def test_as_many_are_under_way_as_there_is_room_for(seed, users, cancels, knows):
    async def main():
        desk = Desk()
        model = Model(desk, "m", in_flight=ROOM if knows else None)
        pipelines = Pipelines(model.predict() | model.predict(), lambda _: None)

        async def send(user, cancelled_after):
            task = asyncio.ensure_future(pipelines.send(user, user))
            if cancelled_after is not None:
                await asyncio.sleep(cancelled_after)
                task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.result() == user

        after = dict(enumerate(cancels))
        await asyncio.gather(*(send(user, after.get(user)) for user in range(users)))
        assert desk.under_way == 0
        assert desk.most <= ROOM
        assert desk.asked <= 1 - knows  # once for all
        if all(after.get(user) is None for user in range(users)):
            assert desk.most == min(ROOM, users)
        again = [pipelines.send(user, user) for user in range(ROOM + 1)]  # no place was lost
        assert await asyncio.gather(*again) == list(range(ROOM + 1))
        await pipelines.close()

    run(main(), seed)


def test_a_place_that_one_was_given_and_cancelled_goes_to_the_next():
    async def main():
        model = Model(Desk(), "m", in_flight=1)

        async def cancel_next(_, message):  # in the turn in which the next one is given the place
            if message == 0:
                tasks[1].cancel()
            return message

        pipelines = Pipelines(model.predict() | Step(cancel_next), lambda _: None)
        tasks = [asyncio.ensure_future(pipelines.send(user, user)) for user in range(3)]
        assert await tasks[0] == 0
        assert await tasks[2] == 2
        assert tasks[1].cancelled()
        await pipelines.close()

    run(main())


def test_one_prediction_at_least_may_be_under_way():
    """With none allowed all would wait for ever."""
    for in_flight in (0, -1):
        with pytest.raises(ValueError, match=f"in_flight is {in_flight}; wanted 1 or more"):
            Model(Desk(), "m", in_flight=in_flight)


def test_the_timeout_of_a_prediction_is_what_remains_of_the_message():
    async def main():
        desk = Desk()
        pipeline = Pipeline(Model(desk, "m", in_flight=1).predict(), "ann", None)
        assert await pipeline.send("x", timeout=5) == "x"
        assert await pipeline.send("x") == "x"
        assert desk.timeouts == [5, None]

    run(main())


def test_what_is_not_known_of_a_model_is_an_error_for_each():
    async def main():
        model = Model(Desk(), "other")
        pipelines = Pipelines(model.predict(), lambda _: None)
        outcomes = await asyncio.gather(*(pipelines.send(n, n) for n in range(3)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {errors.ModelNotFound}
        assert len({id(outcome) for outcome in outcomes}) == 3
        await pipelines.close()

    run(main())


# -- with workers ----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    (tmp_path / "drill.toml").write_text("row_items = 1")
    file = tmp_path / "pool.toml"
    file.write_text(f'[models.m]\nbackend = "drill"\npath = "{tmp_path}"\nmax_batch_size = 8\nslots = 5\n')
    return file


def row(value, fault=Fault.NONE):
    return {
        "x": np.full((1, 1), value, np.float32),
        "fault": np.full(1, fault, np.int32),
        "argument": np.zeros(1, np.float32),
    }


def answer(value):
    return float(drill.answer(np.full(1, value, np.float32), 1)[0])


async def ask(_, message):
    return row(*message) if isinstance(message, tuple) else row(message)


async def read(pipeline, outputs):
    value = float(outputs["y"][0, 0])
    if pipeline.state is not None:
        pipeline.state.append(value)
    return value


async def figures(pool):
    return (await pool.status())["models"]["m"]


def test_many_users_share_batches_and_each_is_answered_in_order(config):
    users, messages = 200, 5

    async def main():
        async with Pool.from_file(config) as pool:
            model = Model(pool, "m")
            step = Step(ask) | model.predict() | Step(read) | Step(ask) | model.predict() | Step(read)
            pipelines = Pipelines(step, lambda _: [])

            async def user(name):
                for number in range(messages):
                    value = name * messages + number
                    assert await pipelines.send(name, value) == answer(answer(value))

            await asyncio.gather(*(user(name) for name in range(users)))
            for name in range(users):
                values = [name * messages + number for number in range(messages)]
                expected = [each for value in values for each in (answer(value), answer(answer(value)))]
                assert (await pipelines.get(name)).state == expected
            used = await figures(pool)
            assert used["rows"] == 2 * users * messages
            assert used["rows"] / used["batches"] > 4
            await pipelines.close()

    asyncio.run(main())


def test_a_message_cancelled_at_any_step_leaves_no_row(config):
    async def main():
        async with Pool.from_file(config) as pool:
            gates = [asyncio.Event() for _ in range(2)]

            def pause(number):
                async def wait(_, message):
                    await gates[number].wait()
                    return message

                return Step(wait)

            model = Model(pool, "m", in_flight=4)
            step = pause(0) | Step(ask) | model.predict() | pause(1) | Step(read)
            pipelines = Pipelines(step, lambda _: None)
            (worker,) = (await figures(pool))["workers"]

            async def cancel(tasks, rows):
                """Cancel when so many rows wait or run; then none is there."""
                while (await figures(pool))["queue_rows"] != rows:
                    await asyncio.sleep(0.005)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                assert all(task.cancelled() for task in tasks)
                assert (await figures(pool))["queue_rows"] == 0

            def send():
                return [asyncio.ensure_future(pipelines.send(user, user)) for user in range(6)]

            await cancel(send(), 0)  # in the first step
            gates[0].set()
            os.kill(worker["pid"], signal.SIGSTOP)
            try:
                blocker = asyncio.ensure_future(pool.predict("m", row(0)))
                await asyncio.sleep(0.01)
                await cancel(send(), 4)  # four wait for the worker, two for room
                blocker.cancel()
            finally:
                os.kill(worker["pid"], signal.SIGCONT)
            tasks = send()
            await turns(2)
            while (await figures(pool))["queue_rows"] or model._free != 4:
                await asyncio.sleep(0.005)
            await cancel(tasks, 0)  # in the third
            gates[1].set()
            assert await asyncio.gather(*send()) == [answer(user) for user in range(6)]
            assert (await pool.predict("m", {name: np.repeat(x, 32, 0) for name, x in row(1).items()}))[
                "y"
            ].size
            await pipelines.close()

    asyncio.run(main())


def test_a_row_that_fails_fails_its_own_pipeline(config):
    async def main():
        async with Pool.from_file(config) as pool:
            pipelines = Pipelines(Step(ask) | Model(pool, "m").predict() | Step(read), lambda _: None)
            messages = [0, 1, (2, Fault.RAISE), 3, (4, Fault.EXIT), 5]
            outcomes = await asyncio.gather(
                *(pipelines.send(number, message) for number, message in enumerate(messages)),
                return_exceptions=True,
            )
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds == [float, float, ModelError, float, errors.WorkerLost, float]
            assert await pipelines.send(2, 7) == answer(7)
            with pytest.raises(errors.DeadlineExceeded):
                await pipelines.send(0, (0, Fault.HANG), timeout=0.05)
            await pipelines.close()

    asyncio.run(main())


def test_flows_import_neither_client_nor_front():
    program = """
import sys
import pool.flow
loaded = ("pool.client", "pool.front", "pool.embedded", "pool.wire", "numpy", "zmq")
assert not [name for name in sys.modules if name.startswith(loaded)]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
