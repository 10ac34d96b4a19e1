"""Pipelines: each user's messages in order, one at a time, and what befalls one befalls no other."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import Cancelled, DeadlineExceeded, Overloaded
from pool.flow import Pipeline, Pipelines, Step, each, fork
from tests.interleaving import run, turns

seeds = st.integers(0, 2**32 - 1)


async def note(pipeline, message):
    """A step that takes its time, and keeps what it had in the state."""
    await turns(message % 3)
    pipeline.state.append(message)
    return message


async def double(_, message):
    await turns(1)
    return 2 * message


async def divide(_, message):
    return 12 // message


async def nap(pipeline, message):
    await asyncio.sleep(message)
    return pipeline.remaining()


def test_a_message_goes_through_all_steps():
    async def main():
        step = Step(note) | Step(double) | Step(double)
        pipeline = Pipeline(step, "ann", [])
        assert pipeline.is_idle
        assert await pipeline.send(1) == 4
        assert (pipeline.key, pipeline.state) == ("ann", [1])
        assert await (step | Step(double))(pipeline, 2) == 16  # a step may be called by another
        assert await pipeline.send(3) == 12

    run(main())


def test_a_fork_goes_all_ways_at_the_same_time():
    async def main():
        loop = asyncio.get_running_loop()
        step = fork(Step(nap), Step(double), Step(double) | Step(nap))
        pipeline = Pipeline(step, "ann", None)
        assert await pipeline.send(2) == (None, 4, None)
        assert loop.time() == 4
        failing = Pipeline(fork(Step(nap), Step(divide)), "ann", None)
        with pytest.raises(ZeroDivisionError):
            await failing.send(0)
        assert loop.time() == 4
        assert failing.is_idle

    run(main())


def test_each_of_several_messages_goes_through_at_the_same_time():
    async def main():
        loop = asyncio.get_running_loop()
        pipeline = Pipeline(each(Step(nap)), "ann", None)
        assert await pipeline.send([3, 1, 2]) == [None] * 3
        assert loop.time() == 3
        with pytest.raises(TypeError):
            await pipeline.send([5, "no time"])
        assert loop.time() == 3
        assert pipeline.is_idle
        assert await Pipeline(each(Step(double)), "ann", None).send([3, 1, 2]) == [6, 2, 4]
        assert await pipeline.send([]) == []

    run(main())


whens = st.floats(0, 2)
sendings = st.lists(st.tuples(st.integers(0, 3), whens, st.none() | st.floats(0, 0.05)), max_size=40)


@given(seeds, sendings)
def test_messages_of_one_user_follow_each_other_in_order(seed, sendings):
    """Whatever others do, and whichever messages are cancelled."""

    async def main():
        begun, done, answered = {}, {}, set()

        def leg(name):
            async def work(pipeline, number):
                await asyncio.sleep(0.01 * (number % 3))
                done.setdefault(pipeline.key, []).append((number, name))
                return number

            return Step(work)

        pipelines = Pipelines(leg(0) | leg(1) | leg(2), lambda _: None)

        async def answer(number, user):
            begun.setdefault(user, []).append(number)
            assert await pipelines.send(user, number) == number
            answered.add(number)

        async def send(number, user, at, cancelled_after):
            await asyncio.sleep(at)
            task = asyncio.ensure_future(answer(number, user))
            if cancelled_after is not None:
                await asyncio.sleep(cancelled_after)
                task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.result() is None

        await asyncio.gather(*(send(number, *each) for number, each in enumerate(sendings)))
        for user, numbers in begun.items():
            legs = {number: [name for n, name in done.get(user, []) if n == number] for number in numbers}
            for number, names in legs.items():
                assert names == [0, 1, 2][: len(names)]
                assert number not in answered or names == [0, 1, 2]
            expected = [(number, name) for number in numbers for name in legs[number]]
            assert done.get(user, []) == expected
            assert (await pipelines.get(user)).is_idle
        uncancelled = {number for number, (_, _, cancelled) in enumerate(sendings) if cancelled is None}
        assert uncancelled <= answered
        await pipelines.close()

    run(main(), seed)


def test_who_sends_again_at_once_comes_behind_who_waits():
    async def main():
        pipeline = Pipeline(Step(note), "ann", [])

        async def send(*numbers):
            for number in numbers:
                await pipeline.send(number)

        await asyncio.gather(send(1, 3, 5), send(2, 4))
        assert pipeline.state == [1, 2, 3, 4, 5]

    run(main())


def test_a_step_that_fails_fails_its_own_message():
    async def main():
        pipelines = Pipelines(Step(note) | Step(divide), lambda _: [])
        questions = [pipelines.send(user, number) for user in "ab" for number in (3, 0, 4)]
        a1, a2, a3, *b = await asyncio.gather(*questions, return_exceptions=True)
        assert (a1, a3) == (4, 3)
        assert isinstance(a2, ZeroDivisionError)
        assert [type(each) for each in b] == [int, ZeroDivisionError, int]
        assert (await pipelines.get("a")).state == [3, 0, 4]  # kept as it is
        await pipelines.close()

    run(main())


def test_a_deadline_counts_the_wait_and_is_known_to_the_steps():
    async def main():
        loop = asyncio.get_running_loop()
        pipeline = Pipeline(Step(nap), "ann", None)
        first = asyncio.ensure_future(pipeline.send(5, timeout=6))
        await turns(2)
        with pytest.raises(DeadlineExceeded, match="not done within 2 s"):
            await pipeline.send(0, timeout=2)
        assert loop.time() == 2
        second = asyncio.ensure_future(pipeline.send(1, timeout=6))
        assert await first == 1
        assert await second == 2
        with pytest.raises(DeadlineExceeded):
            await pipeline.send(3, timeout=1)
        assert loop.time() == 7
        assert await pipeline.send(1) is None
        assert pipeline.is_idle

    run(main())


def test_a_user_who_floods_is_refused():
    async def main():
        pipelines = Pipelines(Step(nap), lambda _: None, backlog=2)
        under_way = [asyncio.ensure_future(pipelines.send("ann", 1)) for _ in range(3)]
        await turns(2)
        with pytest.raises(Overloaded, match="2 messages of 'ann' wait already"):
            await pipelines.send("ann", 1)
        under_way[1].cancel()
        await turns(2)
        under_way.append(asyncio.ensure_future(pipelines.send("ann", 1)))
        outcomes = await asyncio.gather(*under_way, return_exceptions=True)
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "NoneType",
            "CancelledError",
            *2 * ["NoneType"],
        ]
        await pipelines.close()

    run(main())


def test_who_may_not_wait_does_not():
    async def main():
        pipeline = Pipeline(Step(nap), "ann", None, backlog=0)
        under_way = asyncio.ensure_future(pipeline.send(1))
        await turns(2)
        with pytest.raises(Overloaded, match="0 messages of 'ann' wait already"):
            await pipeline.send(1)
        await under_way
        assert await pipeline.send(1) is None

    run(main())


def test_a_closed_pipeline_finishes_its_message_and_takes_no_other():
    async def main():
        saved = {}

        async def save(key, state):
            await turns(2)
            saved[key] = state

        async def count(pipeline, message):
            await asyncio.sleep(message)
            pipeline.state[0] += 1
            return pipeline.state[0]

        def restore(key):
            return [saved.get(key, [0])[0]]

        pipelines = Pipelines(Step(count), restore, save=save, idle_s=10)
        assert await pipelines.send("ann", 1) == 1
        pipeline = await pipelines.get("ann")
        under_way, waiting = [asyncio.ensure_future(pipelines.send("ann", 5)) for _ in range(2)]
        await turns(2)
        assert len(pipelines) == 1
        closing = asyncio.ensure_future(pipelines.close())
        assert await under_way == 2
        with pytest.raises(Cancelled, match="the pipeline of 'ann' is closed"):
            await waiting
        await closing
        assert saved == {"ann": [2]}
        with pytest.raises(Cancelled):
            await pipeline.send(1)
        assert await pipelines.send("ann", 1) == 3  # another one, with what was saved
        await asyncio.sleep(11)
        assert "ann" not in pipelines
        assert saved == {"ann": [3]}

    run(main())
