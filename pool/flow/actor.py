"""Actors: objects with state and a mailbox, supervised by their parents. Runs in the caller's process.

An actor works off its mailbox one message after the other, in a task that exists while there is something to
do; an idle one is an object and a queue. Its `Ref` stays valid when the actor is restarted. When an actor's
code raises, its parent decides, as in Erlang:

    RESTART    with fresh state and the same mailbox: it alone, or with `one_for_all` all children of the
               parent; too many restarts in too short a time escalate
    STOP       for good
    ESCALATE   the parent has failed too, and its parent decides. Above the last parent the system stops

An actor ends before its parent, and the children of one parent end in the opposite order of their beginning.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Generic, TypeVar

from pool.errors import Cancelled
from pool.flow.channel import Channel, ChannelClosed
from pool.flow.deadline import cancels, within
from pool.flow.registry import Registry
from pool.flow.supervision import Children, Supervision

log = logging.getLogger("pool.flow")

Message = TypeVar("Message")
Reply = TypeVar("Reply")
M = TypeVar("M")
R = TypeVar("R")
K = TypeVar("K", bound=Hashable)


class ActorStopped(Exception):
    """The actor has stopped, or was restarted while it worked on the message."""


class Actor(Generic[Message, Reply]):
    """What an actor does; its attributes are its state.

    Attributes:
        supervision: Of its children.
        mailbox_capacity: Messages that wait; who sends more waits until there is room.
    """

    supervision: Supervision = Supervision()
    mailbox_capacity: int = 64
    _cell: _Cell

    async def started(self) -> None:
        """Called before the first message; an error here is one of the actor."""

    async def receive(self, message: Message) -> Reply:
        """Handle a message; what it returns is the answer to `ask`."""
        raise NotImplementedError

    async def stopped(self) -> None:
        """Called once when this object is done with, also before a restart; errors here are logged."""

    @property
    def me(self) -> Ref[Message, Reply]:
        """Its own reference."""
        return Ref(self._cell)

    def spawn(self, make: Callable[[], Actor[M, R]], name: str = "") -> Ref[M, R]:
        """Begin a child, which lives no longer than this object.

        Args:
            make: Gives the object; called again for each restart.
            name: For logs.
        """
        return Ref(self._cell.spawn(make, name))

    def leave(self) -> None:
        """Stop after the message under way."""
        self._cell.begin_stop(None)


class Ref(Generic[Message, Reply]):
    """The address of an actor."""

    __slots__ = ("_cell",)

    def __init__(self, cell: _Cell) -> None:
        self._cell = cell

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other._cell is self._cell

    def __hash__(self) -> int:
        return hash(self._cell)

    def __repr__(self) -> str:
        return f"<Ref {self._cell.path}>"

    @property
    def is_idle(self) -> bool:
        """Whether it has no message, and works on none."""
        return self._cell.task is None and not self._cell.mailbox

    @property
    def is_stopped(self) -> bool:
        """Whether it takes no more messages."""
        return self._cell.mailbox.is_closed

    async def tell(self, message: Message) -> None:
        """Send a message, as soon as the mailbox has room.

        Raises:
            ActorStopped: it has stopped.
        """
        await self._cell.put(_Envelope(message, None))

    async def ask(self, message: Message, *, timeout: float | None = None) -> Reply:
        """Send a message and wait for the answer. A message that nobody waits for any more is not begun.

        Args:
            message: For the actor.
            timeout: Seconds until the answer; None for any time.

        Raises:
            DeadlineExceeded: there was none in time.
            ActorStopped: it has stopped, or was restarted meanwhile.
            Exception: what the actor raised.
        """
        self._cell.check_not_own("ask itself")
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        with within(timeout):
            await self._cell.put(_Envelope(message, answer))
            reply, error = await answer
        if error is not None:
            raise error
        result: Reply = reply
        return result

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop it and its children; returns when they have.

        The message under way is finished, or cancelled after `grace_s`; those behind it are refused. Of
        several who stop it, the one with the least patience counts.
        """
        self._cell.check_not_own("wait for its own end; wanted `leave`")
        await self._cell.stop(grace_s)


_Answer = tuple[Any, "BaseException | None"]  # a reply or an error; as a result, so that it may be dropped


class _Envelope:
    __slots__ = ("answer", "message")

    def __init__(self, message: Any, answer: asyncio.Future[_Answer] | None) -> None:
        self.message = message
        self.answer = answer

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for the answer, or nobody ever did."""
        return self.answer is None or not self.answer.done()

    def settle(self, reply: Any, error: BaseException | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((reply, error))


class _Cell:
    """What lasts of an actor from one object to the next: its place, its mailbox, its children.

    Three kinds of tasks touch it: the worker (`_work`), at most one, that calls the object; that of its
    parent which decides about children that failed (`pool.flow.supervision`); and the one that ends it
    (`_stop`).

    Attributes:
        actor: The object that it is now.
        is_held: Whether its parent is to decide about it, or it is being ended.
    """

    __slots__ = (
        "_children",
        "_farewell",
        "_grace_s",
        "_has_begun",
        "_has_ended",
        "_make",
        "_parent",
        "_stopping",
        "actor",
        "is_held",
        "mailbox",
        "path",
        "task",
    )

    def __init__(self, parent: _Cell | None, make: Callable[[], Actor[Any, Any]], name: str) -> None:
        self._parent = parent
        self._make = make
        self.actor = make()
        name = name or type(self.actor).__name__
        self.path: str = name if parent is None else f"{parent.path}/{name}"
        self.mailbox: Channel[_Envelope] = Channel(self.actor.mailbox_capacity)
        self.task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._grace_s: float | None = None  # of that
        # Most actors have none of these.
        self._farewell: asyncio.Future[None] | None = None  # while the object hears that it has ended
        self._children: Children[_Cell] | None = None
        self._enliven()

    def _enliven(self) -> None:
        """Let a new object work."""
        self.actor._cell = self
        self._has_begun = type(self.actor).started is Actor.started
        self._has_ended = False
        self.is_held = False  # its parent is to decide, or is ending it
        if not self._has_begun or self.mailbox:
            self._start_work()

    # -- messages -----------------------------------------------------------------------------------

    async def put(self, envelope: _Envelope) -> None:
        """Put a message into the mailbox.

        Raises:
            ActorStopped: it takes no more.
        """
        try:
            await self.mailbox.send(envelope)
        except ChannelClosed:
            raise ActorStopped(f"actor {self.path} has stopped") from None
        if self.task is None and not self.is_held:
            self._start_work()

    def _start_work(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._work(self.actor))

    async def _work(self, actor: Actor[Any, Any]) -> None:
        """Work off the mailbox until it is empty."""
        try:
            if not self._has_begun:
                self._has_begun = True
                await actor.started()
            while not self.is_held:
                envelope = None if self.mailbox.is_ended else self.mailbox.receive_nowait()
                if envelope is None:
                    return
                if envelope.is_wanted:
                    await self._handle(actor, envelope)
        except asyncio.CancelledError:
            if self._is_ending():
                raise
            self.fail(Cancelled(f"what actor {self.path} waited for was cancelled"))
        except Exception as e:
            self.fail(e)
        finally:
            self.task = None

    async def _handle(self, actor: Actor[Any, Any], envelope: _Envelope) -> None:
        try:
            reply = await actor.receive(envelope.message)
        except asyncio.CancelledError:
            why = "was ended" if self._is_ending() else "met a cancel of what it waited for"
            envelope.settle(None, ActorStopped(f"actor {self.path} {why} while it worked on the message"))
            raise
        except Exception as e:
            envelope.settle(None, e)
            raise
        envelope.settle(reply, None)

    def _is_ending(self) -> bool:
        """Of a worker that met a cancel: whether it was meant, and not what its object waited for."""
        task = self.task
        return self.is_held or (task is not None and cancels(task) > 0)

    def check_not_own(self, what: str) -> None:
        """Refuse what would wait for the task that asks for it."""
        if self.task is not None and asyncio.current_task() is self.task:
            raise RuntimeError(f"actor {self.path} cannot {what}")

    # -- children -----------------------------------------------------------------------------------

    def spawn(self, make: Callable[[], Actor[Any, Any]], name: str) -> _Cell:
        """Begin a child.

        Raises:
            ActorStopped: this one has ended.
        """
        if self._has_ended:
            raise ActorStopped(f"actor {self.path} has stopped")
        child = _Cell(self, make, name)
        if self._children is None:
            self._children = Children(self)
        self._children.add(child)
        return child

    def fail(self, error: Exception) -> None:
        """Do nothing more until the parent has decided."""
        self.is_held = True
        log.warning("actor failed actor=%s error=%r", self.path, error)
        assert self._parent is not None, "the last parent is no actor"
        assert self._parent._children is not None, "it is one of them"
        self._parent._children.failed(self, error)

    def renew(self) -> None:
        """Begin a new object."""
        try:
            actor = self._make()
        except Exception as e:
            self.fail(e)
            return
        self.actor = actor
        self._enliven()

    # -- the end ------------------------------------------------------------------------------------

    @property
    def is_stopping(self) -> bool:
        """Whether it ends for good."""
        return self._stopping is not None

    async def stop(self, grace_s: float | None) -> None:
        """End it for good, within any number of callers; `grace_s` as for `Ref.stop`, None for any time."""
        self.begin_stop(grace_s)
        assert self._stopping is not None, "just begun"
        await asyncio.wait([self._stopping])

    def begin_stop(self, grace_s: float | None) -> None:
        """Begin to end it for good; if that has begun, have it take no longer than this."""
        if self._stopping is None:
            self._refuse_messages()
            self._grace_s = grace_s
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        elif grace_s is not None and (self._grace_s is None or grace_s < self._grace_s):
            self._grace_s = grace_s
            asyncio.get_running_loop().call_later(grace_s, self._lose_patience)
            last = None if self._children is None else self._children.newest
            if last is not None and last.is_stopping:
                last.begin_stop(grace_s)

    def _lose_patience(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _refuse_messages(self) -> None:
        self.mailbox.close()
        while not self.mailbox.is_ended:
            envelope = self.mailbox.receive_nowait()
            assert envelope is not None, "nobody else receives"
            envelope.settle(None, ActorStopped(f"actor {self.path} has stopped"))

    async def _stop(self) -> None:
        await self.end(self._grace_s)
        if self._parent is not None and self._parent._children is not None:
            self._parent._children.remove(self)

    async def end(self, grace_s: float | None) -> None:
        """End the object: the message under way, then its children, then itself."""
        self.is_held = True
        task = self.task
        if task is not None and grace_s != 0:
            await asyncio.wait([task], timeout=grace_s)
        while task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])
        self.task = None  # which one that was cancelled before it ran did not do
        if self._children is not None:
            await self._children.settled()
            while (child := self._children.newest) is not None:
                # Somebody may have lost patience meanwhile; a restart has none.
                await child.stop(0.0 if grace_s == 0 else self._grace_s)
        if not self._has_ended:
            self._has_ended = True
            self._farewell = asyncio.get_running_loop().create_future()
            try:
                await self.actor.stopped()
            except Exception:
                log.exception("cannot stop in order actor=%s", self.path)
            finally:
                self._farewell.set_result(None)
                self._farewell = None
        elif self._farewell is not None:  # it is to be restarted, and was stopped meanwhile
            await asyncio.wait([self._farewell])


class _Guardian(Actor[Any, Any]):
    """The parent of those that have no other."""

    def __init__(self, supervision: Supervision) -> None:
        self.supervision = supervision


class _Root(_Cell):
    __slots__ = ("on_failed",)

    def __init__(self, supervision: Supervision, on_failed: Callable[[Exception], None]) -> None:
        super().__init__(None, lambda: _Guardian(supervision), "system")
        self.on_failed = on_failed

    def fail(self, error: Exception) -> None:
        self.is_held = True
        self.on_failed(error)


class System:
    """Where actors live that have no other parent. An async context manager; leaving it stops them all.

    Args:
        supervision: Of those. What escalates from there stops the system, and is raised on leaving.

    Make it inside a running event loop.
    """

    def __init__(self, supervision: Supervision = Supervision()) -> None:
        self._root = _Root(supervision, self._failed)
        self._registries: list[Registry[Any, Any]] = []
        self._error: Exception | None = None

    def spawn(self, make: Callable[[], Actor[M, R]], name: str = "") -> Ref[M, R]:
        """Begin an actor; as `Actor.spawn`.

        Raises:
            ActorStopped: the system has stopped.
        """
        return Ref(self._root.spawn(make, name))

    def registry(
        self, make: Callable[[K], Actor[M, R]], *, idle_s: float = 300.0, limit: int | None = None
    ) -> Registry[K, Ref[M, R]]:
        """Actors by key, begun when first asked for and stopped when idle; see `Registry`.

        Args:
            make: Of a key, the object.
            idle_s: Seconds after which an idle one stops.
            limit: Most of them.
        """
        registry: Registry[K, Ref[M, R]] = Registry(
            lambda key: self.spawn(lambda: make(key), str(key)),
            lambda ref: ref.stop(),
            lambda ref: ref.is_idle,
            is_over=lambda ref: ref.is_stopped,
            idle_s=idle_s,
            limit=limit,
        )
        self._registries.append(registry)
        return registry

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop all actors, the newest first; the rest as `Ref.stop`."""
        for registry in self._registries:
            registry.forget()
        await self._root.stop(grace_s)

    def _failed(self, error: Exception) -> None:
        self._error = error
        log.error("system failed error=%r", error)
        self._root.begin_stop(0.0)

    async def __aenter__(self) -> System:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(0.0 if kind is not None else 5.0)
        if self._error is not None and error is None:
            raise self._error
