"""Workers whose lives are told by the front that leads. Runs in a follower.

What batches go through is a `Crew`'s, as everywhere. Here workers only come, leave and end as the lead says;
what is to become of one (killed, replaced, called for quarantine) is asked of it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from pool.config import Placement
from pool.front import link
from pool.front.crew import Crew, Listener
from pool.front.generation import Generation
from pool.front.slots import Slot
from pool.front.states import WorkerEvent, WorkerState
from pool.front.workers import End, Worker
from pool.front.zygotes import Child
from pool.shm.board import Board

_NOBODY = -1  # the id of no worker
_STOP_GRACE_S = 2.0  # as the lead has for its workers


class LedReplicas(Crew):
    """The workers of one generation, as a follower has them. An id is of one process, and is not used again.

    Args:
        generation: What they serve.
        listener: Told what happens.
        board: Where fronts note what they gave.
        number: Of the generation, for the lead.
        tell: Tells the lead.
    """

    def __init__(
        self,
        generation: Generation,
        listener: Listener,
        board: Board,
        number: int,
        tell: Callable[[Any], None],
    ) -> None:
        super().__init__(generation, listener, board)
        self._number = number
        self._tell = tell
        self._absent = Worker(_NOBODY, 0, "quarantine", "", Placement())
        self._has_called = False
        self._worn: set[int] = set()
        self._idle: asyncio.Future[None] | None = None
        self._before: dict[int, tuple[int, int, float]] = {}  # batches, rows, seconds of those that are gone

    @property
    def is_lost(self) -> bool:
        """The lead says so (`GenerationFailed`)."""
        return False

    async def start(self) -> None:
        """Nothing: the lead starts them."""

    def resize(self) -> None:
        """Nothing: the lead does."""

    # -- what the lead tells ------------------------------------------------------------------------

    def joined(self, told: link.WorkerJoined, fds: Sequence[int]) -> None:
        """A process takes batches.

        Args:
            told: Who it is.
            fds: The front's end of the doorbell, the far end, the regions' socket; owned from now on.
        """
        worker = Worker(told.worker, told.index, told.role, told.device, Placement())
        worker.child = Child(self._loop)
        worker.child.pid = told.pid
        worker.bell, worker.far_bell, worker.loans = (socket.socket(fileno=fd) for fd in fds)
        worker.bell.setblocking(False)
        worker.loans.setblocking(False)
        worker.move(WorkerEvent.LOAD)
        self._by_id[worker.id] = worker
        if worker.role == "quarantine":
            self.quarantine = worker
        else:
            self.workers.append(worker)
        self._loop.add_reader(worker.bell.fileno(), self._hear, worker, worker.bell)
        self._listener.worker_ready(worker)

    def leaving(self, id_: int) -> None:
        """A process takes no more."""
        worker = self._by_id.get(id_)
        if worker is None:
            return
        if self.quarantine is worker:
            self.quarantine = None
        else:
            worker.role = "retiring"
        self._listener.worker_leaving(worker)
        worker.move(WorkerEvent.DRAIN)

    def ended(self, id_: int, end: End) -> None:
        """A process is gone: nothing writes to this front's slots any more."""
        worker = self._by_id.get(id_)
        if worker is not None:
            self._end(worker, end)

    def _end(self, worker: Worker, end: End) -> None:
        assert worker.bell is not None, "hung up only here"
        assert worker.child is not None, "it had a process"
        while self._hear(worker, worker.bell):  # what it rang before it died counts
            pass
        self._loop.remove_reader(worker.bell.fileno())
        worker.child.end(0)
        worker.hang_up()
        slot, ahead = self._take_batches(worker)
        if self.quarantine is worker:
            self.quarantine = None
        if worker in self.workers:
            self.workers.remove(worker)
            batches, rows, busy_s = self._before.get(worker.index, (0, 0, 0.0))
            self._before[worker.index] = (
                batches + worker.batches,
                rows + worker.rows,
                busy_s + worker.busy_s,
            )
        is_leaving = worker.state is WorkerState.DRAINING
        worker.move(WorkerEvent.STOP if is_leaving else WorkerEvent.EXIT)
        self._listener.worker_ended(worker, slot, ahead, end)
        self._worn.discard(worker.id)
        del self._by_id[worker.id]

    # -- what is asked of the lead ------------------------------------------------------------------

    def interrupt(self, slot: Slot, timeout_s: float) -> None:
        """The batch in this slot has run for too long: have its worker killed."""
        worker = None if slot.worker is None else self._by_id.get(slot.worker)
        if worker is not None and worker.slot is slot:
            reason = f"no answer for its batch within timeout_ms = {timeout_s * 1e3:g}"
            self._tell(link.Interrupt(self._number, worker.id, reason))

    def replace(self, worker: Worker, reason: str) -> None:
        """Have a successor started."""
        if worker.id not in self._worn:
            self._worn.add(worker.id)
            self._tell(link.Worn(self._number, worker.id, reason))

    def call_quarantine(self) -> Worker:
        """The quarantine worker, if it is there; else one that is not ready, and the lead has it come."""
        if not self._has_called:
            self._has_called = True
            self._tell(link.CallQuarantine(self._number))
        return self.quarantine or self._absent

    def dismiss_quarantine(self) -> None:
        """Nothing here waits for it."""
        if self._has_called:
            self._has_called = False
            self._tell(link.DismissQuarantine(self._number))

    def _is_ready(self, worker: Worker) -> None:
        raise AssertionError(f"worker {worker.index} said READY to a follower")

    def _cannot_load(self, worker: Worker, reason: str) -> None:
        raise AssertionError(f"worker {worker.index} said to a follower that it cannot load: {reason}")

    def _heir(self, worker: Worker) -> Worker:
        return worker  # `work` adds up by place

    # -- the end ------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Wait a moment for what they run, let go of them, who belong to the lead, and say so."""
        if self._has_batches():
            self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=_STOP_GRACE_S)
        for worker in self.everyone():
            self._end(worker, End("the server is stopping", False, "killed"))
        self._tell(link.Retired(self._number))

    def _has_batches(self) -> bool:
        return any(worker.slot is not None for worker in self._by_id.values())

    def finished(self, worker: Worker, now: float) -> None:
        """As of every crew; and `stop` may wait for it."""
        super().finished(worker, now)
        if self._idle is not None and not self._idle.done() and not self._has_batches():
            self._idle.set_result(None)

    def work(self, now: float) -> dict[int, tuple[int, int, float]]:
        """Batches, rows and busy seconds by the index of the worker, of all processes there were."""
        found = dict(self._before)
        for worker in self.workers:
            batches, rows, busy_s = found.get(worker.index, (0, 0, 0.0))
            found[worker.index] = (
                batches + worker.batches,
                rows + worker.rows,
                busy_s + worker.busy_until(now),
            )
        return found
