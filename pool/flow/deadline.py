"""A limit on the time of a block of code, by cancelling what it waits for. Runs in the caller's process.

`asyncio.timeout` does the same from Python 3.11 on; `asyncio.wait_for` makes a task for each call.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from pool.errors import DeadlineExceeded


class within:  # noqa: N801 - read as a statement
    """`with within(2.0): ...`: what is awaited inside is cancelled when the time is over.

    Args:
        timeout: Seconds, from entering; None for no limit.

    Raises:
        DeadlineExceeded: on leaving, if the time was over.

    Attributes:
        deadline: When the time is over, on the loop's clock; None for never.
    """

    __slots__ = ("_cancelling", "_handle", "_is_over", "_task", "deadline", "timeout")

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.deadline: float | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._is_over = False

    def __enter__(self) -> within:
        if self.timeout is None:
            return self
        if not self.timeout > 0:
            raise DeadlineExceeded(f"timeout is {self.timeout:g} s; wanted more than 0 s")
        task = asyncio.current_task()
        assert task is not None, "inside a task"
        self._task = task
        self._cancelling = cancels(task)
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + self.timeout
        self._handle = loop.call_at(self.deadline, self._expire)
        return self

    def _expire(self) -> None:
        self._is_over = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        self._handle.cancel()
        if not self._is_over:
            return
        uncancel = getattr(self._task, "uncancel", None)  # new in Python 3.11
        # Whoever cancelled the task as well means it.
        is_ours = uncancel is None or uncancel() <= self._cancelling
        if is_ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise DeadlineExceeded(f"not done within {self.timeout:g} s") from None


def cancels(task: asyncio.Task[Any]) -> int:
    """How often a task was asked to end; 0 before Python 3.11, which does not tell."""
    count = getattr(task, "cancelling", None)
    return 0 if count is None else count()
