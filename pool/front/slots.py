"""What the batcher keeps books of: slots, the tickets in them, and whose rows they are. Pure; front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import msgspec

from pool.front.states import SlotState
from pool.wire import PART

LANE_BITS = 2  # of a key: its priority
LANES = 1 << LANE_BITS


class Account:
    """Rows that one client has in the slots of one model.

    Attributes:
        rows: Placed and not given back yet, expired ones included: they take room all the same.
    """

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows = 0


class Turn:
    """A turn of the front's loop in which requests were received.

    Attributes:
        started: When it began to read them.
        ended: When the last of them lay in its slot; `started` until then.
    """

    __slots__ = ("ended", "started")

    def __init__(self, started: float) -> None:
        self.started = self.ended = started


class Ticket(msgspec.Struct, eq=False):
    """One admitted request's place in one batch (a request split over batches has one for each).

    Neighbours of a bundle that have one deadline share a ticket (`pool.front.parts`) until something happens
    to one of them: an object each would cost the front more than all else that is done for them.

    The batcher reads and writes `rows`, `start`, `deadline`, `account` and `is_settled`; the rest is the
    shell's.

    Attributes:
        sink: Who takes the answer.
        client: The sink's name for the caller.
        id: The sink's name for the request; None where there are several.
        route: What the request was resolved to.
        rows: How many rows; may be 0.
        start: Its first row in the slot, set by `commit`.
        deadline: When its answer stops being wanted; `inf` for never.
        turn: When it was received.
        key: What it shares with the requests it may run with.
        account: Whose rows they are.
        is_settled: Whether it was answered already (expired or withdrawn): its rows are ballast.
        requests: How many it stands for.
        table: Of several: their ids and rows, as a bundle of answers names them (`docs/wire.md` 3.9).
    """

    sink: Any
    client: Any
    id: Any
    route: Any
    rows: int
    deadline: float
    turn: Turn
    key: int
    account: Account
    start: int = 0
    is_settled: bool = False
    requests: int = 1
    table: bytes = b""

    @property
    def ids(self) -> list[Any]:
        """Of its requests."""
        return [id_ for id_, _, _ in PART.iter_unpack(self.table)] if self.table else [self.id]

    def split(self) -> list[Ticket]:
        """A ticket for each of its requests: itself, if there is but one."""
        if not self.table:
            return [self]
        alone = []
        start = self.start
        for id_, _, rows in PART.iter_unpack(self.table):
            alone.append(
                Ticket(
                    self.sink,
                    self.client,
                    id_,
                    self.route,
                    rows,
                    self.deadline,
                    self.turn,
                    self.key,
                    self.account,
                    start,
                    self.is_settled,
                )
            )
            start += rows
        return alone


class Slot:
    """The bookkeeping of one slot; its bytes are the arena's.

    Attributes:
        index: Its position in the arena.
        state: Who owns it (`pool.front.states`).
        key: What requests must share to be placed in it.
        capacity: Rows it holds for that key.
        rows: Rows placed.
        tickets: In order of placement.
        aside: Tickets of a batch that failed which do not run in the present one.
        opened_at: When its first row was placed.
        predicted_at: When its batch was predicted to be done, as its first row was placed.
        has_waited: Whether no worker was ready then.
        place: The index of `worker` within the model.
        answered_at: When `worker` answered.
        given_at: When it was given to `worker`.
        dispatched_at: When that began with it: when it was given, or when the batch before was answered.
        earliest_deadline: Of its unsettled tickets.
        generation: Counts dispatches: a stale answer carries an old number.
        pins: The shell's count of answers that still read the slot's bytes.
        runs: How often these rows were dispatched.
        trial: The shell's note on a batch that failed.
        loans: The shell's note on where its rows lie, one after the other, if that is not in the slot.
        is_overdue: Whether its worker took too long and was given up.
        closed_by: Why its batch went: `full`, `idle_worker` (it had room, but a worker had nothing to do),
            `overdue` (`max_queue_delay_s` passed), `no_room` (none for the next strings), `rerun`.
        has_ballast: Whether a ticket was settled before it ran: its rows need not run.
        answers: The shell's note on how many batches its worker had answered for when it was last looked at.
        spared: The shell's count of workers that died with it before they had begun with it.
    """

    __slots__ = (
        "answered_at",
        "answers",
        "aside",
        "capacity",
        "closed_by",
        "dispatched_at",
        "earliest_deadline",
        "generation",
        "given_at",
        "has_ballast",
        "has_waited",
        "index",
        "is_overdue",
        "key",
        "loans",
        "opened_at",
        "pins",
        "place",
        "predicted_at",
        "rows",
        "runs",
        "spared",
        "state",
        "tickets",
        "trial",
        "worker",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = SlotState.FREE
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.key = 0
        self.capacity = 0
        self.rows = 0
        self.tickets: list[Ticket] = []
        self.aside: list[Ticket] = []
        self.opened_at = 0.0
        self.predicted_at = 0.0
        self.has_waited = False
        self.given_at = 0.0
        self.dispatched_at = 0.0
        self.answered_at = 0.0
        self.place = -1
        self.earliest_deadline = inf
        self.worker: int | None = None
        self.pins = 0
        self.runs = 0
        self.trial: Any = None
        self.loans: Sequence[Any] = ()
        self.is_overdue = False
        self.has_ballast = False
        self.spared = 0
        self.answers = 0
        self.closed_by = ""

    @property
    def priority(self) -> int:
        """Of its tickets."""
        return self.key & (LANES - 1)

    @property
    def layout(self) -> int:
        """The number of its layout."""
        return self.key >> LANE_BITS

    def split(self) -> None:
        """Give each of its requests a ticket of its own, for something happens to one of them."""
        self.tickets = [alone for ticket in self.tickets for alone in ticket.split()]

    def everyone(self) -> Iterator[Ticket]:
        """Its tickets, those set aside included."""
        yield from self.tickets
        yield from self.aside
