"""Stages joined by channels: every item through, few of them on the way, and ends that travel both ways."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.flow import Channel, ChannelClosed, fan_in, fan_out, stage
from pool.flow.stages import together
from tests.interleaving import run, turns

seeds = st.integers(0, 2**32 - 1)


async def feed(channel, items):
    for item in items:
        await channel.send(item)
    channel.close()


async def drain(channel):
    return [item async for item in channel]


@given(seeds, st.integers(1, 3), st.integers(0, 12), st.integers(1, 3))
def test_every_item_goes_through_all_stages(seed, capacity, count, workers):
    async def double(item):
        await turns(item % 3)
        return 2 * item

    async def main():
        first, second, third = (Channel(capacity) for _ in range(3))
        *_, results = await asyncio.gather(
            feed(first, range(count)),
            stage(double, first, second, workers=workers),
            stage(double, second, third),
            drain(third),
        )
        assert Counter(results) == Counter(range(0, 4 * count, 4))
        if workers == 1:
            assert results == sorted(results)

    run(main(), seed)


@given(seeds, st.integers(1, 3), st.integers(0, 12), st.integers(1, 4))
def test_items_of_one_key_stay_in_order_however_wide_the_fan(seed, capacity, count, width):
    async def main():
        source, target = Channel(capacity), Channel(capacity)
        legs = [Channel(capacity) for _ in range(width)]
        *_, results = await asyncio.gather(
            feed(source, range(count)),
            fan_out(source, legs, lambda item: item % width),
            fan_in(legs, target),
            drain(target),
        )
        assert sorted(results) == list(range(count))
        for key in range(width):
            mine = [item for item in results if item % width == key]
            assert mine == sorted(mine)

    run(main(), seed)


@given(seeds, st.integers(1, 4))
def test_a_fan_without_a_choice_gives_each_target_every_item(seed, width):
    async def main():
        source = Channel()
        targets = [Channel() for _ in range(width)]
        _, _, *results = await asyncio.gather(
            feed(source, range(5)), fan_out(source, targets), *map(drain, targets)
        )
        assert results == [[0, 1, 2, 3, 4]] * width

    run(main(), seed)


@given(seeds, st.integers(1, 3), st.integers(1, 3))
def test_a_consumer_that_is_stuck_stops_the_producer(seed, capacity, workers):
    """Memory is bounded: what is under way is what the channels and the workers hold, and no more."""
    made = 0

    async def produce(channel):
        nonlocal made
        while True:
            await channel.send(made)
            made += 1

    async def same(item):
        return item

    async def main():
        first, second, third = (Channel(capacity) for _ in range(3))
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                produce(first),
                stage(same, first, second, workers=workers),
                fan_out(second, [third]),
            )
        ]
        assert await third.receive() is not None  # one, and then it is stuck
        await asyncio.sleep(1)  # everybody else has come to a halt by then
        before = made
        await asyncio.sleep(1000)
        assert made == before <= 1 + 3 * capacity + workers + 1
        third.abandon()  # which sets all of them free
        with pytest.raises(ChannelClosed):
            await tasks[0]
        await asyncio.gather(*tasks[1:])

    run(main(), seed)


@given(seeds, st.integers(1, 3), st.integers(0, 4))
def test_a_stage_that_fails_ends_what_is_before_and_behind_it(seed, workers, when):
    async def fail(item):
        if item == when:
            raise ZeroDivisionError
        await turns(item)
        return item

    async def main():
        source, target = Channel(), Channel(10)
        feeding = asyncio.ensure_future(feed(source, range(10)))
        with pytest.raises(ZeroDivisionError):
            await stage(fail, source, target, workers=workers)
        with pytest.raises(ChannelClosed):
            await feeding
        assert source.is_ended
        assert len(await drain(target)) <= when + workers

    run(main(), seed)


def test_a_stage_has_a_worker():
    """Without one it would end at once, and drop what is in its source."""

    async def main():
        source = Channel()
        await source.send(1)
        with pytest.raises(ValueError, match="workers is 0; wanted 1 or more"):
            await stage(asyncio.sleep, source, Channel(), workers=0)
        assert await source.receive() == 1

    run(main())


def test_a_step_that_meets_the_end_of_another_channel_fails_as_by_any_error():
    async def main():
        source, other, target = Channel(), Channel(), Channel()
        other.close()

        async def step(_):
            return await other.receive()

        await source.send(1)
        with pytest.raises(ChannelClosed):
            await stage(step, source, target)
        assert source.is_closed
        assert target.is_ended

    run(main())


@given(seeds, st.integers(0, 6))
def test_a_stage_that_is_cancelled_ends_what_is_before_and_behind_it(seed, when):
    async def same(item):
        begun.set()
        await turns(1)
        return item

    begun = asyncio.Event()

    async def main():
        source, target = Channel(), Channel()
        feeding = asyncio.ensure_future(feed(source, range(1_000_000)))
        draining = asyncio.ensure_future(drain(target))
        staging = asyncio.ensure_future(stage(same, source, target, workers=2))
        await begun.wait()  # what is cancelled before that never was a stage
        await turns(when)
        staging.cancel()
        await asyncio.wait([staging])
        assert staging.cancelled()
        with pytest.raises(ChannelClosed):
            await feeding
        await draining

    run(main(), seed)


@given(seeds)
def test_of_works_together_one_that_fails_cancels_the_others(seed):
    async def main():
        begun, ended = [], []

        async def wait(name):
            begun.append(name)
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(name)

        async def fail():
            await turns(3)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await together(wait("a"), fail(), wait("b"))
        assert sorted(ended) == sorted(begun)
        assert await together(asyncio.sleep(2, "c"), asyncio.sleep(1, "d")) == ["c", "d"]

    run(main(), seed)
