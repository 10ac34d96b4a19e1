"""Which request of a batch that failed is to blame: the search, as a pure state machine. Runs in the front.

A batch that crashed its worker, hung or raised holds at least one request that did it, or none: a worker may
be killed by somebody else. The others must not suffer. So its requests run again in smaller batches:

    inquest = Inquest(tickets)
    while tickets := inquest.next():            # run exactly these, alone
        …they went well…  inquest.passed(tickets)          they have their answers
        …they failed…     inquest.failed(tickets)
        …cannot be told…  inquest.undecided(tickets)       the worker was killed from outside, say
    inquest.guilty                              # each gets the error

The *suspects* are a set known to fail. Half of them run: if they fail they are the suspects now, and the
other half joins the *unheard*, of whom nothing is known; if they pass, the other half are the suspects. A
last suspect is guilty if a run of this inquest has failed (the fault is no accident); otherwise it runs
alone first. Then all the unheard run together, and if they fail, are suspects in turn.

Bound: n requests with one guilty among them take at most log2(n) halvings and one more run, either of the
last suspect or of the unheard: there are no unheard if no half has failed. Each further guilty one takes
at most as many again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pool.front.slots import Ticket

# Runs in a row of the same tickets that end by nothing of their own before that is held against them.
_UNDECIDED_MAX = 2

# Guilty ones after which, if none has passed, the rest are not tried: it is the model that fails.
GUILTY_MAX = 8


class Inquest:
    """The search in one failed batch.

    Args:
        tickets: Those of the batch that are not settled.

    Attributes:
        guilty: Found so far; the caller takes them out.
        runs: Extra runs so far.
    """

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._suspects = list(tickets)
        self._unheard: list[Ticket] = []
        self._has_failed = False  # a set that the suspects are part of failed in this inquest
        self._has_passed = False
        self._undecided = 0
        self.guilty: list[Ticket] = []
        self.runs = 0

    def next(self) -> list[Ticket]:
        """The tickets to run now, all unsettled; none when the search is over."""
        self._suspects = [ticket for ticket in self._suspects if not ticket.is_settled]
        self._unheard = [ticket for ticket in self._unheard if not ticket.is_settled]
        if len(self._suspects) == 1 and self._has_failed:
            self.guilty.append(self._suspects.pop())
        if len(self.guilty) >= GUILTY_MAX and not self._has_passed:
            self.guilty += self._suspects + self._unheard
            self._suspects, self._unheard = [], []
        if self._suspects:
            return self._suspects[: (len(self._suspects) + 1) // 2]
        return list(self._unheard)

    def passed(self, tickets: Sequence[Ticket]) -> None:
        """These ran well; the caller has answered them."""
        self._has_passed = True
        self.runs += 1
        self._undecided = 0
        ran = {id(ticket) for ticket in tickets}
        self._suspects = [ticket for ticket in self._suspects if id(ticket) not in ran]
        self._unheard = [ticket for ticket in self._unheard if id(ticket) not in ran]

    def failed(self, tickets: Sequence[Ticket]) -> None:
        """These failed when they ran."""
        self.runs += 1
        self._undecided = 0
        self._has_failed = True
        ran = {id(ticket) for ticket in tickets}
        self._unheard = [ticket for ticket in (*self._unheard, *self._suspects) if id(ticket) not in ran]
        self._suspects = list(tickets)

    def undecided(self, tickets: Sequence[Ticket]) -> None:
        """Their run ended by something that may not have been their doing: once more, then it counts."""
        self._undecided += 1
        if self._undecided < _UNDECIDED_MAX:
            self.runs += 1
            return
        self.failed(tickets)

    def rest(self) -> list[Ticket]:
        """Unsettled tickets of which nothing is known yet, for when the search has to end early."""
        return [ticket for ticket in (*self._suspects, *self._unheard) if not ticket.is_settled]
