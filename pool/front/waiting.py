"""Requests between two steps of a pipeline that wait for room in the next arena. Runs in the front.

They wait in memory of their own, holding no slot, by arrival and priority, until a slot is given back or
their deadline passes.

Why none waits for ever: a slot with rows is never kept from running by a pipeline. Its batch runs, ends, and
the slot is free whatever becomes of its answers. So room comes to each model that has a worker; the first
that waits for it gets it; and a model without workers fails those that wait.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import count
from math import inf

from pool.errors import DeadlineExceeded, InternalError, PoolError
from pool.front.execution import Execution
from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.slots import LANES

log = Log("pool.waiting")


class WaitingRoom:
    """Those that wait, by the generation whose arena they wait for. Make it inside a running event loop.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._queues: dict[Generation, list[tuple[float, int, Execution]]] = {}  # those that go first first
        self._numbers = count()
        self._is_feeding = self._is_hungry = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf

    def enter(self, execution: Execution, now: float) -> None:
        """Have one wait until there is room for (the rest of) its rows."""
        generation = execution.route.generation
        priority = execution.whole.key & (LANES - 1)
        execution.waits_at = (now + priority * generation.batcher.ageing_s, next(self._numbers))
        insort(self._queues.setdefault(generation, []), (*execution.waits_at, execution))
        self._arm(execution.whole.deadline, now)

    def leave(self, execution: Execution) -> None:
        """It has room, or does not want it any more; nothing happens if it does not wait."""
        if execution.waits_at is None:
            return
        generation = execution.route.generation
        queue = self._queues[generation]
        del queue[bisect_left(queue, execution.waits_at, key=lambda entry: entry[:2])]
        execution.waits_at = None
        if not queue:
            del self._queues[generation]

    def feed(self) -> None:
        """Room may have come: give it to those that have waited longest."""
        if not self._queues:
            return
        self._is_hungry = True
        if self._is_feeding:
            return  # whoever feeds goes round again
        self._is_feeding = True
        try:
            while self._is_hungry and self._queues:
                self._is_hungry = False
                now = self._clock()
                for generation in list(self._queues):
                    self._feed(generation, now)
        finally:
            self._is_feeding = False

    def _feed(self, generation: Generation, now: float) -> None:
        queue = self._queues.get(generation, [])
        at = 0
        while at < len(queue):
            execution = queue[at][2]
            if self._resume(execution, now):
                continue  # it has left the queue
            key = execution.route.keys[execution.whole.key & (LANES - 1)]
            if not generation.batcher.free_rows(key, execution.route.capacity):
                return
            at += 1  # its client has as many rows there as it may have

    def _resume(self, execution: Execution, now: float) -> bool:
        try:
            if not execution.place(now):
                return False
            self.leave(execution)
        except PoolError as e:
            execution.fail(e)
        except Exception as e:  # whoever waits must hear of it, and not have it happen again and again
            log.defect("cannot go on in a pipeline")
            execution.fail(InternalError(f"{type(e).__name__} before the step"))
        return True

    def drop(self, error: PoolError, generation: Generation | None = None) -> None:
        """Answer those that wait for room, in one generation or in all."""
        for queue in [q for g, q in self._queues.items() if generation in (None, g)]:
            for _, _, execution in list(queue):
                execution.fail(error)

    def _arm(self, deadline: float, now: float) -> None:
        if deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - now), self._expire)

    def _expire(self) -> None:
        self._timer, self._timer_at = None, inf
        now = self._clock()
        waiting = [entry[2] for queue in self._queues.values() for entry in queue]
        for execution in waiting:
            if execution.whole.deadline <= now:
                execution.fail(DeadlineExceeded("it waited for room"))
        for execution in waiting:
            if execution.waits_at is not None:
                self._arm(execution.whole.deadline, now)

    def stop(self) -> None:
        """Nothing will run again: no timer is to ring."""
        if self._timer is not None:
            self._timer.cancel()

    def of(self, name: str) -> dict[str, int]:
        """How many requests of a pipeline wait for room, by step."""
        found: dict[str, int] = {}
        for queue in self._queues.values():
            for _, _, execution in queue:
                if execution.pipeline.model == name:
                    step = execution.pipeline.wiring.steps[execution.step].name
                    found[step] = found.get(step, 0) + 1
        return found
