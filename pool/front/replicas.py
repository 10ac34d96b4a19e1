"""The workers of one generation: started, heard, started again when they die. Runs in the front.

`Replicas` decides nothing about batches: it tells the engine, its `Listener`, what happened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from pool.config import ModelConfig, Placement
from pool.errors import ModelLoadError, PoolError, Unavailable
from pool.front.generation import Generation
from pool.front.slots import Slot
from pool.front.states import WorkerEvent, WorkerState, next_worker_state
from pool.front.supervisor import Supervisor, place_worker
from pool.front.zygotes import Child, describe_exit
from pool.shm import control, doorbell
from pool.shm.doorbell import Message, Ring
from pool.signature import Signature

log = logging.getLogger("pool.replicas")

# A worker that dies this many times in a row without finishing one batch is given up: it cannot serve,
# and starting it for ever only burns the cores of those that can.
CRASH_LOOP_LIMIT = 5
_STABLE_S = 10.0  # ready for this long, it was no failed start, however little work there was
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 10.0
# Workers leave within milliseconds of being asked; one that does not is stuck in native code.
_STOP_GRACE_S = 2.0


def backoff_s(failures: int, jitter: float) -> float:
    """Pause before a worker that failed `failures` times in a row is started again.

    The first death after good work is answered at once; then 0.1 s, doubling, at most 10 s.

    Args:
        failures: Deaths since its last finished batch, this one included.
        jitter: 0 to 1, chosen at random, so that workers felled together do not come back together.
    """
    if failures <= 1:
        return 0.0
    return float(min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2.0 ** (failures - 2))) * (0.5 + 0.5 * jitter)


class Worker:
    """One worker process, and the one that takes its place when it dies.

    Attributes:
        index: Its number within the model.
        state: See `pool.front.states`.
        device: What it is pinned to, as configured; empty for anywhere.
        slot: The slot it runs, if any.
        batches: Batches finished, by all processes that held this place.
        rows: Rows of those batches.
        restarts: Times a process was started to replace one that ended.
        failures: Deaths in a row without a finished batch or a while of being ready in between.
        started_at: When the present process was asked for (monotonic).
        ready_s: How long the present process took from fork to READY.
        last_error: Why the last process ended, or would not start.
    """

    def __init__(self, index: int, device: str, placed: Placement) -> None:
        self.index = index
        self.device = device
        self.placement = placed
        self.state = WorkerState.STARTING
        self.child: Child | None = None
        self.bell: socket.socket | None = None
        self.slot: Slot | None = None
        self.batches = 0
        self.rows = 0
        self.restarts = 0
        self.failures = 0
        self.started_at = 0.0
        self.ready_s: float | None = None
        self.last_error = ""

    @property
    def pid(self) -> int | None:
        """The present process, if there is one."""
        if self.child is None or self.child.ended.done():
            return None
        return self.child.pid

    def move(self, event: WorkerEvent) -> None:
        """Change state; raises IllegalTransition for what cannot happen."""
        self.state = next_worker_state(self.state, event)


class Listener(Protocol):
    """What the engine hears of the workers of a generation."""

    def worker_ready(self, generation: Generation, worker: Worker) -> None:
        """It can take a batch."""

    def worker_answered(self, generation: Generation, worker: Worker, message: Message) -> None:
        """It rang back."""

    def worker_ended(self, generation: Generation, worker: Worker, slot: Slot | None, how: str) -> None:
        """Its process is gone and waited for; `slot` is what it was running."""


class Replicas:
    """The workers of one generation.

    Args:
        supervisor: Provides zygotes.
        generation: What they serve.
        weights_fd: The shared weights' memfd, or None; owned from now on.
        listener: Told what happens.
    """

    def __init__(
        self, supervisor: Supervisor, generation: Generation, weights_fd: int | None, listener: Listener
    ) -> None:
        self._supervisor = supervisor
        self._generation = generation
        self._weights_fd = weights_fd
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._ends: set[asyncio.Task[None]] = set()
        self._all_ready: asyncio.Future[None] = self._loop.create_future()
        self._is_stopping = False
        config = generation.config
        devices: Sequence[str] = config.devices or ("",)
        self.workers = [
            Worker(i, devices[i % len(devices)], place_worker(config, i)) for i in range(config.workers)
        ]

    async def start(self) -> None:
        """Start all workers and wait until each has said READY.

        Raises:
            ModelLoadError: one of them cannot load the model, or keeps dying.
        """
        for worker in self.workers:
            await self._start(worker)
        await self._all_ready

    async def _start(self, worker: Worker) -> None:
        generation, config = self._generation, self._generation.config
        recipes = generation.report.recipes
        worker.started_at = time.monotonic()
        worker.ready_s = None
        bell, its_bell = doorbell.make_pair()
        order_fd = control.write_order(
            control.WorkerOrder(
                model=generation.model,
                index=worker.index,
                backend=config.backend,
                path=generation.report.path,
                weights=generation.report.weights,
                placement=worker.placement,
                slots=len(generation.arena.slots),
                slot_bytes=generation.arena.slot_bytes,
                allowed_batch_sizes=config.allowed_batch_sizes,
                awake_s=config.awake_us / 1e6,
                warm_up=tuple(
                    control.WarmUp(signature, recipes[name], warm_up_rows(signature, config))
                    for name, signature in generation.signatures.items()
                    if name in recipes  # the others raise on whatever is generated
                ),
            )
        )
        fds = [order_fd, self._supervisor.lifeline.read_fd, its_bell.fileno(), generation.arena.fd]
        if self._weights_fd is not None:
            fds.append(self._weights_fd)
        try:
            zygote = await self._supervisor.zygote(config.backend)
            if self._is_stopping:  # meanwhile
                raise Unavailable("the server is stopping")
            worker.child = zygote.fork("worker", fds)
        except PoolError as e:
            bell.close()
            worker.last_error = e.message
            self._after_end(worker, None, e.message)
            return
        finally:
            its_bell.close()
            os.close(order_fd)
        worker.bell = bell
        self._loop.add_reader(bell.fileno(), self._hear, worker, bell)
        task = self._loop.create_task(self._await_end(worker, worker.child))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def _hear(self, worker: Worker, bell: socket.socket) -> None:
        while True:
            try:
                message = doorbell.answer(bell)
            except BlockingIOError:
                return
            if message is None:  # its end is closed: the process is going; `_await_end` sees it gone
                self._loop.remove_reader(bell.fileno())
                return
            if message.kind == Ring.READY:
                self._is_ready(worker)
            elif message.kind == Ring.LOAD_ERROR:
                worker.last_error = message.text
                worker.failures = CRASH_LOOP_LIMIT  # loading again would fail again
            else:
                self._listener.worker_answered(self._generation, worker, message)

    def _is_ready(self, worker: Worker) -> None:
        worker.ready_s = time.monotonic() - worker.started_at
        log.info(
            "worker ready model=%s worker=%d pid=%d took_s=%.3f",
            self._generation.model, worker.index, worker.pid or 0, worker.ready_s,
        )  # fmt: skip
        if worker.state is WorkerState.STARTING:
            worker.move(WorkerEvent.LOAD)
            self._listener.worker_ready(self._generation, worker)
        started = (WorkerState.READY, WorkerState.BUSY)
        if not self._all_ready.done() and all(w.state in started for w in self.workers):
            self._all_ready.set_result(None)

    async def _await_end(self, worker: Worker, child: Child) -> None:
        code = await child.ended
        how = child.refusal or describe_exit(code)
        bell = worker.bell
        if bell is not None:
            self._hear(worker, bell)  # what it rang before it died counts
            self._loop.remove_reader(bell.fileno())
            bell.close()
            worker.bell = None
        self._after_end(worker, child, how)

    def _after_end(self, worker: Worker, child: Child | None, how: str) -> None:
        slot, worker.slot = worker.slot, None
        if worker.state is WorkerState.DRAINING:
            worker.move(WorkerEvent.STOP)
            self._listener.worker_ended(self._generation, worker, slot, how)
            return
        if worker.ready_s is not None and time.monotonic() - worker.started_at > worker.ready_s + _STABLE_S:
            worker.failures = 0
        worker.failures += 1
        if worker.failures < CRASH_LOOP_LIMIT:
            worker.last_error = how
            worker.move(WorkerEvent.EXIT)
            pause = backoff_s(worker.failures, random.random())
            self._loop.call_later(pause, self._retry, worker)
            after = f"restart_in_s={pause:.2f}"
        else:
            worker.last_error = worker.last_error or how
            worker.move(WorkerEvent.GIVE_UP)
            after = "given up"
            if not self._all_ready.done():
                self._all_ready.set_exception(
                    ModelLoadError(f"model {self._generation.model!r}: worker: {worker.last_error}")
                )
        log.error(
            "worker lost model=%s worker=%d pid=%s how=%s batch_rows=%d %s",
            self._generation.model, worker.index, child.pid if child else None, how,
            slot.rows if slot else 0, after,
        )  # fmt: skip
        self._listener.worker_ended(self._generation, worker, slot, how)

    def _retry(self, worker: Worker) -> None:
        if self._is_stopping or worker.state is not WorkerState.BACKOFF:
            return
        worker.move(WorkerEvent.RETRY)
        worker.restarts += 1
        task = self._loop.create_task(self._start(worker))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def run(self, worker: Worker, slot: Slot) -> None:
        """Ring a READY worker's doorbell: `slot` is its now."""
        assert worker.bell is not None
        assert worker.slot is None
        worker.move(WorkerEvent.DISPATCH)
        worker.slot = slot
        message = Message(Ring.RUN, slot.index, slot.rows, slot.generation, slot.layout)
        try:
            doorbell.ring(worker.bell, message)
        except OSError as e:  # it is dying: its end is about to be seen, and the slot recovered then
            log.warning("doorbell of worker %d does not ring: %s", worker.index, e.strerror)

    def finished(self, worker: Worker) -> None:
        """The worker answered for its slot and can take another."""
        assert worker.slot is not None
        worker.move(WorkerEvent.FINISH)
        worker.batches += 1
        worker.rows += worker.slot.rows
        worker.failures = 0
        worker.slot = None

    async def stop(self) -> None:
        """Let the workers go: each leaves after the batch it runs; those that do not are killed."""
        self._is_stopping = True
        ending = []
        for worker in self.workers:
            if worker.state is WorkerState.BACKOFF:
                worker.move(WorkerEvent.STOP)
            elif worker.state in (WorkerState.STARTING, WorkerState.READY, WorkerState.BUSY):
                if worker.state is WorkerState.STARTING and worker.child is not None:
                    worker.child.kill()  # it does not listen yet
                worker.move(WorkerEvent.DRAIN)
            if worker.bell is not None and worker.state is WorkerState.DRAINING:
                with suppress(OSError):  # it is gone already
                    doorbell.ring(worker.bell, Message(Ring.DRAIN))
            if worker.child is not None and not worker.child.ended.done():
                ending.append(worker.child)
        if ending:
            waits = [child.ended for child in ending]
            await asyncio.wait(waits, timeout=_STOP_GRACE_S)
            for child in ending:
                child.kill()
            await asyncio.wait(waits)
        if self._ends:
            await asyncio.wait(self._ends)
        if self._weights_fd is not None:
            os.close(self._weights_fd)
            self._weights_fd = None


def warm_up_rows(signature: Signature, config: ModelConfig) -> tuple[int, ...]:
    """Batch sizes a worker runs once before it is READY: one row is the canary that proves it works."""
    if not signature.batched:
        return (1,)
    if not config.warm_up:
        return (config.allowed_batch_sizes or (1,))[:1]
    return config.allowed_batch_sizes or tuple(sorted({1, config.max_batch_size}))
