"""The engine: arenas, batchers and workers under asyncio. Runs in the front, or in any application's loop.

It starts the models of a config, takes placed rows, dispatches batches, and hands the answers to their
sinks. It has no sockets to clients: `pool.front.endpoint` is the one that has.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import weakref
from collections.abc import Callable, Iterable
from math import inf
from typing import Any

import numpy as np

from pool.config import Config, ModelConfig
from pool.errors import (
    DeadlineExceeded,
    InternalError,
    ModelError,
    ModelNotFound,
    PoolError,
    TooLarge,
    Unavailable,
    VersionNotFound,
    WorkerLost,
)
from pool.front.awake import Awake, Event
from pool.front.generation import Generation
from pool.front.replicas import Replicas
from pool.front.replies import Sink
from pool.front.route import Route
from pool.front.slots import Slot, Ticket
from pool.front.states import WorkerState
from pool.front.status import read_status
from pool.front.supervisor import Supervisor
from pool.front.trials import Trials
from pool.front.workers import End, Worker
from pool.shm.doorbell import Message, Ring
from pool.wire import PredictMeta

log = logging.getLogger("pool.engine")


class ServedModel:
    """One model of the config: what is served now and what was counted.

    Attributes:
        name: In the config.
        generation: None until it is loaded.
        replicas: Its workers.
        state: `loading`, `ready`, `failed` or `stopped`.
        failure: Why, when failed.
        batches: Batches run.
        rows: Rows of those.
        batch_sizes: Batches run, by rows.
        trials: Its failed batches, which run again.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation: Generation | None = None
        self.replicas: Replicas | None = None
        self.trials: Trials | None = None
        self.state = "loading"
        self.failure = ""
        self.batches = 0
        self.rows = 0
        self.batch_sizes: dict[int, int] = {}


class Engine:
    """Models, their batches and their workers. Make it inside a running event loop.

    Args:
        config: Checked.

    Attributes:
        models: All of the config, by name.
        is_draining: Whether new requests are refused.
        on_unserved: Called when a route resolved earlier may be served no more: whoever keeps routes
            resolves them anew.
    """

    def __init__(self, config: Config) -> None:
        self.on_unserved: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._config = config
        self._supervisor = Supervisor()
        self.models = {name: ServedModel(name) for name in config.models}
        self._generations: list[Generation] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._running = 0  # batches that workers have
        self._awake = Awake(self._loop, config.server.awake_us / 1e6)
        self._idle: asyncio.Event = asyncio.Event()
        self.is_draining = False
        self._is_stopping = False

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load every model and start its workers; returns when all are ready.

        Raises:
            ModelLoadError · ConfigError: one cannot be served (`status` says which and why).
        """
        # One at a time: loading is where memory peaks, and a loader uses every core as it is.
        for name in self.models:
            await self._start_model(name)

    async def _start_model(self, name: str) -> None:
        model, config = self.models[name], self._config.models[name]
        try:
            generation = await asyncio.wait_for(
                self._start_generation(model, config), self._config.server.start_timeout_s
            )
        except asyncio.TimeoutError:
            model.state, model.failure = "failed", "start timed out"
            raise Unavailable(
                f"model {name!r} was not ready within start_timeout_s = {self._config.server.start_timeout_s}"
            ) from None
        except PoolError as e:
            model.state, model.failure = "failed", e.message
            raise
        model.state = "ready"
        report = generation.report
        log.info(
            "model ready model=%s version=%d workers=%d slots=%d arena_mb=%.1f weights_mb=%.1f shared=%s",
            name, report.version, config.workers, len(generation.arena.slots),
            generation.arena.size_bytes / 1e6, report.weights_bytes / 1e6, report.weights_shared,
        )  # fmt: skip

    async def _start_generation(self, model: ServedModel, config: ModelConfig) -> Generation:
        report, weights_fd = await self._supervisor.load(
            model.name, config, self._config.server.start_timeout_s
        )
        generation = Generation(model.name, config, report)
        replicas = Replicas(
            self._supervisor, generation, weights_fd, self, self._config.server.start_timeout_s
        )
        model.replicas, model.generation = replicas, generation
        model.trials = Trials(generation, replicas, self._refuse, functools.partial(self._run_trial, model))
        self._generations.append(generation)
        await replicas.start()
        return generation

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and finish what is admitted.

        Returns:
            Whether all was finished in time.
        """
        self.is_draining = True
        self.on_unserved()
        self._note_idle()
        if self._idle.is_set():  # which counts even with no time to wait
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Answer what is left `Unavailable`, end the workers, give the memory back; once."""
        self.is_draining = self._is_stopping = True
        self.on_unserved()
        for generation in self._generations:
            for ticket in generation.batcher.drop_waiting():
                ticket.sink.send_error(ticket, _stopping())
        for model in self.models.values():
            if model.trials is not None:
                model.trials.drop(_stopping())
            if model.replicas is not None:
                await model.replicas.stop()
            model.state = "stopped"
        await self._supervisor.stop()
        if self._timer is not None:
            self._timer.cancel()
        for generation in self._generations:
            generation.close()
        self._generations.clear()

    # -- requests -----------------------------------------------------------------------------------

    def resolve(self, meta: PredictMeta) -> Route:
        """What requests with this header run (see `Generation.resolve`).

        Raises:
            ModelNotFound · VersionNotFound · Unavailable, and what `Generation.resolve` raises.
        """
        return self.find(meta.model, meta.version).resolve(meta)

    def find(self, name: str, version: int | None) -> Generation:
        """The generation that serves a model.

        Raises:
            ModelNotFound: no such model; the sentence lists those there are.
            VersionNotFound: another version is served.
            Unavailable: it is not ready.
        """
        model = self.models[self.known(name)]
        if self.is_draining:
            raise _stopping()
        if model.state != "ready" or model.generation is None:
            raise Unavailable(f"model {name!r} is {model.state}" + (model.failure and f": {model.failure}"))
        if version is not None and version != model.generation.version:
            raise VersionNotFound(
                f"model {name!r} has no version {version}; wanted {model.generation.version}"
            )
        return model.generation

    def known(self, name: str) -> str:
        """The name itself, if such a model is configured.

        Raises:
            ModelNotFound: it is not; the sentence lists those that are.
        """
        if name not in self.models:
            names = ", ".join(repr(n) for n in self.models)
            raise ModelNotFound(f"no model {name!r}; wanted one of {names}")
        return name

    def flush(self, generation: Generation, now: float) -> None:
        """Rows were placed: start what can start, and arm the timer for what cannot yet."""
        self._awake.came(Event.REQUEST, now)
        self._advance(generation, now)

    def _advance(self, generation: Generation, now: float) -> None:
        self._dispatch(generation, now)
        self._arm(generation, now)
        self._awake.wait_for(Event.ANSWER if self._running else Event.REQUEST, now)

    def _dispatch(self, generation: Generation, now: float) -> None:
        replicas = self.models[generation.model].replicas
        assert replicas is not None
        for slot, id_ in generation.batcher.dispatch(now):
            if slot.has_ballast:  # expired rows never start
                live = [ticket for ticket in slot.tickets if not ticket.is_settled]
                rows = [(ticket, generation.read_rows(slot, ticket)) for ticket in live]
                generation.refill(slot, rows, slot.aside)
            self._run(generation, replicas, slot, replicas.find(id_))

    def _run(self, generation: Generation, replicas: Replicas, slot: Slot, worker: Worker) -> None:
        tickets = slot.tickets or slot.aside
        generation.arena.describe(slot.index, tickets[0].route.layout)
        replicas.run(worker, slot)
        self._running += 1

    def _run_trial(self, model: ServedModel, slot: Slot, worker: Worker) -> None:
        assert model.generation is not None
        assert model.replicas is not None
        now = time.monotonic()
        model.generation.batcher.dispatch_to(slot, worker.id, now)
        self._run(model.generation, model.replicas, slot, worker)
        self._arm(model.generation, now)

    def _arm(self, generation: Generation, now: float) -> None:
        wakeup = generation.batcher.next_wakeup()
        if wakeup < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = wakeup
            self._timer = self._loop.call_later(max(0.0, wakeup - now), self._wake)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, inf
        now = time.monotonic()
        for generation in self._generations:
            for ticket in generation.batcher.expire(now):
                waited_ms = (now - ticket.received_at) * 1e3
                late = DeadlineExceeded(f"no answer within the request's timeout; waited {waited_ms:.0f} ms")
                ticket.sink.send_error(ticket, late)
            for slot in generation.batcher.overdue(now):
                replicas = self.models[generation.model].replicas
                assert replicas is not None
                replicas.interrupt(slot, generation.batcher.timeout_s)
            self._advance(generation, now)
        self._note_idle()

    # -- workers (Listener) -------------------------------------------------------------------------

    def worker_ready(self, generation: Generation, worker: Worker) -> None:
        """A worker can take a batch."""
        if worker.role == "quarantine":
            self._trials(generation).feed()
            return
        generation.batcher.worker_ready(worker.id)
        self._advance(generation, time.monotonic())

    def worker_leaving(self, generation: Generation, worker: Worker) -> None:
        """A worker takes no more batches."""
        generation.batcher.worker_lost(worker.id)

    def _trials(self, generation: Generation) -> Trials:
        trials = self.models[generation.model].trials
        assert trials is not None
        return trials

    def worker_answered(self, generation: Generation, worker: Worker, message: Message) -> None:
        """A batch came back: first keep the worker busy, then send the answers."""
        slot = worker.slot
        if slot is None or slot.index != message.slot or slot.generation != message.generation:
            log.error("stale answer model=%s worker=%d slot=%d", generation.model, worker.index, message.slot)
            return
        batcher = generation.batcher
        now = time.monotonic()
        tickets = batcher.finish(slot, now)
        replicas = self.models[generation.model].replicas
        assert replicas is not None
        replicas.finished(worker)
        self._running -= 1
        if worker.state is WorkerState.READY and worker.role == "serving":
            batcher.worker_ready(worker.id)
        self._awake.came(Event.ANSWER, now)
        self._dispatch(generation, now)
        self._count(generation, slot.rows)
        if message.kind == Ring.DONE:
            self._deliver(generation, slot, tickets)
            if slot.trial is not None:
                self._trials(generation).passed(slot)
            if slot.pins == 0:
                self._release(generation, slot)
        else:
            kind = TooLarge if message.kind == Ring.TOO_LARGE else ModelError
            self._batch_raised(generation, slot, tickets, kind(message.text))
        self._advance(generation, now)

    def _batch_raised(
        self, generation: Generation, slot: Slot, tickets: list[Ticket], error: PoolError
    ) -> None:
        if slot.trial is None and (len(tickets) <= 1 or not generation.config.retry):
            self._refuse(tickets, error)
            self._release(generation, slot)
            return
        generation.batcher.hold(slot)
        if slot.trial is None:
            self._trials(generation).begin(slot, tickets, error, is_deadly=False)
        else:
            self._trials(generation).failed(slot, error, is_deadly=False, is_own_doing=True)

    def _deliver(self, generation: Generation, slot: Slot, tickets: list[Ticket]) -> None:
        # Most batches hold requests of one kind for one sink: one call then sends them all.
        groups: dict[tuple[Route, Sink], list[Ticket]] = {}
        for ticket in tickets:
            groups.setdefault((ticket.route, ticket.sink), []).append(ticket)
        try:
            places = generation.arena.read_run_record(slot.index)[2]
            replies = {route: generation.reply_for(route, places) for route, _ in groups}
        except InternalError as e:
            self._refuse(tickets, e)
            return
        for (route, sink), group in groups.items():
            for ticket in group:
                ticket.is_settled = True
            sink.send_results(group, replies[route], slot)

    @staticmethod
    def _refuse(tickets: Iterable[Ticket], error: PoolError) -> None:
        for ticket in tickets:
            if not ticket.is_settled:
                ticket.is_settled = True
                ticket.sink.send_error(ticket, error)

    def _release(self, generation: Generation, slot: Slot) -> None:
        """Every answer has left a DONE slot: give it back, or go on with its trial."""
        if slot.trial is not None:
            generation.batcher.hold(slot)
            self._trials(generation).advance(slot)
        else:
            generation.batcher.release(slot)
        if self.is_draining:
            self._note_idle()

    def pin(self, generation: Generation, slot: Slot, payload: np.ndarray[Any, Any]) -> None:
        """Keep `slot` from being used again until `payload`, a view of its bytes, is garbage.

        Thread-safe at the far end: ZeroMQ lets go of a frame in a thread of its own.
        """
        slot.pins += 1
        weakref.finalize(payload, self._unpin_from_thread, generation, slot).atexit = False

    def _unpin_from_thread(self, generation: Generation, slot: Slot) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._unpin, generation, slot)

    def _unpin(self, generation: Generation, slot: Slot) -> None:
        slot.pins -= 1
        if slot.pins == 0 and generation in self._generations:
            self._release(generation, slot)

    def worker_ended(self, generation: Generation, worker: Worker, slot: Slot | None, end: End) -> None:
        """A worker's process is gone: nothing writes to its slot any more."""
        generation.batcher.worker_lost(worker.id)
        if slot is not None:
            self._running -= 1
            self._batch_lost(generation, slot, end)
        trials = self._trials(generation)
        if worker.role == "quarantine":
            if worker.state is WorkerState.FAILED:
                trials.give_up(end.how)
        else:
            self._give_up_if_failed(generation, end.how)
        self._advance(generation, time.monotonic())
        self._note_idle()

    def _batch_lost(self, generation: Generation, slot: Slot, end: End) -> None:
        """The worker of a batch is gone: run its rows again, unless that is not allowed."""
        tickets = generation.batcher.reap(slot)
        lost = WorkerLost(f"the worker running the batch of {slot.rows} rows ended: {end.how}")
        trials = self._trials(generation)
        if self._is_stopping:
            self._refuse(list(slot.everyone()), _stopping())
            generation.batcher.release(slot)
        elif slot.trial is not None:
            trials.failed(slot, lost, is_deadly=True, is_own_doing=end.is_own_doing)
        elif not tickets or not generation.config.retry:
            self._refuse(tickets, lost)
            generation.batcher.release(slot)
        elif not end.is_own_doing and slot.runs == 1:
            generation.batcher.requeue(slot)  # killed from outside: nobody is suspected yet
        else:
            trials.begin(slot, tickets, lost, is_deadly=True)

    def _give_up_if_failed(self, generation: Generation, how: str) -> None:
        """With its last worker given up, a model's waiting requests would wait for nobody."""
        model = self.models[generation.model]
        assert model.replicas is not None
        if any(worker.state is not WorkerState.FAILED for worker in model.replicas.workers):
            return
        model.state, model.failure = "failed", f"its workers keep ending: {how}"
        log.error("model failed model=%s reason=%s", model.name, model.failure)
        self.on_unserved()
        lost = Unavailable(f"model {model.name!r} is failed: {model.failure}")
        for ticket in generation.batcher.drop_waiting():
            ticket.sink.send_error(ticket, lost)

    # -- looking ------------------------------------------------------------------------------------

    def _count(self, generation: Generation, rows: int) -> None:
        model = self.models[generation.model]
        model.batches += 1
        model.rows += rows
        model.batch_sizes[rows] = model.batch_sizes.get(rows, 0) + 1

    def _note_idle(self) -> None:
        if self.is_draining and all(g.batcher.is_idle for g in self._generations):
            self._idle.set()

    def readiness(self) -> dict[str, bool]:
        """Per model: whether it has a worker that answered its canary and is still there."""
        return {
            name: model.state == "ready"
            and not self.is_draining
            and model.replicas is not None
            and any(
                worker.state in (WorkerState.READY, WorkerState.BUSY) for worker in model.replicas.workers
            )
            for name, model in self.models.items()
        }

    def describe_models(self) -> dict[str, Any]:
        """Per model: version, whether it is ready, names of its signatures."""
        readiness = self.readiness()
        return {
            name: {
                "version": model.generation.version if model.generation is not None else None,
                "ready": readiness[name],
                "signatures": sorted(model.generation.signatures) if model.generation is not None else [],
            }
            for name, model in self.models.items()
        }

    async def status(self) -> dict[str, Any]:
        """The engine's part of the status document (`docs/operations.md`)."""
        return await read_status(self.models.values(), self._supervisor.zygotes.values())


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping")
