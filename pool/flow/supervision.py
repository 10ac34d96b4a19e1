"""What becomes of actors that fail, as their parents say. Runs in the caller's process.

One task decides about all children of a parent, one failure after the other. Children that fail together,
restarts of all and a parent that ends meanwhile need not look out for each other then: a child that failed
is held until its turn comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

log = logging.getLogger("pool.flow")


class Directive(Enum):
    """What becomes of a child that failed."""

    RESTART = "restart"
    STOP = "stop"
    ESCALATE = "escalate"


def _always_restart(_: Exception) -> Directive:
    return Directive.RESTART


@dataclass(frozen=True)
class Supervision:
    """How a parent treats children that fail.

    Attributes:
        one_for_all: Whether a restart is one of all children.
        max_restarts: Most restarts of all children together within `within_s`; one more escalates.
        within_s: Seconds.
        decide: Of an error, what to do. What it raises counts as ESCALATE.
    """

    one_for_all: bool = False
    max_restarts: int = 3
    within_s: float = 5.0
    decide: Callable[[Exception], Directive] = _always_restart


class Member(Protocol):
    """What is asked of a parent and of its children."""

    path: str
    is_held: bool

    @property
    def actor(self) -> Any:
        """The object that it is now."""

    @property
    def is_stopping(self) -> bool:
        """Whether it ends for good."""

    def fail(self, error: Exception) -> None:
        """It has failed, and its parent is to decide."""

    def renew(self) -> None:
        """Begin a new object."""

    async def end(self, grace_s: float | None) -> None:
        """End the object."""

    async def stop(self, grace_s: float | None) -> None:
        """End it for good."""


M = TypeVar("M", bound=Member)


class Children(Generic[M]):
    """The children of one parent, in the order of their beginning.

    Args:
        parent: Whose `supervision` holds, whichever object it is then.
    """

    __slots__ = ("_failures", "_members", "_parent", "_restarts", "_supervising")

    def __init__(self, parent: M) -> None:
        self._parent = parent
        self._members: dict[M, None] = {}
        self._failures: deque[tuple[M, Any, Exception]] = deque()
        self._restarts: deque[float] = deque()
        self._supervising: asyncio.Task[None] | None = None

    @property
    def newest(self) -> M | None:
        """The one that began last, and ends first; None if there is none."""
        return next(reversed(self._members), None)

    def add(self, child: M) -> None:
        """It has begun."""
        self._members[child] = None

    def remove(self, child: M) -> None:
        """It has ended for good."""
        self._members.pop(child, None)

    def failed(self, child: M, error: Exception) -> None:
        """Decide what becomes of a child, in a task of its own."""
        self._failures.append((child, child.actor, error))
        if self._supervising is None:
            self._supervising = asyncio.get_running_loop().create_task(self._supervise())

    async def settled(self) -> None:
        """Wait until nothing is being decided."""
        if self._supervising is not None:
            await asyncio.wait([self._supervising])

    async def _supervise(self) -> None:
        failures = self._failures
        try:
            # Held: whatever becomes of the parent, its children end.
            while failures and not self._parent.is_held:
                child, actor, error = failures.popleft()
                if child.actor is not actor or child.is_stopping:
                    continue  # replaced since, or ending
                directive = self._decide(error)
                if directive is Directive.ESCALATE:
                    self._parent.fail(error)
                elif directive is Directive.STOP:
                    await child.stop(0.0)
                else:
                    await self._restart(child)
        finally:
            failures.clear()
            self._supervising = None

    def _decide(self, error: Exception) -> Directive:
        supervision: Supervision = self._parent.actor.supervision
        try:
            directive = supervision.decide(error)
        except Exception:
            log.exception("cannot decide actor=%s", self._parent.path)
            return Directive.ESCALATE
        if directive is not Directive.RESTART:
            return directive
        now = asyncio.get_running_loop().time()
        while self._restarts and self._restarts[0] <= now - supervision.within_s:
            self._restarts.popleft()
        if len(self._restarts) >= supervision.max_restarts:
            return Directive.ESCALATE
        self._restarts.append(now)
        return directive

    async def _restart(self, child: M) -> None:
        group = [child]
        if self._parent.actor.supervision.one_for_all:
            group = list(self._members)
        for each in reversed(group):
            await each.end(0.0)
        for each in group:
            if not each.is_stopping and not self._parent.is_held:
                each.renew()
