"""Running the requests of failed batches again until the guilty are alone. Runs in the front.

`pool.front.inquest` says which requests run next; this does it. A failed batch keeps its slot until the
last of its requests is answered: their rows are copied out once, and for each run those that take part are
written back. What raised runs again on any worker, since the worker is none the worse for it. What crashed
or hung runs on the quarantine worker, one run at a time, while the others go on serving.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from pool.errors import PoolError, WorkerLost
from pool.front.crew import Crew
from pool.front.generation import Generation
from pool.front.inquest import Inquest
from pool.front.slots import Slot, Ticket
from pool.front.states import WorkerState
from pool.front.workers import Worker


class Trial:
    """One failed batch.

    Attributes:
        inquest: Who may be guilty.
        rows: Of each ticket, by its id.
        ran: Who takes part in the present run.
        error: What the last run that failed ended with.
        is_deadly: Whether a run has ended its worker.
    """

    def __init__(self, tickets: list[Ticket], rows: dict[int, list[bytes]], error: PoolError) -> None:
        self.inquest = Inquest(tickets)
        self.rows = rows
        self.ran: list[Ticket] = []
        self.error = error
        self.is_deadly = False


class Trials:
    """The failed batches of one generation.

    Args:
        generation: Whose.
        replicas: Its workers.
        refuse: Settles tickets and answers them with an error.
        run: Gives a slot to the quarantine worker.

    Attributes:
        blamed: Requests found guilty.
        runs: Extra runs.
    """

    def __init__(
        self,
        generation: Generation,
        replicas: Crew,
        refuse: Callable[[Iterable[Ticket], PoolError], None],
        run: Callable[[Slot, Worker], None],
    ) -> None:
        self._generation = generation
        self._replicas = replicas
        self._refuse = refuse
        self._run = run
        self._waiting: deque[Slot] = deque()  # for the quarantine worker
        self.blamed = 0
        self.runs = 0

    def begin(self, slot: Slot, error: PoolError, is_deadly: bool) -> None:
        """A batch failed: `slot` is HELD, and holds the rows of its tickets."""
        slot.split()
        tickets = [ticket for ticket in slot.tickets if not ticket.is_settled]
        rows = {id(ticket): self._generation.read_rows(slot, ticket) for ticket in tickets}
        slot.trial = Trial(tickets, rows, error)
        slot.trial.is_deadly = is_deadly
        self.advance(slot)

    def passed(self, slot: Slot) -> None:
        """A run went well, and its answers are on their way."""
        self.runs += 1
        slot.trial.inquest.passed(slot.trial.ran)

    def failed(self, slot: Slot, error: PoolError, *, is_deadly: bool, is_own_doing: bool) -> None:
        """A run failed: `slot` is HELD again."""
        trial: Trial = slot.trial
        self.runs += 1
        trial.error = error
        trial.is_deadly |= is_deadly
        if is_own_doing:
            trial.inquest.failed(trial.ran)
        else:
            trial.inquest.undecided(trial.ran)
        self.advance(slot)

    def again(self, slot: Slot) -> None:
        """The quarantine worker died before it began with a run: `slot` is HELD again."""
        self._waiting.appendleft(slot)
        self.feed()

    def advance(self, slot: Slot) -> None:
        """Have the next run of a HELD slot wait for its worker; or release it, when all are answered."""
        if self._prepare(slot):
            if slot.trial.is_deadly:
                self._waiting.append(slot)
            else:
                self._generation.batcher.requeue(slot)
        self.feed()

    def _prepare(self, slot: Slot) -> bool:
        """Fill a HELD slot for its next run; False when there is none and the slot was released."""
        trial: Trial = slot.trial
        trial.ran = trial.inquest.next()
        self._blame(trial)
        if not trial.ran:
            self._generation.batcher.release(slot)
            return False
        running = {id(ticket) for ticket in trial.ran}
        aside = [ticket for ticket in trial.inquest.rest() if id(ticket) not in running]
        self._generation.refill(slot, [(ticket, trial.rows[id(ticket)]) for ticket in trial.ran], aside)
        return True

    def _blame(self, trial: Trial) -> None:
        guilty = [ticket for ticket in trial.inquest.guilty if not ticket.is_settled]
        self.blamed += len(guilty)
        if trial.is_deadly:
            now = time.monotonic()
            for ticket in guilty:
                rows = trial.rows[id(ticket)]
                self._generation.poison.remember(ticket.route.layout.number, rows, trial.error.message, now)
        self._refuse(guilty, trial.error)

    def feed(self) -> None:
        """Give the quarantine worker its next run, if it can take one."""
        while self._waiting:
            worker = self._replicas.call_quarantine()
            if worker.state is not WorkerState.READY:
                return
            slot = self._waiting.popleft()
            # Some may have been settled while they waited.
            if not slot.has_ballast or self._prepare(slot):
                self._run(slot, worker)
        self._replicas.dismiss_quarantine()

    def give_up(self, reason: str) -> None:
        """There is no quarantine worker to be had: what waits for it gets its error now."""
        while self._waiting:
            slot = self._waiting.popleft()
            lost = WorkerLost(f"{slot.trial.error.message}; and could not be run again: {reason}")
            self._refuse(slot.trial.inquest.rest(), lost)
            self._generation.batcher.release(slot)

    def drop(self, error: PoolError) -> None:
        """The engine stops: answer what waits."""
        while self._waiting:
            slot = self._waiting.popleft()
            self._refuse(slot.trial.inquest.rest(), error)
            self._generation.batcher.release(slot)
