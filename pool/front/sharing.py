"""A generation whose workers serve several fronts, and who each of them is to each. Runs in the lead.

The lead makes both ends of every doorbell. A worker gets one of them, over the socket at which fronts join it
(`pool.shm.joining`); the follower gets the other one, and the first as well: what lies unread in it can be
taken back.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Callable

from pool.front import link
from pool.front.generation import Generation
from pool.front.link import Link
from pool.front.logs import Log
from pool.front.states import WorkerState
from pool.front.tallies import Tally
from pool.front.workers import End, Worker
from pool.front.zygotes import Child
from pool.shm import doorbell, joining, loans
from pool.shm.board import Board

log = Log("pool.followers")

_worker_numbers = itertools.count(1)  # of processes, in each follower they joined


class SharedGeneration:
    """A generation whose workers serve several fronts; hears of their lives (`Audience`).

    Args:
        number: By which followers know it.
        generation: Itself.
        board: Where fronts note what they gave.
        lives: Gives the followers there are, which are told.
    """

    def __init__(
        self, number: int, generation: Generation, board: Board, lives: Callable[[], list[Life]]
    ) -> None:
        self.number = number
        self.generation = generation
        self.board = board
        self.failure = ""
        self.ready: dict[Worker, Child] = {}
        self.is_ending = False
        self._lives = lives

    def worker_ready(self, worker: Worker) -> None:
        """It can take batches of all fronts."""
        assert worker.child is not None, "a worker that is ready has a process"
        self.ready[worker] = worker.child
        for life in self._lives():
            life.join(self, worker)

    def worker_leaving(self, worker: Worker) -> None:
        """It takes no more batches."""
        if self.ready.pop(worker, None) is not None:
            for life in self._lives():
                life.tell_leaving(self, worker)

    def worker_ended(self, worker: Worker, end: End) -> None:
        """Its process is gone and waited for."""
        self.ready.pop(worker, None)
        for life in self._lives():
            life.tell_ended(self, worker, end)
            if worker.role == "quarantine" and worker.state is WorkerState.FAILED:
                life.link.send(link.QuarantineFailed(self.number, end.how))


class Life:
    """One process of a follower.

    Args:
        front: The follower's number.
        child: The process.
        process: The same, to be waited for.
    """

    def __init__(self, front: int, child: Child, process: subprocess.Popen[bytes]) -> None:
        self.front = front
        self.child = child
        self.process = process
        self.link: Link
        self.heard_at = self.started_at = time.monotonic()
        self.arenas: dict[int, int] = {}  # memfds, by generation
        self.joined: dict[int, tuple[SharedGeneration, Worker, Child]] = {}
        self.numbers: dict[tuple[int, int], int] = {}  # of `joined`, by generation and worker
        self.retired: dict[int, asyncio.Future[None]] = {}  # by generation
        self.version = 0  # of what it serves; 0 for nothing yet
        self.changed = asyncio.Event()  # set when it serves something else, or has ended
        self.drained: asyncio.Future[bool] | None = None
        self.counted: Tally = {}
        self.counts = 0
        self.endpoints: tuple[str, ...] = ()
        self.lock = asyncio.Lock()

    def lacks(self, shared: SharedGeneration) -> bool:
        """Whether it was not told of a generation that goes on."""
        return shared.number not in self.arenas and not shared.is_ending

    def join(self, shared: SharedGeneration, worker: Worker) -> None:
        """Have a worker serve this follower, if it knows the generation."""
        arena = self.arenas.get(shared.number)
        if arena is None or worker.joins is None or worker.child is None:
            return
        slots, slot_bytes = len(shared.generation.arena.slots), shared.generation.arena.slot_bytes
        number = next(_worker_numbers)
        sockets: list[socket.socket] = []
        try:
            sockets += doorbell.make_pair()
            sockets += loans.make_pair()
            bell, far_bell, lender, borrower = sockets
            joining.join(worker.joins, slots, slot_bytes, [far_bell.fileno(), borrower.fileno(), arena])
            told = link.WorkerJoined(
                shared.number, number, worker.index, worker.role, worker.device, worker.child.pid or 0
            )
            self.link.send(told, fds=[bell.fileno(), far_bell.fileno(), lender.fileno()])
        except OSError as e:  # it does without, until the worker is another one
            log.warning(
                "a worker cannot serve a front", worker=worker.index, front=self.front, reason=e.strerror
            )
            return
        finally:
            for sock in sockets:
                sock.close()
        self.joined[number] = (shared, worker, worker.child)
        self.numbers[shared.number, worker.id] = number

    def tell_leaving(self, shared: SharedGeneration, worker: Worker) -> None:
        """A worker takes no more batches."""
        number = self.numbers.get((shared.number, worker.id))
        if number is not None:
            self.link.send(link.WorkerLeaving(shared.number, number))

    def tell_ended(self, shared: SharedGeneration, worker: Worker, end: End) -> None:
        """A worker is gone."""
        number = self.numbers.pop((shared.number, worker.id), None)
        if number is not None:
            del self.joined[number]
            self.link.send(link.WorkerEnded(shared.number, number, end.how, end.is_own_doing, end.cause))

    def close(self) -> None:
        """The process is gone."""
        self.link.close()
        for fd in self.arenas.values():
            os.close(fd)
        self.arenas.clear()
        for future in self.retired.values():
            if not future.done():
                future.set_result(None)
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(False)
        self.changed.set()
