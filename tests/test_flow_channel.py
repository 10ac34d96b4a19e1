"""Channels: in whatever order tasks run, are cancelled or close, nothing is lost, doubled or overtaken."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.flow import Channel, ChannelClosed, select
from tests.interleaving import run, turns

seeds = st.integers(0, 2**32 - 1)
# How many turns later an operation is cancelled; None for never.
patience = st.none() | st.integers(0, 6)
senders = st.lists(st.lists(patience, max_size=5), min_size=1, max_size=4)
receivers = st.lists(st.lists(patience, max_size=5), min_size=1, max_size=4)


async def attempt(operation, wait):
    """Whether an operation came to its end; cancelled after so many turns if it is given a number."""
    task = asyncio.ensure_future(operation)
    if wait is not None:
        await turns(wait)
        task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        return False
    task.result()
    return True


class Log:
    """What went in and came out, in the order in which it did."""

    def __init__(self, capacity):
        self.channel = Channel(capacity)
        self.capacity = capacity
        self.sent = []
        self.received = []

    async def send(self, item):
        await self.channel.send(item)
        self.sent.append(item)
        assert len(self.channel) <= self.capacity

    async def receive(self):
        self.received.append(await self.channel.receive())

    async def send_all(self, name, waits):
        for number, wait in enumerate(waits):
            try:
                await attempt(self.send((name, number)), wait)
            except ChannelClosed:
                assert self.channel.is_closed

    async def receive_all(self, waits):
        waits = iter(waits)
        try:
            while True:
                await attempt(self.receive(), next(waits, None))
        except ChannelClosed:
            assert self.channel.is_ended  # and not only closed


@given(seeds, st.integers(1, 3), senders, receivers, patience)
def test_what_was_sent_is_received_once_and_in_order(seed, capacity, sending, receiving, closing):
    async def main():
        log = Log(capacity)
        readers = [asyncio.ensure_future(log.receive_all(waits)) for waits in receiving]
        writers = [asyncio.ensure_future(log.send_all(name, waits)) for name, waits in enumerate(sending)]
        if closing is None:
            await asyncio.gather(*writers)
        else:
            await turns(closing)
        log.channel.close()
        await asyncio.gather(*writers, *readers)
        assert log.received == log.sent
        uncancelled = [len(waits) for waits in sending if not any(wait is not None for wait in waits)]
        if closing is None:
            assert len(log.sent) >= sum(uncancelled)
        for name in range(len(sending)):
            mine = [number for sender, number in log.sent if sender == name]
            assert mine == sorted(set(mine))

    run(main(), seed)


@given(seeds, st.integers(1, 3), senders, receivers, st.integers(0, 12))
def test_what_is_abandoned_lets_everybody_go(seed, capacity, sending, receiving, abandoning):
    async def main():
        log = Log(capacity)
        readers = [asyncio.ensure_future(log.receive_all(waits)) for waits in receiving]
        writers = [asyncio.ensure_future(log.send_all(name, waits)) for name, waits in enumerate(sending)]
        await turns(abandoning)
        log.channel.abandon()
        count = len(log.sent)
        await asyncio.gather(*writers, *readers)
        assert len(log.sent) == count
        assert log.received == log.sent[: len(log.received)]
        assert log.channel.is_ended

    run(main(), seed)


@given(seeds, st.lists(senders, min_size=1, max_size=3), receivers, st.integers(0, 3))
def test_a_select_takes_from_one_channel_and_leaves_the_others(seed, sending, receiving, abandoned):
    async def main():
        logs = [Log(1 + number % 2) for number in range(len(sending))]
        by_channel = {log.channel: log for log in logs}

        async def receive():
            channel, item = await select(*by_channel)
            by_channel[channel].received.append(item)

        async def receive_all(waits):
            waits = iter(waits)
            try:
                while True:
                    await attempt(receive(), next(waits, None))
            except ChannelClosed:
                assert all(channel.is_ended for channel in by_channel)

        async def send_all(log, writers):
            await asyncio.gather(*(log.send_all(name, waits) for name, waits in enumerate(writers)))
            log.channel.close()

        readers = [asyncio.ensure_future(receive_all(waits)) for waits in receiving]
        readers.append(asyncio.ensure_future(logs[0].receive_all([1])))  # others may receive as well
        writers = [asyncio.ensure_future(send_all(*each)) for each in zip(logs, sending, strict=True)]
        if abandoned < len(logs):
            await turns(3)
            logs[abandoned].channel.abandon()
        await asyncio.gather(*writers, *readers)
        for number, log in enumerate(logs):
            if number == abandoned:
                assert log.received == log.sent[: len(log.received)]
            else:
                assert log.received == log.sent

    run(main(), seed)


def test_a_receiver_waits_no_longer_than_for_the_first_item():
    async def main():
        channel = Channel()
        task = asyncio.ensure_future(channel.receive())
        await turns(2)
        assert not task.done()
        await channel.send(1)
        assert await task == 1

    run(main())


def test_a_sender_waits_for_room():
    async def main():
        channel = Channel(2)
        await channel.send(1)
        await channel.send(2)
        task = asyncio.ensure_future(channel.send(3))
        await turns(3)
        assert not task.done()
        assert len(channel) == 2
        assert await channel.receive() == 1
        await task
        assert [await channel.receive(), await channel.receive()] == [2, 3]

    run(main())


def test_a_receiver_that_was_woken_and_cancelled_leaves_its_item_to_the_next():
    async def main():
        channel = Channel()
        first, second = (asyncio.ensure_future(channel.receive()) for _ in range(2))
        await turns(2)
        await channel.send(1)
        first.cancel()
        assert await second == 1
        assert first.cancelled()

    run(main())


def test_a_sender_that_was_woken_and_cancelled_leaves_its_place_to_the_next():
    async def main():
        channel = Channel()
        await channel.send(0)
        first, second = (asyncio.ensure_future(channel.send(number)) for number in (1, 2))
        await turns(2)
        assert await channel.receive() == 0
        first.cancel()
        await second
        assert first.cancelled()
        assert await channel.receive() == 2

    run(main())


def test_an_item_that_another_was_woken_for_is_not_taken_from_it():
    async def main():
        channel = Channel()
        task = asyncio.ensure_future(channel.receive())
        await turns(2)
        await channel.send(1)
        assert channel.receive_nowait() is None
        assert await task == 1

    run(main())


def test_a_place_that_another_was_woken_for_is_not_taken_from_it():
    async def main():
        channel = Channel()
        await channel.send(0)
        task = asyncio.ensure_future(channel.send(1))
        await turns(2)
        assert await channel.receive() == 0
        assert not channel.send_nowait(2)
        await task
        assert await channel.receive() == 1

    run(main())


def test_the_end_of_a_channel_is_heard_when_the_last_item_is_taken():
    async def main():
        channel = Channel(3)
        for number in range(3):
            assert channel.send_nowait(number)
        assert not channel.send_nowait(3)
        channel.close()
        assert channel.is_closed
        assert not channel.is_ended
        for operation in (channel.send(4), asyncio.sleep(0, channel.send_nowait)):
            with pytest.raises(ChannelClosed):
                (await operation)(4)
        assert [item async for item in channel] == [0, 1, 2]
        with pytest.raises(ChannelClosed):
            await channel.receive()
        with pytest.raises(ChannelClosed):
            channel.receive_nowait()
        with pytest.raises(ChannelClosed):
            await select(channel)

    run(main())


def test_a_select_prefers_the_channel_named_first():
    async def main():
        urgent, usual = Channel(2), Channel(2)
        for channel in (usual, urgent):
            await channel.send("a")
            await channel.send("b")
        order = [await select(urgent, usual) for _ in range(4)]
        assert [channel for channel, _ in order] == [urgent, urgent, usual, usual]
        assert [item for _, item in order] == ["a", "b", "a", "b"]

    run(main())


def test_who_gives_up_leaves_no_waiter_behind():
    """Not one for each: a channel on which nothing ever comes is not to grow."""

    async def main():
        silent, busy = Channel(), Channel()
        for number in range(5):
            task = asyncio.ensure_future(select(silent, busy))
            await turns(2)
            await busy.send(number)
            assert await task == (busy, number)
            waiting = asyncio.ensure_future(silent.receive())
            await turns(2)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert not silent._receivers
        await silent.send(1)
        for _ in range(5):
            waiting = asyncio.ensure_future(silent.send(2))
            await turns(2)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert not silent._senders

    run(main())


def test_a_channel_holds_something():
    with pytest.raises(ValueError, match="capacity is 0; wanted 1 or more"):
        Channel(0)
