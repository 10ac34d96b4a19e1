"""Keeping the front's event loop awake for what is about to come. Runs in the front.

To be woken costs tens of microseconds where a core has gone idle meanwhile, and finds its caches cold: with
one request at a time, most of an answer's time. So the loop is kept turning while something is expected
that came quickly the last time: the answer of a batch, or, with none running, the next request. What took
longer than `awake_s` the last time is waited for asleep, so that slow models, rare requests and an idle
server cost nothing. Every turn lets whoever else wants the core go first. Workers do the same
(`pool.shm.doorbell.Vigil`).
"""

from __future__ import annotations

import asyncio
import enum
import os
import time
from collections.abc import Callable


class Event(enum.IntEnum):
    """What may be waited for."""

    REQUEST = 0
    ANSWER = 1


class Awake:
    """Decides when to keep an event loop turning, and does.

    Args:
        loop: The loop that is kept awake.
        awake_s: Longest it is kept awake for one event; 0 for never.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        awake_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self.awake_s = awake_s
        self._clock = clock
        self._waits_since: list[float | None] = [None] * len(Event)
        self._pays = [False] * len(Event)
        self._until = 0.0
        self._is_turning = False

    def came(self, event: Event, now: float) -> None:
        """What was waited for, or not, is there."""
        since = self._waits_since[event]
        if since is not None:
            self._pays[event] = now - since < self.awake_s
            self._waits_since[event] = None
        self._until = 0.0

    def wait_for(self, event: Event, now: float) -> None:
        """Nothing is left to do but to wait for this."""
        if self._waits_since[event] is None:
            self._waits_since[event] = now
        if self._pays[event]:
            self._until = now + self.awake_s
            if not self._is_turning:
                self._is_turning = True
                self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """One turn of the loop: it looks at its descriptors, and does not sleep as long as this is called."""
        if self._clock() < self._until:
            os.sched_yield()
            self._loop.call_soon(self._turn)
        else:
            self._is_turning = False
