"""The requests of a bundle as they came, side by side (`docs/wire.md` 3.9). Pure; runs in the front."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from pool import wire
from pool.front.slots import Account, Ticket, Turn
from pool.wire import PART_BYTES

if TYPE_CHECKING:
    from pool.front.route import Route


class Parts:
    """Requests alike in all but id, deadline and rows; a ticket is made for as many as can share one.

    Args:
        sink: Who takes their answers.
        client: Whose they are.
        route: Batched and numeric.
        turn: When they were received.
        key: What they share with those they may run with.
        account: Whose rows they are.
        table: Of the bundle; not kept.
        columns: Ids, millis and rows of each, as read from the table (`pool.wire.split_parts`).
        now: Monotonic seconds.

    Attributes:
        client: As above.
        route: As above.
        turn: As above.
        key: As above.
        account: As above.
        rows: Of all together.
    """

    def __init__(
        self,
        sink: Any,
        client: Any,
        route: Route,
        turn: Turn,
        key: int,
        account: Account,
        table: memoryview | bytes,
        columns: tuple[list[int], list[int], list[int]],
        now: float,
    ) -> None:
        self._sink = sink
        self.client = client
        self.route = route
        self.turn = turn
        self.key = key
        self.account = account
        self._ids, millis, self._counts = columns
        self.rows = sum(self._counts)
        first = millis[0]
        # Neighbours with one deadline: where each run of them begins, and the deadline.
        self._runs = [0]
        if millis.count(first) < len(millis):
            self._runs += [i for i, (before, it) in enumerate(pairwise(millis), 1) if it != before]
        self._deadlines = [now + (millis[at] * 1e-3 or route.timeout_s) for at in self._runs]
        is_plain = len(self._runs) == 1 and not first
        self._table = bytes(table) if is_plain else wire.without_millis(table)

    def __len__(self) -> int:
        return len(self._counts)

    def ids(self, first: int, end: int) -> list[int]:
        """Of requests in a row."""
        return self._ids[first:end]

    def start(self, first: int) -> int:
        """Where the rows of a request begin."""
        return self._end(first - 1) if first else 0

    def _end(self, last: int) -> int:
        return self.rows if last == len(self) - 1 else self._ends[last]

    @cached_property
    def _ends(self) -> list[int]:
        """Of the requests' rows; of no use where a bundle lies in one slot."""
        return list(accumulate(self._counts))

    def deadline(self, first: int) -> float:
        """Of a request."""
        return self._deadlines[bisect_right(self._runs, first) - 1]

    def fit(self, first: int, room: int) -> int:
        """Up to which request those from `first` on have one deadline, and at most `room` rows."""
        run = bisect_right(self._runs, first)
        end = self._runs[run] if run < len(self._runs) else len(self)
        most = self.start(first) + room
        if self._end(end - 1) > most:
            end = bisect_right(self._ends, most, first, end)
        return end

    def ticket(self, first: int, end: int) -> Ticket:
        """For requests that `fit`, at least one; in no slot yet."""
        is_one = end - first == 1
        return Ticket(
            self._sink,
            self.client,
            self._ids[first] if is_one else None,
            self.route,
            self._end(end - 1) - self.start(first),
            self.deadline(first),
            self.turn,
            self.key,
            self.account,
            requests=end - first,
            table=b"" if is_one else self._table[first * PART_BYTES : end * PART_BYTES],
        )

    def end_of_alike(self, first: int, most_rows: int, latest: float) -> int:
        """Up to which request those from `first` on ask for as much as that one, and no later.

        Args:
            first: Of them.
            most_rows: That they may have; it may have fewer than they.
            latest: Deadline that they may have.
        """
        counts = self._counts
        end = first + 1
        while end < len(counts) and counts[first] <= counts[end] <= most_rows:
            end += 1
        for run in range(bisect_right(self._runs, first), len(self._runs)):
            if self._deadlines[run] > latest:
                return min(end, self._runs[run])
        return end
