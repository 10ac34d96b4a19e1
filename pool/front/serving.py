"""One generation of a model at work: batches to its workers, answers back, failures tried. Runs in the front.

The engine owns it, and hears of it what concerns the whole (`Host`).
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from pool.config import ModelConfig
from pool.errors import (
    DeadlineExceeded,
    InternalError,
    ModelError,
    PoolError,
    TooLarge,
    Unavailable,
    WorkerLost,
)
from pool.front.awake import Event
from pool.front.crew import Crew, Listener
from pool.front.generation import Generation
from pool.front.logs import Log
from pool.front.replies import Sink
from pool.front.route import Route
from pool.front.slots import Slot, Ticket
from pool.front.states import WorkerState
from pool.front.trials import Trials
from pool.front.workers import End, Worker
from pool.shm.board import Board
from pool.shm.doorbell import Message, Ring

log = Log("pool.serving")

# Workers that may die before they begin with a batch until it is not believed any more: a model that writes
# anywhere could make its own batches look so.
_SPARED_MOST = 8


class Host(Protocol):
    """What the engine hears of a generation at work."""

    @property
    def is_stopping(self) -> bool:
        """Whether nothing is to run again."""

    def came(self, event: Event, now: float) -> None:
        """Something that is waited for awake is there."""

    def advanced(self, serving: Serving, now: float) -> None:
        """Batches were given out, or not: the clock may have something new to wait for."""

    def freed(self) -> None:
        """A slot is free, or a worker is gone: perhaps all is done that was admitted."""

    def failed(self, serving: Serving, how: str) -> None:
        """Its last worker was given up."""


class Serving:
    """A generation with its workers and its failed batches.

    Args:
        generation: Loaded.
        hire: Makes its workers, which tell this what happens.
        host: Told what concerns the whole.
        board: Where fronts that share the workers note what they gave, owned from now on; None if there is
            but one.

    Attributes:
        running: Batches that workers have.
    """

    def __init__(
        self,
        generation: Generation,
        hire: Callable[[Listener], Crew],
        host: Host,
        board: Board | None = None,
    ) -> None:
        self.generation = generation
        self.replicas = hire(self)
        self.trials = Trials(generation, self.replicas, refuse, self._run_trial)
        self.running = 0
        self._batcher = generation.batcher
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._board = board
        if board is not None:
            self._batcher.load_of = lambda id_: board.others(self.replicas.find(id_).index)

    def drop_waiting(self, error: Callable[[], PoolError]) -> None:
        """Answer every request that no worker has started."""
        for ticket in self._batcher.drop_waiting():
            ticket.sink.send_error(ticket, error())
        self.trials.drop(error())

    def apply(self, config: ModelConfig) -> None:
        """Take over what of a model's settings changes in place, and start or let go workers."""
        self.generation.apply(config)
        self.replicas.resize()

    async def stop(self) -> None:
        """End the workers and give the memory back; what waits was answered before."""
        await self.replicas.stop()
        self._is_closed = True
        self.generation.close()
        if self._board is not None:
            self._board.close()

    # -- batches out --------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Start what can start."""
        if self._batcher.has_queue:
            self._dispatch(now)
        self._host.advanced(self, now)

    def _dispatch(self, now: float) -> None:
        while True:
            for ticket in self._batcher.give_up(now):
                ticket.sink.send_error(ticket, self.generation.given_up(ticket, now))
            for slot, id_ in self._batcher.dispatch(now):
                if slot.has_ballast:  # expired rows never start
                    live = [ticket for ticket in slot.tickets if not ticket.is_settled]
                    rows = [(ticket, self.generation.read_rows(slot, ticket)) for ticket in live]
                    self.generation.refill(slot, rows, slot.aside)
                self._run(slot, self.replicas.find(id_))
            ahead = self._batcher.recallable(now)
            if ahead is None or (taken := self.replicas.recall(ahead)) is None:
                return
            self._recalled(taken, now)

    def _recalled(self, slot: Slot, now: float) -> None:
        """A worker that was given a batch does not run it."""
        self.running -= 1
        self._batcher.recall(slot, now)

    def _run(self, slot: Slot, worker: Worker) -> None:
        tickets = slot.tickets or slot.aside
        self.generation.arena.describe(slot.index, tickets[0].route.layout)
        slot.place = worker.index
        self.replicas.run(worker, slot)
        self.running += 1

    def _run_trial(self, slot: Slot, worker: Worker) -> None:
        now = time.monotonic()
        self._batcher.dispatch_to(slot, worker.id, now)
        self._run(slot, worker)
        self._host.advanced(self, now)

    def expire(self, now: float) -> None:
        """Do what the clock makes due: deadlines, batches that take too long, batches that waited enough."""
        for ticket in self._batcher.expire(now):
            waited_ms = (now - ticket.turn.started) * 1e3
            late = DeadlineExceeded(f"no answer within the request's timeout; waited {waited_ms:.0f} ms")
            ticket.sink.send_error(ticket, late)
        for slot in self._batcher.overdue(now):
            if self._is_overdue(slot, now):
                self.replicas.interrupt(slot, self._batcher.timeout_s)
        self.advance(now)

    def _is_overdue(self, slot: Slot, now: float) -> bool:
        """Whether a batch has run for too long, and did not wait behind one of another front."""
        if self._board is None:
            return True
        timeout_s = self._batcher.timeout_s
        began = self.generation.arena.read_began_s(slot.index)
        if began < slot.given_at:
            # It waits behind others as long as these are answered, of any front. If none is, its
            # worker hangs, perhaps with a batch whose front has ended.
            answers = self._board.answers(slot.place)
            if answers != slot.answers:
                slot.answers = answers
                self._batcher.look_again(slot, now)
                return False
        elif now - timeout_s < began <= now:
            self._batcher.look_again(slot, began)
            return False
        return True

    # -- answers back (Listener) --------------------------------------------------------------------

    def worker_ready(self, worker: Worker) -> None:
        """A worker can take a batch."""
        if worker.role == "quarantine":
            self.trials.feed()
        else:
            self._batcher.worker_ready(worker.id)
            self.advance(time.monotonic())

    def worker_leaving(self, worker: Worker) -> None:
        """A worker takes no more batches."""
        self._batcher.worker_lost(worker.id)

    def worker_answered(self, worker: Worker, message: Message) -> None:
        """A batch came back: first keep the worker busy, then send the answers."""
        slot = worker.slot
        if slot is None or slot.index != message.slot or slot.generation != message.generation:
            model = self.generation.model
            log.error("stale answer", model=model, worker=worker.index, slot=message.slot)
            return
        now = time.monotonic()
        if slot.given_at < slot.dispatched_at and message.kind == Ring.DONE:
            # It was ahead, and began before the answer for the batch before it was heard.
            began = self.generation.arena.read_began_s(slot.index)
            slot.dispatched_at = min(max(began, slot.given_at), slot.dispatched_at)
        tickets = self._batcher.finish(slot, now)
        self.running -= 1
        self._go_on(worker, now)
        self._host.came(Event.ANSWER, now)
        if message.kind == Ring.DONE:
            self._deliver(worker, slot, tickets)
            self.generation.metrics.batch_answered(slot)
            self.generation.metrics.replies_sent(slot, tickets, now, time.monotonic())
            if slot.trial is not None:
                self.trials.passed(slot)
            if slot.pins == 0:
                self._release(slot)
        else:
            self.generation.metrics.batch_answered(slot)
            kind = TooLarge if message.kind == Ring.TOO_LARGE else ModelError
            self._batch_raised(slot, tickets, kind(message.text))
        if worker.role == "quarantine":
            self.trials.feed()
        if slot.trial is None:  # what waited was started already
            self._host.advanced(self, now)
        else:
            self.advance(now)

    def _go_on(self, worker: Worker, now: float) -> None:
        """A worker is done with a batch: give it another."""
        self.replicas.finished(worker, now)
        if worker.role == "serving" and worker.state in (WorkerState.READY, WorkerState.BUSY):
            self._batcher.worker_ready(worker.id)
        if self._batcher.has_queue:
            self._dispatch(now)

    def _deliver(self, worker: Worker, slot: Slot, tickets: list[Ticket]) -> None:
        # Most batches hold requests of one kind for one sink: one call then sends them all.
        groups: dict[tuple[Route, Sink], list[Ticket]] = {}
        route: Route | None = None
        sink: Sink | None = None
        for ticket in tickets:
            if ticket.route is not route or ticket.sink is not sink:
                route, sink = ticket.route, ticket.sink
                alike = groups.setdefault((ticket.route, ticket.sink), [])
            alike.append(ticket)
        for (route, sink), group in groups.items():
            try:
                _, _, worker.piece_rows, places = self.generation.arena.read_run_record(slot.index)
                reply = self.generation.reply_for(route, places)
                reply.check(self.generation.views[slot.index])
            except InternalError as e:
                model = self.generation.model
                log.error("answer not valid", model=model, worker=slot.worker, reason=e.message)
                refuse(group, InternalError(f"model {model!r} gave an answer that cannot be read"))
                continue
            except TooLarge as e:  # others of the batch may want fewer outputs
                refuse(group, e.with_traceback(None))
                continue
            for ticket in group:
                ticket.is_settled = True
            try:
                sink.send_results(group, reply, slot)
            except Exception as e:  # the slot is to be given back, and the others are to be served
                log.defect("cannot send answers")
                # Whoever of them was answered has no use for another answer, and takes none.
                error = InternalError(f"{type(e).__name__} while the answer was sent")
                for ticket in group:
                    sink.send_error(ticket, error)

    def _batch_raised(self, slot: Slot, tickets: list[Ticket], error: PoolError) -> None:
        requests = sum(ticket.requests for ticket in tickets)
        if slot.trial is None and (requests <= 1 or not self.generation.config.retry):
            refuse(tickets, error)
            self._release(slot)
            return
        self._batcher.hold(slot)
        if slot.trial is None:
            self.trials.begin(slot, error, is_deadly=False)
        else:
            self.trials.failed(slot, error, is_deadly=False, is_own_doing=True)

    def _release(self, slot: Slot) -> None:
        """Every answer has left a DONE slot: give it back, or go on with its trial."""
        if slot.trial is not None:
            self._batcher.hold(slot)
            self.trials.advance(slot)
        else:
            self._batcher.release(slot)
        self._host.freed()

    def pin(self, slot: Slot, payload: np.ndarray[Any, Any]) -> None:
        """Keep `slot` from being used again until `payload`, a view of its bytes, is garbage.

        Thread-safe at the far end: ZeroMQ lets go of a frame in a thread of its own.
        """
        slot.pins += 1
        weakref.finalize(payload, self._unpin_from_thread, slot).atexit = False

    def _unpin_from_thread(self, slot: Slot) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._unpin, slot)

    def _unpin(self, slot: Slot) -> None:
        slot.pins -= 1
        if slot.pins == 0 and not self._is_closed:
            self._release(slot)
            self.advance(time.monotonic())

    # -- what goes wrong ----------------------------------------------------------------------------

    def worker_ended(self, worker: Worker, slot: Slot | None, ahead: Slot | None, end: End) -> None:
        """A worker's process is gone: nothing writes to its slots any more."""
        self._batcher.worker_lost(worker.id)
        if worker.state is WorkerState.BACKOFF:
            self.generation.metrics.restarted(end.cause)
        is_spared = slot is not None and not self._has_begun(slot)
        if ahead is not None:
            self._recalled(ahead, time.monotonic())
        if slot is not None and is_spared:
            self._spare(slot)
        if self._host.is_stopping and (ahead is not None or is_spared):
            self.drop_waiting(stopping)
        if slot is not None and not is_spared:
            self.running -= 1
            self._batch_lost(slot, end)
        if worker.role == "quarantine":
            if worker.state is WorkerState.FAILED:
                self.trials.give_up(end.how)
        elif self.replicas.is_lost:
            # With its last worker given up, waiting requests would wait for nobody.
            self._host.failed(self, end.how)
        self.advance(time.monotonic())
        self._host.freed()

    def quarantine_failed(self, how: str) -> None:
        """There is no worker to be had for what may kill it."""
        self.trials.give_up(how)
        self._host.freed()

    def _has_begun(self, slot: Slot) -> bool:
        """Whether a worker that died had begun with the batch: it may have waited behind another front's."""
        if self._board is None or slot.spared >= _SPARED_MOST:
            return True
        return self.generation.arena.read_began_s(slot.index) >= slot.given_at

    def _spare(self, slot: Slot) -> None:
        """A batch whose worker died before it began: nothing is held against it."""
        slot.spared += 1
        if slot.trial is not None and slot.trial.is_deadly:
            self.running -= 1
            self._batcher.reap(slot)
            self.trials.again(slot)
        else:
            self._recalled(slot, time.monotonic())

    def _batch_lost(self, slot: Slot, end: End) -> None:
        """The worker of a batch is gone: run its rows again, unless that is not allowed."""
        tickets = self._batcher.reap(slot)
        lost = WorkerLost(f"the worker running the batch of {slot.rows} rows ended: {end.how}")
        if self._host.is_stopping:
            refuse(list(slot.everyone()), stopping())
            self._batcher.release(slot)
        elif slot.trial is not None:
            self.trials.failed(slot, lost, is_deadly=True, is_own_doing=end.is_own_doing)
        elif not tickets or not self.generation.config.retry:
            refuse(tickets, lost)
            self._batcher.release(slot)
        elif not end.is_own_doing and slot.runs == 1:
            self._batcher.requeue(slot)  # killed from outside: nobody is suspected yet
        else:
            self.trials.begin(slot, lost, is_deadly=True)


def refuse(tickets: Iterable[Ticket], error: PoolError) -> None:
    """Settle tickets, those that are not, and answer them with an error."""
    for ticket in tickets:
        if not ticket.is_settled:
            ticket.is_settled = True
            ticket.sink.send_error(ticket, error)


def stopping() -> Unavailable:
    """What is said to requests while the server stops."""
    return Unavailable("the server is stopping")
