"""Channels: bounded queues between tasks of one event loop, that end. Runs in the caller's process.

Items come out in the order in which they went in, each once. A channel is closed from either end:

    close      nothing more is sent    what is in it is still received, then receivers hear `ChannelClosed`
    abandon    nothing more is wanted  what is in it is dropped, and senders hear `ChannelClosed`

A task that waits is woken by a *grant*: of an item, or of a place for one, that no other task may take
meanwhile. The item itself stays in the channel until its receiver runs, so a receiver that is cancelled
after it was woken loses nothing: the grant goes to the next. A sender that is cancelled has not sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Gets the channel when something of it is granted; None when the channel has ended instead.
_Waiter = asyncio.Future[Any]


class ChannelClosed(Exception):
    """The channel is closed; or, to a receiver, closed and empty."""

    def __init__(self) -> None:
        super().__init__("the channel is closed")


class Channel(Generic[T]):
    """A bounded queue. Any number of tasks may send and receive.

    Args:
        capacity: Most items in it; a sender that finds it full waits.

    Raises:
        ValueError: the capacity is not 1 or more.

    Iterating over it receives until it is closed and empty.
    """

    # Queues of waiters are made when the first one waits: of many channels, most are idle.
    __slots__ = (
        "_capacity",
        "_is_closed",
        "_items",
        "_items_granted",
        "_places_granted",
        "_receivers",
        "_senders",
    )

    def __init__(self, capacity: int = 1) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; wanted 1 or more")
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._items_granted = 0  # of the items: to receivers that were woken and have not run yet
        self._places_granted = 0  # of the free places: to senders that were; counts while it is open
        self._receivers: deque[_Waiter] | None = None
        self._senders: deque[_Waiter] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        """Items in it."""
        return len(self._items)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent any more; there may be items left to receive."""
        return self._is_closed

    @property
    def is_ended(self) -> bool:
        """Whether it is closed and empty."""
        return self._is_closed and not self._items

    # -- sending ------------------------------------------------------------------------------------

    async def send(self, item: T) -> None:
        """Put an item in, as soon as there is room.

        Raises:
            ChannelClosed: it is closed; the item is not in it.
        """
        if len(self._items) + self._places_granted >= self._capacity and not self._is_closed:
            if self._senders is None:
                self._senders = deque()
            waiter: _Waiter = asyncio.get_running_loop().create_future()
            self._senders.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.cancelled():
                    _remove(waiter, self._senders)
                else:  # granted, and cancelled before it ran
                    self._places_granted -= 1
                    self._grant_place()
                raise
            self._places_granted -= 1
        if self._is_closed:
            raise ChannelClosed
        self._items.append(item)
        if self._receivers:
            self._grant_item()

    def send_nowait(self, item: T) -> bool:
        """Put an item in, if there is room that nobody waits for; gives whether it is in.

        Raises:
            ChannelClosed: it is closed.
        """
        if self._is_closed:
            raise ChannelClosed
        if len(self._items) + self._places_granted >= self._capacity:
            return False
        self._items.append(item)
        if self._receivers:
            self._grant_item()
        return True

    def _grant_place(self) -> None:
        """Wake the next sender, if there is a place for it."""
        senders = self._senders
        while senders and len(self._items) + self._places_granted < self._capacity:
            waiter = senders.popleft()
            if not waiter.done():  # done: cancelled, and did not run yet
                self._places_granted += 1
                waiter.set_result(self)

    # -- receiving ----------------------------------------------------------------------------------

    async def receive(self) -> T:
        """Take the oldest item, as soon as there is one.

        Raises:
            ChannelClosed: it is closed, and there is no more.
        """
        if len(self._items) <= self._items_granted:
            if self.is_ended:
                raise ChannelClosed
            waiter: _Waiter = asyncio.get_running_loop().create_future()
            self._enlist(waiter)
            try:
                granted = await waiter
            except asyncio.CancelledError:
                self._dismiss(waiter)
                raise
            if granted is None:
                raise ChannelClosed
            self._items_granted -= 1
        return self._take()

    def receive_nowait(self) -> T | None:
        """Take the oldest item, if there is one that nobody was woken for; else None.

        Raises:
            ChannelClosed: it is closed, and there is no more.
        """
        if len(self._items) > self._items_granted:
            return self._take()
        if self.is_ended:
            raise ChannelClosed
        return None

    def _take(self) -> T:
        if not self._items:  # abandoned since it was granted
            raise ChannelClosed
        item = self._items.popleft()
        if self._senders:
            self._grant_place()
        if self._is_closed and not self._items:
            _end(self._receivers)
        return item

    def _enlist(self, waiter: _Waiter) -> None:
        if self._receivers is None:
            self._receivers = deque()
        self._receivers.append(waiter)

    def _dismiss(self, waiter: _Waiter) -> None:
        """It waits no more: what it was granted here is granted to the next."""
        if waiter.done() and not waiter.cancelled() and waiter.result() is self:
            self._items_granted -= 1
            self._grant_item()
        else:
            _remove(waiter, self._receivers)

    def _grant_item(self) -> None:
        """Wake the next receiver, if there is an item for it."""
        receivers = self._receivers
        while receivers and len(self._items) > self._items_granted:
            waiter = receivers.popleft()
            if not waiter.done():  # done: cancelled, or granted by another channel of a `select`
                self._items_granted += 1
                waiter.set_result(self)

    # -- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing more is sent: senders that wait hear `ChannelClosed`, receivers once it is empty."""
        self._is_closed = True
        _end(self._senders)
        if not self._items:
            _end(self._receivers)

    def abandon(self) -> None:
        """Nothing more is wanted: what is in it is dropped, and whoever sends or receives hears of it."""
        self._items.clear()
        self.close()

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except ChannelClosed:
            raise StopAsyncIteration from None


async def select(*channels: Channel[Any]) -> tuple[Channel[Any], Any]:
    """Receive from whichever of several channels has an item; the first named one, if several have.

    Returns:
        The channel and the item. Nothing was taken from the others.

    Raises:
        ChannelClosed: all are closed and empty.
    """
    while True:
        for channel in channels:
            if len(channel._items) > channel._items_granted:
                return channel, channel._take()
        waited_for = [channel for channel in channels if not channel.is_ended]
        if not waited_for:
            raise ChannelClosed
        waiter: _Waiter = asyncio.get_running_loop().create_future()
        for channel in waited_for:
            channel._enlist(waiter)
        try:
            granted: Channel[Any] | None = await waiter
        except asyncio.CancelledError:
            for channel in waited_for:
                channel._dismiss(waiter)
            raise
        for channel in waited_for:
            if channel is not granted:
                channel._dismiss(waiter)
        if granted is not None:
            granted._items_granted -= 1
            if granted._items:  # else abandoned since
                return granted, granted._take()


def _end(waiters: deque[_Waiter] | None) -> None:
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)


def _remove(waiter: _Waiter, waiters: deque[_Waiter] | None) -> None:
    if waiters and waiter in waiters:
        waiters.remove(waiter)
