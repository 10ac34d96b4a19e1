"""What the front counts while it serves: plain numbers, cheap to add to. Pure; runs in the front.

Nothing is counted for each request by itself. A batch's requests came in a few *turns* of the front's loop
and share everything else, so each stage is added to its histogram once, with the number of requests. Those
that came in different turns lie in order, and are divided among the buckets by bisection.

The stages of a request follow each other without a gap:

    turn.started -> turn.ended    receive   read from the socket, its rows placed
    -> slot.dispatched_at         queue     waits for company, or for a worker
    -> answered                   run       with the worker, there and back included
    -> sent                       reply     its answer cut out and handed to ZeroMQ

`pool.front.exposition` and `pool.front.status` show them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from pool.front.slots import Slot, Ticket

# Upper ends of the buckets, in seconds: 10 µs (less than the front needs for anything) to 50 s.
BOUNDS_S = tuple(float(f"{digit}e{exponent}") for exponent in range(-5, 2) for digit in (1, 2, 5))

STAGES = ("receive", "queue", "run", "reply", "total")

_STARTED = attrgetter("turn.started")
_ENDED = attrgetter("turn.ended")


class Histogram:
    """Durations in buckets.

    Attributes:
        counts: By bucket; one more than there are bounds, for what is longer than the last.
        sum_s: Of all durations.
    """

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, duration_s: float, count: int) -> None:
        """Add `count` equal durations."""
        self.counts[bisect_left(BOUNDS_S, duration_s)] += count
        self.sum_s += duration_s * count

    def add_since(self, tickets: Sequence[Ticket], since: Any, now: float) -> None:
        """Add the time from a moment of each ticket's turn until now.

        The counts are exact. The sum takes the times within a bucket as evenly spread.

        Args:
            tickets: At least one, in the order in which they came.
            since: Gives the moment of a ticket.
            now: Monotonic seconds.
        """
        begin, end = 0, len(tickets)
        longest, shortest = now - since(tickets[0]), now - since(tickets[-1])
        last = bisect_left(BOUNDS_S, shortest)
        while begin < end:
            bucket = bisect_left(BOUNDS_S, longest)
            if bucket <= last:
                upto = end
            else:  # those that came later than this are in a lower bucket
                upto = bisect_left(tickets, now - BOUNDS_S[bucket - 1], begin + 1, end, key=since)
            least = now - since(tickets[upto - 1])
            self.counts[bucket] += upto - begin
            self.sum_s += (longest + least) / 2 * (upto - begin)
            begin = upto
            if begin < end:
                longest = now - since(tickets[begin])

    def describe(self) -> dict[str, Any]:
        """For the status document."""
        return {"counts": list(self.counts), "sum_s": self.sum_s}


class ModelMetrics:
    """What is counted of one model, over all its generations.

    Args:
        model: Its name; empty for what is of none.

    Attributes:
        model: As above.
        batches: Batches run.
        rows: Rows of those.
        batch_sizes: Batches run, by rows.
        answers: Answers to predictions by code; `OK` for results.
        stages: Time of each stage of the requests that ran; of one split over batches, of each part.
        closed: Batches by why they went (`Slot.closed_by`).
        restarts: Workers started again by why the one before ended (`End.cause`), or `replaced`.
    """

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.batches = 0
        self.rows = 0
        self.batch_sizes: dict[int, int] = {}
        self.answers: dict[str, int] = {}
        self.stages = {stage: Histogram() for stage in STAGES}
        self.closed: dict[str, int] = {}
        self.restarts: dict[str, int] = {}

    def answered(self, code: str, count: int = 1) -> None:
        """So many requests got their answer."""
        self.answers[code] = self.answers.get(code, 0) + count

    def restarted(self, cause: str) -> None:
        """A worker takes the place of one that ended."""
        self.restarts[cause] = self.restarts.get(cause, 0) + 1

    def batch_answered(self, slot: Slot) -> None:
        """A worker answered for a batch, well or not."""
        rows, closed_by = slot.rows, slot.closed_by
        self.batches += 1
        self.rows += rows
        self.batch_sizes[rows] = self.batch_sizes.get(rows, 0) + 1
        self.closed[closed_by] = self.closed.get(closed_by, 0) + 1

    def replies_sent(self, slot: Slot, tickets: Sequence[Ticket], answered_at: float, sent_at: float) -> None:
        """The results of a batch are on their way.

        Args:
            slot: Not given back yet.
            tickets: Whose they are.
            answered_at: When the worker's answer was heard, in monotonic seconds.
            sent_at: When the last of the replies had left.
        """
        if not tickets:
            return
        count = sum([ticket.requests for ticket in tickets])
        stages = self.stages
        dispatched_at = slot.dispatched_at
        turn = tickets[0].turn
        stages["run"].add(answered_at - dispatched_at, count)
        stages["reply"].add(sent_at - answered_at, count)
        if tickets[-1].turn is turn:
            stages["queue"].add(dispatched_at - turn.ended, count)
            stages["total"].add(sent_at - turn.started, count)
        elif slot.runs == 1 and count == len(tickets):
            stages["queue"].add_since(tickets, _ENDED, dispatched_at)
            stages["total"].add_since(tickets, _STARTED, sent_at)
        else:  # few tickets for many requests; or rows that run again, which may have changed their order
            for ticket in tickets:
                stages["queue"].add(dispatched_at - ticket.turn.ended, ticket.requests)
                stages["total"].add(sent_at - ticket.turn.started, ticket.requests)
