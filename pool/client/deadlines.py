"""The deadlines of requests under way, for a shell that has one timer. Client process; pure.

A timer per request costs more than sending it, and most deadlines never pass. So they lie in a heap, and
those of answered requests stay there until their time, or until there are too many of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

# Deadlines of answered requests stay in the heap until they outnumber the others and this many.
_STALE_DEADLINES = 256


class Deadlines:
    """When requests that are still pending are overdue.

    Args:
        pending: Ids of the requests that are not answered yet; the owner changes it as it likes.
    """

    def __init__(self, pending: Collection[int]) -> None:
        self._pending = pending
        self._heap: list[tuple[float, int, float]] = []  # when, id, the timeout it came from

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, id_: int, timeout: float) -> None:
        """Remember a request's deadline.

        Args:
            when: The instant, in seconds of the owner's clock.
            id_: Of the request.
            timeout: What the deadline was made of, in seconds.
        """
        heap = self._heap
        if len(heap) > 2 * len(self._pending) + _STALE_DEADLINES:
            heap[:] = [each for each in heap if each[1] in self._pending]
            heapq.heapify(heap)
        heapq.heappush(heap, (when, id_, timeout))

    def take_overdue(self, now: float) -> Iterator[tuple[int, float]]:
        """Id and timeout of each pending request whose deadline is `now` or earlier, which are forgotten."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, id_, timeout = heapq.heappop(heap)
            if id_ in self._pending:
                yield id_, timeout

    def next(self) -> float | None:
        """The earliest deadline of a pending request, or None."""
        heap = self._heap
        while heap and heap[0][1] not in self._pending:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()
