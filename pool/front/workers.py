"""One worker: its process, its state, how it is forked and how it ends. Runs in the front, on its loop."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import weakref
from contextlib import suppress
from typing import NamedTuple

from pool.config import ModelConfig, Placement
from pool.errors import PoolError
from pool.front.generation import Generation
from pool.front.last_words import LastWords
from pool.front.slots import Slot
from pool.front.states import WorkerEvent, WorkerState, next_worker_state
from pool.front.supervisor import Supervisor
from pool.front.zygotes import UNKNOWN_EXIT, Child, describe_exit
from pool.shm import control, doorbell, joining, loans
from pool.shm.arena import Arena
from pool.shm.doorbell import Message, Ring
from pool.signature import Signature

_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 10.0
_RUNS = (Ring.RUN, Ring.RUN_LENT)
# Signals that come from outside (somebody, or the kernel short of memory), not from what a batch did.
_FOREIGN_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def backoff_s(failures: int, jitter: float) -> float:
    """Pause before a worker that failed `failures` times in a row is started again.

    The first death after good work is answered at once; then 0.1 s, doubling, at most 10 s.

    Args:
        failures: Deaths since its last finished batch, this one included.
        jitter: 0 to 1, chosen at random, so that workers felled together do not come back together.
    """
    if failures <= 1:
        return 0.0
    # The exponent is bounded as a float's is.
    return min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2.0 ** min(failures - 2, 64)) * (0.5 + 0.5 * jitter)


class End(NamedTuple):
    """How a worker's process ended.

    Attributes:
        how: `killed by SIGSEGV`, `exit code 3`, or a sentence.
        is_own_doing: Whether what it ran can be the cause: it was not killed from outside.
        cause: `crashed`, `hung`, `killed` (from outside), or `not_started`.
    """

    how: str
    is_own_doing: bool
    cause: str


class Worker:
    """One worker process, and the one that takes its place when it dies.

    Attributes:
        id: Unique within the generation.
        index: Its number within the model.
        role: `serving`, `successor`, `retiring` or `quarantine`.
        state: See `pool.front.states`.
        device: What it is pinned to, as configured; empty for anywhere.
        slot: The slot it runs, if any.
        ahead: The slot it runs next, if it has it already.
        lent: Numbers of the regions that the present process has.
        batches: Batches finished, by all processes that held this place.
        rows: Rows of those batches.
        busy_s: Seconds it had a batch, by all of them.
        batches_now: Batches finished by the present process.
        piece_rows: Rows a call of its last batch, as the worker has found them best; 0 for all.
        answered_at: When it last answered.
        restarts: Times a process was started to replace one that ended.
        failures: Deaths in a row without a finished batch or a while of being ready in between.
        starting: What gives it a process, since it was started again.
        started_at: When the present process was asked for (monotonic).
        ready_s: How long the present process took from fork to READY.
        last_error: Why the last process ended, or would not start.
        overdue: Why the present process was killed by its front; empty if it was not.
    """

    def __init__(self, id_: int, index: int, role: str, device: str, placed: Placement) -> None:
        self.id = id_
        self.index = index
        self.role = role
        self.device = device
        self.placement = placed
        self.state = WorkerState.STARTING
        self.starting: asyncio.Task[None] | None = None
        self.child: Child | None = None
        self.bell: socket.socket | None = None
        self.loans: socket.socket | None = None
        self.lent: set[int] = set()
        self.far_bell: socket.socket | None = None  # the worker's end: what it has not read can be taken back
        self.joins: socket.socket | None = None  # over which other fronts join
        self.words: LastWords | None = None
        self.slot: Slot | None = None
        self.ahead: Slot | None = None
        self.batches = 0
        self.rows = 0
        self.busy_s = 0.0
        self.batches_now = 0
        self.piece_rows = 0
        self.answered_at = 0.0
        self.restarts = 0
        self.failures = 0
        self.started_at = 0.0
        self.ready_s: float | None = None
        self.last_error = ""
        self.overdue = ""

    @property
    def pid(self) -> int | None:
        """The present process, if there is one."""
        if self.child is None or self.child.ended.done():
            return None
        return self.child.pid

    def busy_until(self, now: float) -> float:
        """`busy_s`, with the batch it has now."""
        began = max(self.slot.dispatched_at, self.answered_at) if self.slot is not None else now
        return self.busy_s + now - began

    def move(self, event: WorkerEvent) -> None:
        """Change state; raises IllegalTransition for what cannot happen."""
        self.state = next_worker_state(self.state, event)

    # -- batches ------------------------------------------------------------------------------------

    def run(self, slot: Slot, kind: Ring) -> None:
        """Ring the doorbell: `slot` is the worker's now, to run at once or after the one that it has.

        Raises:
            OSError: it does not ring; the slot is the worker's all the same.
        """
        assert self.bell is not None
        if self.slot is None:
            self.move(WorkerEvent.DISPATCH)
            self.slot = slot
        else:
            assert self.ahead is None, "a worker has two batches at most"
            self.ahead = slot
        doorbell.ring(self.bell, Message(kind, slot.index, slot.rows, slot.generation, slot.layout))

    def lend(self, slot: Slot, arena: Arena) -> None:
        """Have the worker know the regions in which a batch lies.

        Raises:
            OSError: they cannot be passed to it.
        """
        assert self.loans is not None
        for loan in slot.loans:
            region = loan.region
            if region.number not in self.lent:
                loans.lend(self.loans, region.number, region.size, region.fd)
                self.lent.add(region.number)
                weakref.finalize(region, self._give_back, region.number).atexit = False
        places = [loans.Place(loan.region.number, loan.offset) for loan in slot.loans]
        loans.write_places(arena.slots[slot.index], places)

    def _give_back(self, number: int) -> None:
        """A region has gone, and nothing runs on it any more: neither shall its memory stay."""
        if number in self.lent and self.bell is not None:
            self.lent.discard(number)
            with suppress(OSError):  # it is dying, and its maps with it
                doorbell.ring(self.bell, Message(Ring.GIVE_BACK, generation=number))

    def recall(self) -> Slot | None:
        """Take back the slot that the worker has ahead, unless it has begun with it.

        Returns:
            What was taken back: the slot; or the one that was to run before, if the worker got hold of the
            second alone; or None.
        """
        assert self.bell is not None
        assert self.far_bell is not None
        assert self.slot is not None
        assert self.ahead is not None
        unread = doorbell.take_back(self.far_bell)
        not_begun = {message.slot for message in unread if message.kind in _RUNS}
        if not not_begun:
            taken = None
        elif self.ahead.index in not_begun:
            taken, self.ahead = self.ahead, None
        else:
            taken, self.slot, self.ahead = self.slot, self.ahead, None
        for message in unread:
            if taken is None or message.kind not in _RUNS or message.slot != taken.index:
                doorbell.ring(self.bell, message)
        return taken

    def finish(self) -> Slot:
        """The worker has answered for a slot, which is returned, and begun with the one it had ahead."""
        done = self.slot
        assert done is not None
        self.move(WorkerEvent.FINISH)
        self.batches_now += 1
        self.failures = 0
        self.slot, self.ahead = self.ahead, None
        if self.slot is not None and self.state is WorkerState.READY:
            self.move(WorkerEvent.DISPATCH)
        return done

    # -- the end ------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Let go of what led to the process."""
        for sock in (self.bell, self.far_bell, self.loans, self.joins):
            if sock is not None:
                sock.close()
        self.bell = self.far_bell = self.loans = self.joins = None
        self.lent.clear()

    def ended(self, code: int) -> tuple[End, list[str]]:
        """The process is gone: how, and the last lines it wrote. Lets go of what led to it."""
        assert self.child is not None
        self.hang_up()
        lines: list[str] = []
        if self.words is not None:
            lines = self.words.close()
            self.words = None
        if self.overdue:
            return End(f"killed: {self.overdue}", True, "hung"), lines
        if self.child.refusal:
            return End(self.child.refusal, False, "not_started"), lines
        is_own_doing = code != UNKNOWN_EXIT and -code not in _FOREIGN_SIGNALS
        return End(describe_exit(code), is_own_doing, "crashed" if is_own_doing else "killed"), lines


async def fork_worker(
    supervisor: Supervisor,
    generation: Generation,
    weights_fd: int | None,
    worker: Worker,
    is_shared: bool = False,
) -> tuple[Child, socket.socket]:
    """Give a worker a process, which is about to load the model, and the front's end of its doorbell.

    Args:
        supervisor: Provides the zygote.
        generation: What the worker serves.
        weights_fd: The shared weights' memfd, if there is one.
        worker: Gets the process.
        is_shared: Whether other fronts may join it.

    Raises:
        PoolError: the zygote is not there, or refuses.
        OSError: out of file descriptors or memory.
    """
    zygote = await supervisor.zygote(generation.config.backend)
    order_fd = control.write_order(_order(generation, worker, is_shared))
    try:
        words = LastWords(asyncio.get_running_loop())
        try:
            bell, far_bell = doorbell.make_pair()
            lender, borrower = loans.make_pair()
            mine, its = [bell, far_bell, lender], [borrower]
            fds = [order_fd, supervisor.lifeline.read_fd, words.write_fd]
            fds += [far_bell.fileno(), borrower.fileno(), generation.arena.fd]
            if is_shared:
                joins, joiner = joining.make_pair()
                mine.append(joins)
                its.append(joiner)
                fds.append(joiner.fileno())
            if weights_fd is not None:
                fds.append(weights_fd)
            try:
                child = zygote.fork("worker", fds)
            except PoolError:
                for sock in mine:
                    sock.close()
                raise
            finally:
                for sock in its:
                    sock.close()
        except (PoolError, OSError):
            words.close()
            raise
        finally:
            words.handed_over()
    finally:
        os.close(order_fd)
    worker.child, worker.bell, worker.far_bell, worker.words = child, bell, far_bell, words
    worker.loans = lender
    worker.joins = joins if is_shared else None
    return child, bell


def _order(generation: Generation, worker: Worker, is_shared: bool) -> control.WorkerOrder:
    config = generation.config
    recipes = generation.report.recipes
    return control.WorkerOrder(
        model=generation.model,
        index=worker.index,
        backend=config.backend,
        path=generation.report.path,
        weights=generation.report.weights,
        placement=worker.placement,
        slots=len(generation.arena.slots),
        slot_bytes=generation.arena.slot_bytes,
        allowed_batch_sizes=config.allowed_batch_sizes,
        is_lean=generation.report.is_lean,
        awake_s=config.awake_us / 1e6,
        split_s=split_s(config, worker.placement),
        is_shared=is_shared,
        warm_up=tuple(
            control.WarmUp(signature, recipes[name], warm_up_rows(signature, config))
            for name, signature in generation.signatures.items()
            if name in recipes  # the others raise on whatever is generated
        ),
    )


def private_bytes(pid: int) -> int:
    """Memory that would be free if the process ended, without what it has in files; 0 if it is gone.

    RssAnon of proc(5): a look of microseconds, where USS takes the kernel milliseconds.
    """
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def split_s(config: ModelConfig, placement: Placement) -> float:
    """Longest run of a batch that a worker may try in pieces; 0 where it is not to.

    A bout takes twice the time of a batch at most, and is to be far from too long. Never on a GPU: pieces
    leave it empty.
    """
    if not config.split_batches or placement.gpu is not None:
        return 0.0
    return config.timeout_ms / 4000 if config.timeout_ms else math.inf


def warm_up_rows(signature: Signature, config: ModelConfig) -> tuple[int, ...]:
    """Batch sizes a worker runs once before it is READY: one row is the canary that proves it works."""
    if not signature.batched:
        return (1,)
    if not config.warm_up:
        return (config.allowed_batch_sizes or (1,))[:1]
    return config.allowed_batch_sizes or tuple(sorted({1, config.max_batch_size}))
