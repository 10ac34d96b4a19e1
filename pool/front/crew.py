"""The workers of one generation, as far as batches go: given, taken back, answered. Runs in each front.

What starts workers and ends them differs. The front that leads forks them (`pool.front.replicas`); another
front is told of their lives by that one (`pool.front.led`). Either decides nothing about batches: it tells
whoever has them, its `Listener`, what happened.
"""

from __future__ import annotations

import abc
import asyncio
import socket
from typing import Any, Protocol

from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.slots import Slot
from pool.front.states import WorkerState
from pool.front.workers import End, Worker
from pool.shm import doorbell
from pool.shm.board import Board
from pool.shm.doorbell import Message, Ring

log = Log("pool.replicas")


class Listener(Protocol):
    """What is heard of the workers of a generation."""

    def worker_ready(self, worker: Worker) -> None:
        """It can take a batch."""

    def worker_answered(self, worker: Worker, message: Message) -> None:
        """It rang back."""

    def worker_leaving(self, worker: Worker) -> None:
        """It takes no more batches."""

    def worker_ended(self, worker: Worker, slot: Slot | None, ahead: Slot | None, end: End) -> None:
        """Its process is gone and waited for; `slot` is what it was running, `ahead` what was to follow."""


class Crew(abc.ABC):
    """The workers of one generation.

    Args:
        generation: What they serve.
        listener: Told what happens.
        board: Where fronts that share them note what they gave; None if there is but one.

    Attributes:
        workers: Those that serve, by index.
        quarantine: The worker for what may kill it, while there is one.
        recycled: Workers replaced because of their size or age.
    """

    def __init__(self, generation: Generation, listener: Listener, board: Board | None) -> None:
        self._generation = generation
        self._listener = listener
        self._board = board
        self._loop = asyncio.get_running_loop()
        self._by_id: dict[int, Worker] = {}
        self.workers: list[Worker] = []
        self.quarantine: Worker | None = None
        self.recycled = 0

    def everyone(self) -> list[Worker]:
        """All workers, also those beside the places of the config."""
        return list(self._by_id.values())

    def find(self, id_: int) -> Worker:
        """The worker with that id."""
        return self._by_id[id_]

    @property
    def is_lost(self) -> bool:
        """Whether all workers were given up."""
        return all(worker.state is WorkerState.FAILED for worker in self.workers)

    # -- lives --------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def start(self) -> None:
        """Start all workers and wait until each has said READY.

        Raises:
            ModelLoadError: one of them cannot load the model, or keeps dying.
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Let the workers go: each leaves after the batch it runs; those that do not are killed."""

    @abc.abstractmethod
    def resize(self) -> None:
        """Have as many serving workers as the config asks for now, each with the threads that fall to it."""

    @abc.abstractmethod
    def replace(self, worker: Worker, reason: str) -> None:
        """Start a successor for a serving worker, which leaves when that is ready."""

    @abc.abstractmethod
    def interrupt(self, slot: Slot, timeout_s: float) -> None:
        """The batch in this slot has run for too long: kill its worker."""

    @abc.abstractmethod
    def call_quarantine(self) -> Worker:
        """The quarantine worker, started if there is none; `worker_ready` tells when it can take a batch."""

    @abc.abstractmethod
    def dismiss_quarantine(self) -> None:
        """Nothing waits for the quarantine worker: it leaves unless it is called again soon."""

    @abc.abstractmethod
    def _is_ready(self, worker: Worker) -> None:
        """A worker has loaded and warmed up."""

    @abc.abstractmethod
    def _cannot_load(self, worker: Worker, reason: str) -> None:
        """A worker could not load the model."""

    # -- batches ------------------------------------------------------------------------------------

    def run(self, worker: Worker, slot: Slot) -> None:
        """Ring a worker's doorbell: `slot` is its now, to run at once or after the one that it has."""
        is_lent = bool(slot.loans) and self._lend(worker, slot)
        if self._board is not None:
            self._board.add(worker.index, 1)
            slot.answers = self._board.answers(worker.index)
        try:
            worker.run(slot, Ring.RUN_LENT if is_lent else Ring.RUN)
        except OSError as e:  # it is dying: its end is about to be seen, and the slot recovered then
            log.warning("doorbell does not ring", **self._who(worker), reason=e.strerror)

    def _lend(self, worker: Worker, slot: Slot) -> bool:
        """Have a worker run a batch where it lies; False if that cannot be, and it lies in its slot now."""
        if self._generation.can_lend(slot):
            try:
                worker.lend(slot, self._generation.arena)
            except OSError as e:
                log.debug("region not lent", **self._who(worker), reason=e.strerror)
            else:
                return True
        self._generation.settle_loans(slot)
        return False

    def recall(self, slot: Slot) -> Slot | None:
        """Take back the slot that a worker has ahead; gives what was taken back (`Worker.recall`)."""
        assert slot.worker is not None
        worker = self._by_id[slot.worker]
        assert worker.ahead is slot, "not what the worker has ahead"
        taken = worker.recall()
        if taken is not None and self._board is not None:
            self._board.add(worker.index, -1)
        return taken

    def finished(self, worker: Worker, now: float) -> None:
        """The worker answered for its slot; it can take another if it has none ahead."""
        done = worker.finish()
        counted = worker if worker.role != "retiring" else self._heir(worker)
        counted.batches += 1
        counted.rows += done.rows
        began = max(done.dispatched_at, worker.answered_at)
        if self._board is not None:
            self._board.answered(worker.index)
            # Before that it had batches of other fronts, or none.
            began = max(began, min(self._generation.arena.read_began_s(done.index), now))
        counted.busy_s += now - began
        worker.answered_at = now
        most = self._generation.config.max_batches_per_worker
        if most is not None and worker.role == "serving" and worker.batches_now >= self._part_of(most):
            self.replace(worker, f"it has run {worker.batches_now} batches")

    def _heir(self, worker: Worker) -> Worker:
        """For whom it counts what a retiring worker still runs: whoever has its place."""
        return self.workers[worker.index] if worker.index < len(self.workers) else worker

    def _part_of(self, most: int) -> int:
        """What of a limit for all fronts falls to this one."""
        return most if self._board is None else -(-most // self._board.fronts)

    def _hear(self, worker: Worker, bell: socket.socket) -> bool:
        """Take one message; gives whether there may be more, which the loop will tell as well."""
        try:
            message = doorbell.answer(bell)
        except BlockingIOError:
            return False
        if message is None:  # both ends are closed: it was seen gone
            self._loop.remove_reader(bell.fileno())
            return False
        if message.kind == Ring.READY:
            self._is_ready(worker)
        elif message.kind == Ring.LOAD_ERROR:
            self._cannot_load(worker, message.text)
        else:
            self._listener.worker_answered(worker, message)
        return True

    def _take_batches(self, worker: Worker) -> tuple[Slot | None, Slot | None]:
        """What a worker that is gone was running, and what was to follow."""
        slot, ahead = worker.slot, worker.ahead
        worker.slot = worker.ahead = None
        if self._board is not None:
            self._board.add(worker.index, -((slot is not None) + (ahead is not None)))
        return slot, ahead

    def _who(self, worker: Worker) -> dict[str, Any]:
        """The fields by which the log names a worker."""
        return {"model": self._generation.model, "worker": worker.index, "role": worker.role}
