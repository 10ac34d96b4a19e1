"""What there is one of for each user or session, made when first asked for, until it has been idle for long.

Runs in the caller's process. Asking, making and letting go take the same time however many there are: they
are kept in the order of their last use, and one timer waits for the oldest.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from pool.errors import Overloaded

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("used_at", "value")

    def __init__(self, value: V, used_at: float) -> None:
        self.value = value
        self.used_at = used_at


class Registry(Generic[K, V]):
    """Values by key.

    Args:
        make: Of a key, its value.
        let_go: Ends a value; until it is done the key has no new one, so what it saves is there to be read.
        is_idle: Whether a value may be let go now.
        is_over: Whether a value has ended by itself, so that its key needs a new one.
        idle_s: Seconds after the last `get` after which an idle value is let go.
        limit: Most values; None for any number. Beyond it, the one that has been idle for longest is let go.

    Raises:
        ValueError: `idle_s` is not above 0.
    """

    def __init__(
        self,
        make: Callable[[K], V],
        let_go: Callable[[V], Awaitable[None]],
        is_idle: Callable[[V], bool],
        *,
        is_over: Callable[[V], bool] = lambda _: False,
        idle_s: float = 300.0,
        limit: int | None = None,
    ) -> None:
        if not idle_s > 0:
            raise ValueError(f"idle_s is {idle_s}; wanted more than 0")
        self._make = make
        self._let_go = let_go
        self._is_idle = is_idle
        self._is_over = is_over
        self._idle_s = idle_s
        self._limit = limit
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()  # the one unused for longest first
        self._leaving: dict[K, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Values there are."""
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    async def get(self, key: K) -> V:
        """The value of a key. It waits only if the key's last value is being let go.

        Raises:
            Overloaded: there are as many as there may be, and none is idle.
        """
        while key in self._leaving:
            await asyncio.wait([self._leaving[key]])
        now = asyncio.get_running_loop().time()
        entry = self._entries.get(key)
        if entry is not None and self._is_over(entry.value):
            del self._entries[key]
            entry = None
        if entry is None:
            if self._limit is not None and len(self._entries) >= self._limit:
                self._make_room()
            entry = self._entries[key] = _Entry(self._make(key), now)
        else:
            entry.used_at = now
            self._entries.move_to_end(key)
        if self._timer is None:
            self._arm(now)
        return entry.value

    def drop(self, key: K) -> None:
        """Let a value go now, idle or not; nothing happens if there is none."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._leaving[key] = asyncio.get_running_loop().create_task(self._end(key, entry.value))

    async def close(self) -> None:
        """Let all go, the newest first, and wait until they are gone.

        Raises:
            Exception: what letting one go raised; all have been let go all the same.
        """
        for key in reversed(list(self._entries)):
            self.drop(key)
        self.forget()
        leaving = list(self._leaving.values())
        while self._leaving:
            await asyncio.wait(list(self._leaving.values()))
        for task in leaving:
            task.result()

    def forget(self) -> None:
        """Keep no value and no timer any more; somebody else ends the values."""
        self._entries.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_room(self) -> None:
        for key, entry in self._entries.items():
            if self._is_idle(entry.value):
                self.drop(key)
                return
        raise Overloaded(f"there are {len(self._entries)} of at most {self._limit}, and none is idle")

    async def _end(self, key: K, value: V) -> None:
        try:
            await self._let_go(value)
        finally:
            del self._leaving[key]

    def _arm(self, now: float) -> None:
        oldest = next(iter(self._entries.values()))
        due = max(now, oldest.used_at + self._idle_s)
        self._timer = asyncio.get_running_loop().call_at(due, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer = None
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.used_at + self._idle_s > now:
                break
            if self._is_idle(entry.value):
                self.drop(key)
            else:
                entry.used_at = now
                self._entries.move_to_end(key)
        if self._entries:
            self._arm(now)
