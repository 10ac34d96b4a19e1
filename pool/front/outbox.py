"""How much of what was sent to a client ZeroMQ still holds. Pure; runs in the front.

ZeroMQ does not tell when a message has left, only when a buffer that it was lent is its owner's again.
Messages to one client leave in order. So now and then one is lent, a *mark*: when it is given back, all
that was sent before has left too.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol


class Tracker(Protocol):
    """Tells whether ZeroMQ has let go of a buffer (`zmq.MessageTracker`)."""

    @property
    def done(self) -> bool:
        """Whether it has."""


class Outbox:
    """Marks on their way to one client.

    Attributes:
        unread_bytes: Sent and, as far as is known, not left.
        pinned: Slots that ZeroMQ reads from, with the number of messages that do.
    """

    __slots__ = ("_marks", "pinned", "unread_bytes")

    def __init__(self) -> None:
        self.unread_bytes = 0
        self.pinned: dict[Any, int] = {}
        self._marks: deque[tuple[Tracker, int, Any]] = deque()

    def mark(self, tracker: Tracker, size: int, slot: Any = None) -> None:
        """A message was sent with a mark.

        Args:
            tracker: Of the mark.
            size: Bytes sent since the mark before, this message included.
            slot: What its payload is read from, if it was not copied.
        """
        self._marks.append((tracker, size, slot))
        self.unread_bytes += size
        if slot is not None:
            self.pinned[slot] = self.pinned.get(slot, 0) + 1

    def look(self) -> None:
        """See what has left."""
        marks = self._marks
        while marks and marks[0][0].done:
            _, size, slot = marks.popleft()
            self.unread_bytes -= size
            if slot is not None:
                self.pinned[slot] -= 1
                if not self.pinned[slot]:
                    del self.pinned[slot]
