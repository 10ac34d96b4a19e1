"""An event loop that runs what is ready in any order, on a clock of its own: for tests of interleavings.

A seed gives one order; the same seed gives it again. Time passes only when nothing is ready, and then at
once. Where nothing is ready and nothing is timed either, the tasks wait for each other for ever: that fails.
"""

from __future__ import annotations

import asyncio
import gc
import random
import selectors
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Shuffled(deque[Any]):
    """Ready callbacks, taken from anywhere."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance

    def popleft(self) -> Any:
        self.rotate(-self._chance.randrange(len(self)))
        return super().popleft()


class _Selector(selectors.SelectSelector):
    """Waits for time alone, which passes at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "all tasks wait for each other"
        self.now += max(timeout, 0.0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, seed: int | None) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        if seed is not None:
            self._ready = _Shuffled(random.Random(seed))

    def time(self) -> float:
        return self._virtual.now


def run(coroutine: Coroutine[Any, Any, T], seed: int | None = None) -> T:
    """Run a coroutine to its end; no task may be left, and nothing be reported to the loop.

    Args:
        coroutine: To run.
        seed: Of the order; None for the usual one.
    """
    loop = _Loop(seed)
    reports: list[Any] = []
    loop.set_exception_handler(lambda _, context: reports.append(context))
    try:
        value = loop.run_until_complete(coroutine)
        left = asyncio.all_tasks(loop)
        gc.collect(0)
        assert not left, left
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    assert reports == []
    return value


async def turns(count: int) -> None:
    """Let others run, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)
