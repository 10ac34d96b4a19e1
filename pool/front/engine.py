"""The engine: the models of a config under asyncio. Runs in the front, or in any application's loop.

It starts and stops models, says which generation serves a request, and keeps the clock for all of them;
each generation at work is a `pool.front.serving.Serving`. It has no sockets to clients:
`pool.front.endpoint` is the one that has.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf
from typing import Any, Protocol

import msgspec
import numpy as np

from pool.config import Config, ModelConfig, ServerConfig
from pool.errors import ModelNotFound, PoolError, Unavailable, VersionNotFound
from pool.front.awake import Awake, Event
from pool.front.crew import Crew, Listener
from pool.front.generation import Generation
from pool.front.heartbeat import Batch, Vitals
from pool.front.logs import Log
from pool.front.metrics import ModelMetrics
from pool.front.pipeline import Pipeline
from pool.front.pipelines import Pipelines
from pool.front.processes import Member
from pool.front.replicas import Audience, Replicas
from pool.front.route import Route
from pool.front.served import READY, ServedModel
from pool.front.serving import Serving, stopping
from pool.front.slots import Slot, Ticket, Turn
from pool.front.status import read_status
from pool.front.supervisor import Supervisor
from pool.wire import PredictMeta

log = Log("pool.engine")


class Sharing(Protocol):
    """Who has other fronts share the workers of this one (`pool.front.followers`)."""

    async def begin(self, generation: Generation) -> Audience:
        """A generation is about to get workers.

        Raises:
            ConfigError: the other fronts cannot be given memory for it.
        """

    async def end(self, generation: Generation) -> None:
        """Its workers are about to end: returns when no other front needs them."""

    def failed(self, generation: Generation, how: str) -> None:
        """Its last worker was given up."""

    def members(self) -> list[Member]:
        """The processes of the other fronts."""


class Engine:
    """Models, their batches and their workers. Make it inside a running event loop.

    Args:
        config: Checked.

    Attributes:
        config: What is served; `pool.front.reloading` changes it.
        models: All of the config, by name.
        pipelines: All of the config, and the requests on their way through them.
        unknown: Counts predictions refused for other models, or that cannot be read.
        turn: The present turn of the loop, for the tickets of the requests received in it.
        is_draining: Whether new requests are refused.
        is_stopping: Whether nothing runs again.
        sharing: Who has other fronts share the workers; None if nobody does. Set before `start`.
        on_unserved: Called, each, when a route resolved earlier may be served no more: whoever keeps
            routes resolves them anew.
    """

    def __init__(self, config: Config) -> None:
        self.on_unserved: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self.config = config
        self._supervisor = Supervisor()
        self.models = {name: ServedModel(name) for name in config.models}
        self.unknown = ModelMetrics()
        self.pipelines = Pipelines(self, tuple(config.pipelines))
        self._servings: dict[Generation, Serving] = {}  # also those that only finish what they admitted
        self._lost: dict[Generation, str] = {}  # of these, those that have no worker left, and why
        self._retiring: dict[Serving, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._awake = Awake(self._loop, config.server.awake_us / 1e6)
        self.sharing: Sharing | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self._freed = asyncio.Event()  # set whenever a slot is free that was not
        self.turn = Turn(time.monotonic())
        self.is_draining = False
        self.is_stopping = False

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load every model and start its workers; returns when all are ready.

        Raises:
            ModelLoadError · ConfigError: one cannot be served (`status` says which and why), or a pipeline
                does not fit its models.
        """
        # One at a time: loading is where memory peaks, and a loader uses every core as it is.
        for name in self.models:
            await self._start_model(name)
        self.rewire(self.wire(self.config, {}))

    async def _start_model(self, name: str) -> None:
        model = self.models[name]

        def loaded(serving: Serving) -> None:
            model.serving = serving  # so that its workers can be looked at while they start

        try:
            serving = await self.start_serving(name, self.config.models[name], loaded)
        except PoolError as e:
            model.state, model.failure = "failed", e.message
            raise
        self.switch(name, serving)

    async def start_serving(
        self, name: str, config: ModelConfig, loaded: Callable[[Serving], None] = lambda _: None
    ) -> Serving:
        """Load a model and start its workers; nothing is asked of them yet.

        Args:
            name: Of the model.
            config: Of the model.
            loaded: Called when the model is loaded and its workers are about to start.

        Raises:
            ModelLoadError · ConfigError · Unavailable: it cannot be served; nothing of it is left.
        """
        start_timeout_s = self.config.server.start_timeout_s
        serving: Serving | None = None

        async def start() -> Serving:
            nonlocal serving
            report, weights_fd = await self._supervisor.load(name, config, start_timeout_s)
            known = self.models.get(name)
            metrics = None if known is None else known.metrics
            generation = Generation(name, config, report, metrics)
            shared = None
            if self.sharing is not None:
                try:
                    shared = await self.sharing.begin(generation)
                except BaseException:
                    generation.close()
                    if weights_fd is not None:
                        os.close(weights_fd)
                    raise

            def hire(listener: Listener) -> Replicas:
                return Replicas(self._supervisor, generation, weights_fd, listener, start_timeout_s, shared)

            serving = Serving(generation, hire, self, None if shared is None else shared.board)
            self.adopt(serving)
            loaded(serving)
            await serving.replicas.start()
            return serving

        try:
            return await asyncio.wait_for(start(), start_timeout_s)
        except asyncio.TimeoutError:
            if serving is not None:
                await self.discard(serving)
            raise Unavailable(
                f"model {name!r} was not ready within start_timeout_s = {start_timeout_s}"
            ) from None
        except PoolError:
            if serving is not None:
                await self.discard(serving)
            raise

    def adopt(self, serving: Serving) -> None:
        """See to a generation from now on: its clock, and its end. Nothing is asked of it yet (`switch`)."""
        self._servings[serving.generation] = serving

    def switch(self, name: str, serving: Serving) -> None:
        """Have a model served by a generation that is ready; the one before finishes what it admitted."""
        model = self.models.setdefault(name, ServedModel(name))
        model.metrics = serving.generation.metrics
        old, model.serving = model.serving, serving
        model.state, model.failure = "ready", ""
        self._unserved()
        if old is not None and old is not serving:
            self._retire(old)
        generation, report = serving.generation, serving.generation.report
        log.info(
            "model ready",
            model=name,
            version=report.version,
            workers=generation.config.workers,
            slots=len(generation.arena.slots),
            arena_bytes=generation.arena.size_bytes,
            weights_bytes=report.weights_bytes,
            weights_shared=report.weights_shared,
        )

    def wire(self, config: Config, ready: Mapping[str, Serving]) -> dict[str, Pipeline]:
        """The pipelines of a config, on the models that are served or about to be.

        Args:
            config: Whose pipelines; each of its models is among `ready`, or served.
            ready: Started, but not switched to yet.

        Raises:
            ConfigError: one does not fit its models.
        """
        generations = {}
        for name in config.models:
            serving = ready.get(name) or self.models[name].serving
            assert serving is not None, "a model that is not started is not served"
            generations[name] = serving.generation
        return self.pipelines.wire(config.pipelines, generations)

    def rewire(self, pipelines: dict[str, Pipeline]) -> None:
        """Serve these pipelines from now on; what was admitted to others goes on as it began."""
        self.pipelines.serve(pipelines)
        self._unserved()
        for name, pipeline in pipelines.items():
            log.info("pipeline ready", pipeline=name, steps=[step.name for step in pipeline.wiring.steps])

    def apply_server(self, server: ServerConfig) -> None:
        """Take over what of `[server]` concerns the engine."""
        self.config = msgspec.structs.replace(self.config, server=server)
        self._awake.awake_s = server.awake_us / 1e6

    def apply_model(self, name: str, config: ModelConfig) -> None:
        """Change what of a model can be changed in place, workers included."""
        serving = self.models[name].serving
        assert serving is not None, "a model that is served"
        serving.apply(config)
        self._unserved()  # routes know priority, timeout and limits

    def remove(self, name: str) -> None:
        """Serve a model no more; it finishes what it admitted."""
        model = self.models.pop(name)
        self._unserved()
        log.info("model removed", model=name)
        if model.serving is not None:
            self._retire(model.serving)

    def _retire(self, serving: Serving) -> None:
        self._retiring[serving] = self._loop.create_task(self._finish(serving))

    async def _finish(self, serving: Serving) -> None:
        generation = serving.generation
        while not generation.batcher.is_idle or self.pipelines.uses(generation):
            self._freed.clear()
            await self._freed.wait()
        await self.discard(serving)
        del self._retiring[serving]

    async def discard(self, serving: Serving) -> None:
        """End a generation's workers and give its memory back."""
        if self.sharing is not None:
            await self.sharing.end(serving.generation)
        await serving.stop()
        self._servings.pop(serving.generation, None)
        self._lost.pop(serving.generation, None)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and finish what is admitted.

        Returns:
            Whether all was finished in time.
        """
        self.is_draining = True
        self._unserved()
        self.freed()
        if self._idle.is_set():  # which counts even with no time to wait
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Answer what is left `Unavailable`, end the workers, give the memory back; once."""
        self.is_draining = self.is_stopping = True
        self._unserved()
        for task in self._retiring.values():
            task.cancel()
        if self._retiring:
            await asyncio.wait(self._retiring.values())
        self.pipelines.waiting.drop(stopping())
        for serving in self._servings.values():
            serving.drop_waiting(stopping)
        for serving in self._servings.values():
            await serving.stop()
        self._servings.clear()
        for model in self.models.values():
            model.state = "stopped"
        await self._supervisor.stop()
        self.pipelines.waiting.stop()
        if self._timer is not None:
            self._timer.cancel()

    # -- requests -----------------------------------------------------------------------------------

    def resolve(self, meta: PredictMeta) -> Route:
        """What requests with this header run (see `Generation.resolve`).

        Raises:
            ModelNotFound · VersionNotFound · Unavailable, and what `Generation.resolve` raises.
        """
        return self.find(meta.model, meta.version).resolve(meta)

    def find(self, name: str, version: int | None) -> Generation | Pipeline:
        """The generation that serves a model, or the pipeline of that name.

        Raises:
            ModelNotFound: no such model; the sentence lists those there are.
            VersionNotFound: another version is served.
            Unavailable: it is not ready.
        """
        self.known(name)
        if self.is_draining:
            raise stopping()
        if name in self.pipelines.metrics:
            pipeline = self.pipelines.find(name, version)
            for generation in pipeline.generations:
                if generation in self._lost:
                    raise Unavailable(self._lost[generation])
            return pipeline
        model = self.models[name]
        if model.state != "ready" or model.serving is None:
            raise Unavailable(f"model {name!r} is {model.state}" + (model.failure and f": {model.failure}"))
        generation = model.serving.generation
        if version is not None and version != generation.version:
            raise VersionNotFound(f"model {name!r} has no version {version}; wanted {generation.version}")
        return generation

    def known(self, name: str) -> str:
        """The name itself, if such a model or pipeline is configured.

        Raises:
            ModelNotFound: it is not; the sentence lists those that are.
        """
        if name not in self.models and name not in self.pipelines.metrics:
            names = ", ".join(repr(n) for n in (*self.models, *self.pipelines.metrics))
            raise ModelNotFound(f"no model {name!r}; wanted one of {names}")
        return name

    def metrics_of(self, name: str) -> ModelMetrics:
        """What counts the predictions asked of a model or pipeline, whether or not there is one."""
        model = self.models.get(name)
        return self.pipelines.metrics.get(name, self.unknown) if model is None else model.metrics

    def _unserved(self) -> None:
        self.pipelines.forget()
        for forget in self.on_unserved:
            forget()

    def flush(self, generation: Generation | Pipeline, admitted: int) -> Turn:
        """Rows were placed: start what can start, and arm the timer for what cannot yet.

        Args:
            generation: Where.
            admitted: Requests placed there since the last flush.

        Returns:
            The new turn that begins with it.
        """
        now = time.monotonic()
        turn, self.turn = self.turn, Turn(now)
        turn.ended = now
        self._awake.came(Event.REQUEST, now)
        first = generation.entry if isinstance(generation, Pipeline) else generation
        self._servings[first].advance(now)
        generation.metrics.stages["receive"].add(now - turn.started, admitted)
        return self.turn

    def pin(self, generation: Generation, slot: Slot, payload: np.ndarray[Any, Any]) -> None:
        """Keep `slot` from being used again until `payload`, a view of its bytes, is garbage."""
        self._servings[generation].pin(slot, payload)

    def unsettled(self) -> Iterator[tuple[Slot, Ticket]]:
        """Every ticket of every model that is still to be answered, with its slot."""
        for generation in self._servings:
            yield from generation.batcher.unsettled()

    def withdraw(self, found: Iterable[tuple[Slot, Ticket]]) -> None:
        """Answers to these tickets are not wanted any more."""
        by_generation: dict[Generation, list[tuple[Slot, Ticket]]] = {}
        for slot, ticket in found:
            by_generation.setdefault(ticket.route.generation, []).append((slot, ticket))
        now = time.monotonic()
        for generation, pairs in by_generation.items():
            generation.batcher.withdraw_all(pairs)
            self._servings[generation].advance(now)
        self.freed()

    # -- what pipelines ask (Host) ------------------------------------------------------------------

    def advance(self, generation: Generation, now: float) -> None:
        """Rows were placed there: start what can start."""
        serving = self._servings.get(generation)
        if serving is not None:
            serving.advance(now)

    def reason_lost(self, generation: Generation) -> str | None:
        """Why a generation has no workers any more; None if it has."""
        return self._lost.get(generation)

    # -- what generations tell (Host) ---------------------------------------------------------------

    def came(self, event: Event, now: float) -> None:
        """Something that is waited for awake is there."""
        self._awake.came(event, now)

    def advanced(self, serving: Serving, now: float) -> None:
        """Arm the timer for what a generation waits for, and stay awake if that pays."""
        self.pipelines.waiting.feed()
        wakeup = serving.generation.batcher.next_wakeup()
        if wakeup < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = wakeup
            self._timer = self._loop.call_later(max(0.0, wakeup - now), self._wake)
        is_running = serving.running or any(other.running for other in self._servings.values())
        self._awake.wait_for(Event.ANSWER if is_running else Event.REQUEST, now)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, inf
        now = time.monotonic()
        for serving in list(self._servings.values()):
            serving.expire(now)
        self.freed()

    def freed(self) -> None:
        """Give room to those that wait for it, and tell whoever waits until all is done that was admitted."""
        self.pipelines.waiting.feed()
        self._freed.set()
        if (
            self.is_draining
            and not self.pipelines.executions
            and all(generation.batcher.is_idle for generation in self._servings)
        ):
            self._idle.set()

    def failed(self, serving: Serving, how: str) -> None:
        """A model has no worker left: what waits for it would wait for nobody."""
        name, failure = serving.generation.model, f"its workers keep ending: {how}"
        model = self.models.get(name)
        if model is not None and model.serving is serving:
            model.state, model.failure = "failed", failure
            log.error("model failed", model=name, reason=failure)
            self._unserved()
        sentence = self._lost[serving.generation] = f"model {name!r} is failed: {failure}"
        serving.drop_waiting(lambda: Unavailable(sentence))
        if self.sharing is not None:
            self.sharing.failed(serving.generation, how)
        self.pipelines.waiting.drop(Unavailable(sentence), serving.generation)

    # -- looking ------------------------------------------------------------------------------------

    def crew_of(self, generation: Generation) -> Crew | None:
        """The workers of a generation; None if it has ended."""
        serving = self._servings.get(generation)
        return None if serving is None else serving.replicas

    def readiness(self) -> dict[str, bool]:
        """Per model: whether it has a worker that answered its canary; per pipeline: whether all have."""
        models = self._models_ready()
        return models | self.pipelines.readiness(models)

    def _models_ready(self) -> dict[str, bool]:
        return {name: model.is_ready and not self.is_draining for name, model in self.models.items()}

    def describe_models(self) -> dict[str, Any]:
        """Per model and pipeline: version, whether it is ready, names of its signatures."""
        ready = self.readiness()
        models = {name: model.describe(ready[name]) for name, model in self.models.items()}
        return models | self.pipelines.describe_models(ready)

    def running(self) -> Iterator[Batch]:
        """The batches that workers have."""
        for generation in self._servings:
            for slot in generation.batcher.running():
                yield Batch(generation.model, slot.dispatched_at, generation.batcher.timeout_s)

    def vitals(self) -> Vitals:
        """How it is, in numbers."""
        readiness = self._models_ready()
        served = [model.serving for model in self.models.values() if model.serving is not None]
        states = [worker.state for serving in served for worker in serving.replicas.workers]
        return Vitals(
            models=len(readiness),
            models_ready=sum(readiness.values()),
            workers=sum(config.workers for config in self.config.models.values()),
            workers_ready=sum(state in READY for state in states),
            queue_rows=sum(generation.batcher.queue_rows for generation in self._servings),
        )

    @property
    def lifeline_fd(self) -> int:
        """What tells other processes that this one is gone (`pool.shm.lifeline`)."""
        return self._supervisor.lifeline.read_fd

    @property
    def zygotes_lost(self) -> dict[str, int]:
        """Zygotes that ended unasked, by backend."""
        return self._supervisor.lost

    def members(self) -> list[Member]:
        """The processes there are now."""
        members = [Member(os.getpid(), "front")]
        for zygote in self._supervisor.zygotes.values():
            if zygote.pid is not None:
                members.append(Member(zygote.pid, "zygote", place=zygote.backend))
        for serving in self._servings.values():
            for worker in serving.replicas.everyone():
                if worker.pid is not None:
                    role = "worker" if worker.role == "serving" else worker.role
                    members.append(Member(worker.pid, role, serving.generation.model, str(worker.index)))
        return members if self.sharing is None else members + self.sharing.members()

    async def status(self) -> dict[str, Any]:
        """The engine's part of the status document (`docs/operations.md`)."""
        document = await read_status(self.models.values(), self._supervisor.zygotes.values())
        return document | {"pipelines": self.pipelines.describe()}
