"""The workers of one generation: started, replaced, started again when they die. Runs in the front.

Besides the places that the config asks for there may be, for a while: a *successor*, which takes over a
place when it is ready (its worker has grown too large, or old); a *retiring* worker, which leaves after the
batch it runs; and the *quarantine* worker, which runs what may kill it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol

from pool.errors import ModelLoadError, PoolError
from pool.front.crew import Crew, Listener
from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.slots import Slot
from pool.front.states import WorkerEvent, WorkerState
from pool.front.supervisor import Supervisor, place_worker
from pool.front.workers import End, Worker, backoff_s, fork_worker, private_bytes
from pool.front.zygotes import Child
from pool.shm import control, doorbell
from pool.shm.board import Board
from pool.shm.doorbell import Message, Ring

log = Log("pool.replicas")

# A worker that dies this many times in a row before it was ready is given up: it cannot serve, and
# starting it for ever only burns the cores of those that can. Deaths in a batch do not count: the worker
# had just run a sample batch well.
CRASH_LOOP_LIMIT = 5
_STABLE_S = 10.0  # ready for this long, it was no failed start, however little work there was
# Workers leave within milliseconds of being asked; one that does not is stuck in native code.
_STOP_GRACE_S = 2.0
# Between asking an overdue worker where it is and killing it: to write a traceback takes milliseconds.
_TRACEBACK_GRACE_S = 0.25
# The quarantine worker stays this long for the next batch that fails: to start one takes a second.
_QUARANTINE_LINGER_S = 10.0
_MEMORY_CHECK_S = 1.0

LEAD = 0  # the front that has the workers; others are numbered from 1


class Audience(Protocol):
    """Who passes the lives of workers on to other fronts."""

    @property
    def board(self) -> Board:
        """Where all of them note what they gave."""

    def worker_ready(self, worker: Worker) -> None:
        """It can take batches of all fronts."""

    def worker_leaving(self, worker: Worker) -> None:
        """It takes no more batches."""

    def worker_ended(self, worker: Worker, end: End) -> None:
        """Its process is gone and waited for."""


class Replicas(Crew):
    """The workers of one generation, forked here.

    Args:
        supervisor: Provides zygotes.
        generation: What they serve.
        weights_fd: The shared weights' memfd, or None; owned from now on.
        listener: Told what happens.
        start_timeout_s: Longest a worker may take to be ready.
        audience: Of other fronts that share them; None if there are none.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        generation: Generation,
        weights_fd: int | None,
        listener: Listener,
        start_timeout_s: float,
        audience: Audience | None = None,
    ) -> None:
        super().__init__(generation, listener, None if audience is None else audience.board)
        self._supervisor = supervisor
        self._weights_fd = weights_fd
        self._start_timeout_s = start_timeout_s
        self._audience = audience
        self._tasks: set[asyncio.Task[None]] = set()
        self._all_ready: asyncio.Future[None] = self._loop.create_future()
        self._is_stopping = False
        self._ids = itertools.count()
        self._successors: dict[int, Worker] = {}  # by index
        self._callers: set[int] = set()  # fronts that need the quarantine worker
        self._linger: asyncio.TimerHandle | None = None
        self._memory_timer: asyncio.TimerHandle | None = None
        self.workers = [self._make(i, "serving") for i in range(generation.config.workers)]

    def _make(self, index: int, role: str) -> Worker:
        config = self._generation.config
        devices: Sequence[str] = config.devices or ("",)
        placed = place_worker(config, index)
        worker = Worker(next(self._ids), index, role, devices[index % len(devices)], placed)
        self._by_id[worker.id] = worker
        return worker

    async def start(self) -> None:
        """Start all workers and wait until each has said READY.

        Raises:
            ModelLoadError: one of them cannot load the model, or keeps dying.
        """
        for worker in self.workers:
            await self._start(worker)
        await self._all_ready
        self._check_memory()

    # -- a process's life ---------------------------------------------------------------------------

    async def _start(self, worker: Worker) -> None:
        worker.started_at = time.monotonic()
        worker.ready_s = None
        worker.overdue = ""
        worker.batches_now = worker.piece_rows = 0
        worker.child = None
        try:
            child, bell = await fork_worker(
                self._supervisor, self._generation, self._weights_fd, worker, self._audience is not None
            )
        except (PoolError, OSError) as e:
            reason = e.message if isinstance(e, PoolError) else f"cannot start a worker: {e.strerror}"
            self._after_end(worker, None, End(reason, False, "not_started"), [])
            return
        except asyncio.CancelledError:
            self._after_end(worker, None, End("the server is stopping", False, "not_started"), [])
            raise
        if worker.state is WorkerState.DRAINING:  # meanwhile it was let go
            child.kill()
        self._loop.add_reader(bell.fileno(), self._hear, worker, bell)
        self._loop.call_later(self._start_timeout_s, self._check_started, worker, child)
        self._spawn(self._await_end(worker, child))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _restart(self, worker: Worker) -> None:
        worker.starting = self._spawn(self._start(worker))

    def _cannot_load(self, worker: Worker, reason: str) -> None:
        worker.last_error = reason
        worker.failures = CRASH_LOOP_LIMIT  # loading again would fail again

    def _is_ready(self, worker: Worker) -> None:
        worker.ready_s = time.monotonic() - worker.started_at
        log.info("worker ready", **self._who(worker), pid=worker.pid, took_s=worker.ready_s)
        if worker.state is not WorkerState.STARTING:
            return
        worker.move(WorkerEvent.LOAD)
        if worker.role == "successor":
            self._succeed(worker)
        self._listener.worker_ready(worker)
        if self._audience is not None:
            self._audience.worker_ready(worker)
        started = (WorkerState.READY, WorkerState.BUSY)
        if not self._all_ready.done() and all(w.state in started for w in self.workers):
            self._all_ready.set_result(None)

    def _check_started(self, worker: Worker, child: Child) -> None:
        if worker.child is child and worker.state is WorkerState.STARTING and not child.ended.done():
            self._kill(worker, f"it was not ready within start_timeout_s = {self._start_timeout_s:g}")

    def _kill(self, worker: Worker, reason: str) -> None:
        """Have a worker write where it is to the log, then kill it."""
        child = worker.child
        assert child is not None
        worker.overdue = reason
        child.send(control.TRACEBACK_SIGNAL)
        self._loop.call_later(_TRACEBACK_GRACE_S, child.kill)

    def interrupt(self, slot: Slot, timeout_s: float) -> None:
        """The batch in this slot has run for too long: kill its worker."""
        assert slot.worker is not None
        worker = self._by_id[slot.worker]
        if worker.slot is slot:  # else its end is about to be told
            self._kill(worker, f"no answer for its batch within timeout_ms = {timeout_s * 1e3:g}")

    def kill(self, worker: Worker, child: Child, reason: str) -> None:
        """Another front has waited for too long: kill a worker, if its process is still that one."""
        if worker.child is child and not child.ended.done():
            self._kill(worker, reason)

    async def _await_end(self, worker: Worker, child: Child) -> None:
        code = await child.ended
        if worker.bell is not None:
            while self._hear(worker, worker.bell):  # what it rang before it died counts
                pass
            self._loop.remove_reader(worker.bell.fileno())
        self._after_end(worker, child, *worker.ended(code))

    def _after_end(self, worker: Worker, child: Child | None, end: End, lines: Sequence[str]) -> None:
        died_in = worker.state
        has_batch = died_in is WorkerState.BUSY or (
            self._board is not None and self._board.others(worker.index) > 0
        )
        slot, ahead = self._take_batches(worker)
        if died_in is WorkerState.DRAINING:
            worker.move(WorkerEvent.STOP)
            self._forget(worker)
            self._tell_ended(worker, slot, ahead, end)
            return
        if worker.ready_s is not None and time.monotonic() - worker.started_at > worker.ready_s + _STABLE_S:
            worker.failures = 0
        worker.failures += 1
        if worker.role == "quarantine" and has_batch:
            worker.failures = 0  # to die of what it runs is what it is for
        # A machine that is out of processes or descriptors for a while is no reason to give up for ever.
        is_hopeless = child is not None and not child.refusal and not has_batch
        if worker.failures >= CRASH_LOOP_LIMIT and is_hopeless:
            worker.last_error = worker.last_error or end.how
            worker.move(WorkerEvent.GIVE_UP)
            restart_in_s = None
            if not self._all_ready.done():
                self._all_ready.set_exception(
                    ModelLoadError(f"model {self._generation.model!r}: worker: {worker.last_error}")
                )
        else:
            worker.last_error = end.how
            worker.move(WorkerEvent.EXIT)
            pause = backoff_s(worker.failures, random.random())
            self._loop.call_later(pause, self._retry, worker)
            restart_in_s = pause
        log.error(
            "worker lost",
            **self._who(worker),
            pid=child.pid if child else None,
            how=end.how,
            cause=end.cause,
            batch_rows=slot.rows if slot else 0,
            restart_in_s=restart_in_s,
            is_given_up=worker.state is WorkerState.FAILED or None,
            last_words="\n".join(lines) or None,
        )
        self._tell_ended(worker, slot, ahead, end)
        if worker.state is WorkerState.FAILED:
            self._forget(worker)

    def _tell_ended(self, worker: Worker, slot: Slot | None, ahead: Slot | None, end: End) -> None:
        if self._audience is not None:
            self._audience.worker_ended(worker, end)
        self._listener.worker_ended(worker, slot, ahead, end)

    def _forget(self, worker: Worker) -> None:
        """A worker beside the places of the config is gone for good."""
        if worker.role == "serving":
            return
        del self._by_id[worker.id]
        if self._successors.get(worker.index) is worker:
            del self._successors[worker.index]
        if self.quarantine is worker:
            self.quarantine = None

    def _retry(self, worker: Worker) -> None:
        if self._is_stopping or worker.state is not WorkerState.BACKOFF:
            return
        worker.move(WorkerEvent.RETRY)
        worker.restarts += 1
        self._restart(worker)

    # -- replacing ----------------------------------------------------------------------------------

    def replace(self, worker: Worker, reason: str) -> None:
        """Start a successor for a serving worker, which leaves when that is ready."""
        if worker.index in self._successors or self._is_stopping:
            return
        log.info("worker to be replaced", **self._who(worker), pid=worker.pid, reason=reason)
        successor = self._successors[worker.index] = self._make(worker.index, "successor")
        self._restart(successor)

    def _succeed(self, successor: Worker) -> None:
        old = self.workers[successor.index]
        del self._successors[successor.index]
        successor.role, old.role = "serving", "retiring"
        successor.batches, successor.rows, successor.busy_s = old.batches, old.rows, old.busy_s
        successor.restarts, successor.last_error = old.restarts + 1, old.last_error
        self.workers[successor.index] = successor
        self.recycled += 1
        self._generation.metrics.restarted("replaced")
        self._let_go(old)

    def _let_go(self, worker: Worker) -> None:
        """Have a worker leave after the batch it runs."""
        self._listener.worker_leaving(worker)
        if self._audience is not None:
            self._audience.worker_leaving(worker)
        if worker.state is WorkerState.BACKOFF:
            worker.move(WorkerEvent.STOP)
        elif worker.state in (WorkerState.STARTING, WorkerState.READY, WorkerState.BUSY):
            if worker.state is WorkerState.STARTING and worker.child is not None:
                worker.child.kill()  # it does not listen yet
            worker.move(WorkerEvent.DRAIN)
            if worker.bell is not None:
                with suppress(OSError):  # it is gone already
                    doorbell.ring(worker.bell, Message(Ring.DRAIN))
        if worker.state in (WorkerState.STOPPED, WorkerState.FAILED):
            self._forget(worker)

    def _check_memory(self) -> None:
        most = self._generation.config.max_worker_memory_mb
        self._memory_timer = None
        if most is None:
            return
        self._memory_timer = self._loop.call_later(_MEMORY_CHECK_S, self._check_memory)
        for worker in self.workers:
            reason = self._overgrown(worker)
            if reason:
                self.replace(worker, reason)
        self._check_lingering()

    def _overgrown(self, worker: Worker) -> str:
        """Why a worker is to be replaced, if it has more memory than it may; else ""."""
        most = self._generation.config.max_worker_memory_mb
        if most is None or worker.pid is None or worker.state not in (WorkerState.READY, WorkerState.BUSY):
            return ""
        private_mb = private_bytes(worker.pid) / (1 << 20)
        return f"{private_mb:.0f} MiB of private memory; at most {most} wanted" if private_mb > most else ""

    def resize(self) -> None:
        """Have as many serving workers as the config asks for now, each with the threads that fall to it."""
        config = self._generation.config
        while len(self.workers) > config.workers:
            worker = self.workers.pop()
            worker.role = "retiring"
            self._let_go(worker)
            successor = self._successors.pop(worker.index, None)
            if successor is not None:
                successor.role = "retiring"
                self._let_go(successor)
        for worker in self.workers:
            if worker.placement != place_worker(config, worker.index):
                self.replace(worker, "its share of the machine has changed")
        while len(self.workers) < config.workers:
            worker = self._make(len(self.workers), "serving")
            self.workers.append(worker)
            self._restart(worker)
        if self._memory_timer is None:
            self._check_memory()

    # -- quarantine ---------------------------------------------------------------------------------

    def call_quarantine(self, caller: int = LEAD) -> Worker:
        """The quarantine worker, started if there is none; `worker_ready` tells when it can take a batch.

        Args:
            caller: The front that needs it, until it dismisses it.
        """
        self._callers.add(caller)
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self.quarantine is None:
            self.quarantine = self._make(len(self.workers), "quarantine")
            self._restart(self.quarantine)
        return self.quarantine

    def dismiss_quarantine(self, caller: int = LEAD) -> None:
        """Nothing of a front waits for the quarantine worker: it leaves unless it is called again soon."""
        self._callers.discard(caller)
        if self.quarantine is not None and self._linger is None and not self._callers:
            self._linger = self._loop.call_later(_QUARANTINE_LINGER_S, self._end_quarantine)
            self._check_lingering()  # one that is called again and again would be looked at by no timer

    def _check_lingering(self) -> None:
        """Have the quarantine worker leave that nothing waits for, if it has grown too large."""
        if self.quarantine is None or self._linger is None:
            return
        reason = self._overgrown(self.quarantine)
        if reason:
            who = self._who(self.quarantine)
            log.info("worker does not stay", **who, pid=self.quarantine.pid, reason=reason)
            self._linger.cancel()
            self._end_quarantine()

    def _end_quarantine(self) -> None:
        self._linger = None
        if self.quarantine is not None:
            worker, self.quarantine = self.quarantine, None
            self._let_go(worker)

    # -- the end ------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Let the workers go: each leaves after the batch it runs; those that do not are killed."""
        self._is_stopping = True
        for timer in (self._linger, self._memory_timer):
            if timer is not None:
                timer.cancel()
        everyone = self.everyone()
        for worker in everyone:
            self._let_go(worker)
            if worker.starting is not None and worker.pid is None:
                worker.starting.cancel()  # it may wait for a zygote that takes seconds to start
        ending = [w.child for w in everyone if w.child is not None and not w.child.ended.done()]
        if ending:
            waits = [child.ended for child in ending]
            await asyncio.wait(waits, timeout=_STOP_GRACE_S)
            for child in ending:
                child.kill()
            await asyncio.wait(waits)
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._weights_fd is not None:
            os.close(self._weights_fd)
            self._weights_fd = None
