"""`within`: a limit on a block that is neither overlooked nor mistaken for somebody else's cancel."""

from __future__ import annotations

import asyncio
import sys

import pytest

from pool.errors import DeadlineExceeded
from pool.flow import within
from tests.interleaving import run


def test_what_takes_too_long_is_cancelled():
    async def main():
        loop = asyncio.get_running_loop()
        ended = []

        async def work():
            with within(2.0) as limit:
                assert limit.deadline == loop.time() + 2.0
                try:
                    await asyncio.sleep(3)
                finally:
                    ended.append(loop.time())

        with pytest.raises(DeadlineExceeded, match="not done within 2 s"):
            await work()
        assert ended == [2.0]
        await asyncio.sleep(10)  # and nothing is left to come

    run(main())


def test_what_is_done_in_time_is_left_alone():
    async def main():
        with within(2.0):
            await asyncio.sleep(1)
        with within(None) as limit:
            await asyncio.sleep(100)
            assert limit.deadline is None
        with pytest.raises(ZeroDivisionError), within(2.0):
            raise ZeroDivisionError
        await asyncio.sleep(10)

    run(main())


def test_no_time_at_all_is_too_little():
    async def main():
        for timeout in (0, -1):
            with pytest.raises(DeadlineExceeded, match="wanted more than 0 s"), within(timeout):
                raise AssertionError("it does not come to this")

    run(main())


def test_limits_within_limits():
    async def main():
        with pytest.raises(DeadlineExceeded, match="not done within 2 s"), within(2.0), within(5.0):
            await asyncio.sleep(10)
        with within(5.0):
            with pytest.raises(DeadlineExceeded, match="not done within 2 s"), within(2.0):
                await asyncio.sleep(10)
            await asyncio.sleep(1)

    run(main())


def test_a_cancel_from_elsewhere_stays_a_cancel():
    async def work():
        with within(2.0):
            await asyncio.sleep(10)

    async def main():
        task = asyncio.ensure_future(work())
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not count their cancels before Python 3.11")
def test_a_cancel_at_the_same_time_stays_a_cancel():
    async def work():
        with within(2.0):
            await asyncio.sleep(10)

    async def main():
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_at(2.0, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()

    run(main())
