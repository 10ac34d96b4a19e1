"""Stages joined by channels. Runs in the caller's process.

A stage runs until its source ends, then ends its target. An end travels both ways: when a source is closed
and empty, the target is closed, and so on downstream; when a target is abandoned, or a stage fails or is
cancelled, its source is abandoned, and so on upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pool.flow.channel import Channel, ChannelClosed

T = TypeVar("T")
U = TypeVar("U")


async def stage(
    step: Callable[[T], Awaitable[U]], source: Channel[T], target: Channel[U], *, workers: int = 1
) -> None:
    """Take items from a source, and send what a coroutine function makes of them to a target.

    Args:
        step: Of one item.
        source: Abandoned at the end.
        target: Closed at the end.
        workers: Items that are worked on at the same time; with several, results come in any order.

    Raises:
        Exception: what `step` raises.
        ValueError: `workers` is not 1 or more.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; wanted 1 or more")

    async def work() -> None:
        async for item in source:
            await target.send(await step(item))

    await _join([source], [target], *(work() for _ in range(workers)))


async def fan_out(
    source: Channel[T], targets: Sequence[Channel[T]], choose: Callable[[T], int] | None = None
) -> None:
    """Send each item of a source to one of several targets, or to each of them.

    Args:
        source: Abandoned at the end.
        targets: Closed at the end, which comes when one of them is abandoned, too.
        choose: The place of the target that an item goes to; None for all.
    """

    async def work() -> None:
        async for item in source:
            if choose is not None:
                await targets[choose(item)].send(item)
            else:
                for target in targets:
                    await target.send(item)

    await _join([source], targets, work())


async def fan_in(sources: Sequence[Channel[T]], target: Channel[T]) -> None:
    """Send the items of several sources to one target, those of each in their order.

    Args:
        sources: Abandoned at the end.
        target: Closed at the end, when all sources have ended.
    """

    async def work(source: Channel[T]) -> None:
        async for item in source:
            await target.send(item)

    await _join(sources, [target], *map(work, sources))


async def together(*works: Coroutine[Any, Any, T]) -> list[T]:
    """What all of them return; if one raises, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _join(
    sources: Sequence[Channel[Any]], targets: Sequence[Channel[Any]], *works: Coroutine[Any, Any, None]
) -> None:
    try:
        await together(*works)
    except ChannelClosed:
        if not any(target.is_closed for target in targets):
            raise  # which a step met elsewhere; else a target was abandoned: nothing more is wanted
    finally:
        for source in sources:
            source.abandon()
        for target in targets:
            target.close()
