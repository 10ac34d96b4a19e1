"""The steps that each user's messages take, one message of a user at a time. Runs in the caller's process.

A pipeline has no task and no queue of its own. A message runs through it in the task that sent it, and waits
there for the same user's messages before it. So cancelling that task cancels the step under way, an error
reaches who sent the message and nobody else, and what an idle pipeline costs is its state and a small object.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar, overload

from pool.errors import Cancelled, Overloaded
from pool.flow.deadline import within
from pool.flow.registry import Registry
from pool.flow.stages import together

State = TypeVar("State")
In = TypeVar("In")
Out = TypeVar("Out")
Next = TypeVar("Next")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

_Function = Callable[["Pipeline[Any, Any, Any]", Any], Awaitable[Any]]


class Step(Generic[State, In, Out]):
    """What a message goes through: `a | b` is a step that is `a` and then `b`.

    Args:
        function: A coroutine function of the pipeline and the message; gives what the next step gets. It
            finds the user's key and state in the pipeline, and may change the state.
    """

    __slots__ = ("functions",)

    def __init__(self, function: Callable[[Pipeline[State, Any, Any], In], Awaitable[Out]]) -> None:
        self.functions: tuple[_Function, ...] = (function,)

    def __or__(self, other: Step[State, Out, Next]) -> Step[State, In, Next]:
        joined: Step[State, In, Next] = Step.__new__(Step)
        joined.functions = self.functions + other.functions
        return joined

    async def __call__(self, pipeline: Pipeline[State, Any, Any], message: In) -> Out:
        """Run it."""
        value: Any = message
        for function in self.functions:
            value = await function(pipeline, value)
        result: Out = value
        return result


@overload
def fork(first: Step[State, In, A], second: Step[State, In, B], /) -> Step[State, In, tuple[A, B]]: ...
@overload
def fork(
    first: Step[State, In, A], second: Step[State, In, B], third: Step[State, In, C], /
) -> Step[State, In, tuple[A, B, C]]: ...
@overload
def fork(*steps: Step[State, In, A]) -> Step[State, In, tuple[A, ...]]: ...
def fork(*steps: Step[Any, Any, Any]) -> Step[Any, Any, tuple[Any, ...]]:
    """A step that takes a message through several at the same time; gives what each of them gave.

    If one raises, the others are cancelled.
    """

    async def run(pipeline: Pipeline[Any, Any, Any], message: Any) -> tuple[Any, ...]:
        return tuple(await together(*(step(pipeline, message) for step in steps)))

    return Step(run)


def each(step: Step[State, In, Out]) -> Step[State, list[In], list[Out]]:
    """A step that takes each of several messages through one at the same time; gives what came of each.

    If one raises, the others are cancelled.
    """

    async def run(pipeline: Pipeline[State, Any, Any], messages: list[In]) -> list[Out]:
        return await together(*(step(pipeline, message) for message in messages))

    return Step(run)


class Pipeline(Generic[State, In, Out]):
    """One user's way through the steps.

    Args:
        step: Shared by all users.
        key: Of the user.
        state: The user's own; the steps change it.
        backlog: Most messages that wait for those before them.

    Attributes:
        key: As above.
        state: As above.
    """

    __slots__ = ("_backlog", "_deadline", "_functions", "_is_busy", "_is_closed", "_waiting", "key", "state")

    def __init__(self, step: Step[State, In, Out], key: Hashable, state: State, *, backlog: int = 64) -> None:
        self.key = key
        self.state = state
        self._functions = step.functions
        self._backlog = backlog
        self._is_busy = False
        self._is_closed = False
        self._deadline: float | None = None  # of the message under way
        self._waiting: deque[asyncio.Future[bool]] | None = None  # None while none ever did

    async def send(self, message: In, *, timeout: float | None = None) -> Out:
        """Take a message through the steps, after those sent before; gives what the last step gives.

        Args:
            message: For the first step.
            timeout: Seconds for all of it, waiting included; None for no limit of its own.

        Raises:
            DeadlineExceeded: the time is over; the step under way was cancelled.
            Overloaded: `backlog` messages wait already.
            Cancelled: the pipeline is closed.
            Exception: what a step raises. The messages behind go on, with the state as it is.
        """
        if timeout is None:
            return await self._run(message, None)
        with within(timeout) as limit:
            return await self._run(message, limit.deadline)

    async def _run(self, message: In, deadline: float | None) -> Out:
        if self._is_busy:
            waiting = len(self._waiting or ())
            if waiting >= self._backlog:
                raise Overloaded(f"{waiting} messages of {self.key!r} wait already")
            await self._wait()
        if self._is_closed:
            self._pass_on()
            raise Cancelled(f"the pipeline of {self.key!r} is closed")
        self._is_busy = True
        self._deadline = deadline
        value: Any = message
        try:
            for function in self._functions:
                value = await function(self, value)
        finally:
            self._pass_on()
        result: Out = value
        return result

    async def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = deque()
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in self._waiting:
                    self._waiting.remove(turn)
            else:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """The message under way is through: the next one's turn."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(True)  # and it stays busy meanwhile
                return
        self._is_busy = False

    @property
    def is_idle(self) -> bool:
        """Whether no message is under way."""
        return not self._is_busy

    def remaining(self) -> float | None:
        """Seconds left for the message under way, for a step to pass on; None if there is no limit."""
        if self._deadline is None:
            return None
        return self._deadline - asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Take no more messages: those that wait hear `Cancelled`, the one under way is waited for."""
        self._is_closed = True
        if self._is_busy:
            await self._wait()
            self._pass_on()


class Pipelines(Generic[State, In, Out]):
    """The pipelines of all users, by key.

    Args:
        step: What their messages go through.
        make_state: Of a key, the state to begin with, such as what was saved.
        save: Called with the key and the state of a pipeline that is let go.
        backlog: Most messages of one user that wait for those before them.
        idle_s: Seconds after its last message after which a pipeline is let go.
        limit: Most pipelines; None for any number. Beyond it, the one idle for longest is let go.
    """

    def __init__(
        self,
        step: Step[State, In, Out],
        make_state: Callable[[Any], State],
        *,
        save: Callable[[Any, State], Awaitable[None]] | None = None,
        backlog: int = 64,
        idle_s: float = 300.0,
        limit: int | None = None,
    ) -> None:
        self._save = save
        self._registry: Registry[Any, Pipeline[State, In, Out]] = Registry(
            lambda key: Pipeline(step, key, make_state(key), backlog=backlog),
            self._let_go,
            lambda pipeline: pipeline.is_idle,
            idle_s=idle_s,
            limit=limit,
        )

    def __len__(self) -> int:
        """Pipelines there are."""
        return len(self._registry)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._registry

    async def get(self, key: Hashable) -> Pipeline[State, In, Out]:
        """A user's pipeline, made if there is none.

        Raises:
            Overloaded: there are as many as there may be, and none is idle.
        """
        return await self._registry.get(key)

    async def send(self, key: Hashable, message: In, *, timeout: float | None = None) -> Out:
        """Take a user's message through the steps; as `Pipeline.send`, and raises what `get` raises."""
        return await (await self._registry.get(key)).send(message, timeout=timeout)

    async def close(self) -> None:
        """Let all go: each finishes its message first; what is saved is saved when this returns.

        Raises:
            Exception: what `save` raised for one of them; the others are saved all the same.
        """
        await self._registry.close()

    async def _let_go(self, pipeline: Pipeline[State, In, Out]) -> None:
        await pipeline.close()
        if self._save is not None:
            await self._save(pipeline.key, pipeline.state)
