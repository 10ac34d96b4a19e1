"""A front that follows another one: the process of a follower, from its first line to its exit code.

Started by the lead (`pool.front.followers`) as `python -m pool.front.follower LINK_FD LIFELINE_FD NUMBER`.

It is made of what every front is made of: an `Engine`, whose workers are those that the lead tells of, and an
`Endpoint`. It holds nothing that the lead could not tell it anew, so whatever goes wrong here ends it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import itertools
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
import uvloop

from pool.errors import InternalError, PoolError
from pool.front import link, logs, tallies
from pool.front.crew import Listener
from pool.front.endpoint import Endpoint
from pool.front.engine import Engine
from pool.front.generation import Generation
from pool.front.led import LedReplicas
from pool.front.link import Link
from pool.front.logs import Log
from pool.front.server import allow_descriptors, keep_freed_memory
from pool.front.serving import Serving
from pool.front.workers import End
from pool.shm.arena import Arena
from pool.shm.board import Board
from pool.shm.control import TRACEBACK_SIGNAL
from pool.shm.lifeline import die_with_front

log = Log("pool.follower")

_COUNT_S = 1.0  # from one count to the next; the lead takes silence for a fault


class Follower:
    """The parts of a follower. Make it inside a running event loop.

    Args:
        sock: To the lead.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._link = Link(sock, link.decode_to_follower, self._hear, self._leave)
        self._done: asyncio.Future[int] = self._loop.create_future()
        self._engine: Engine | None = None
        self._endpoint: Endpoint | None = None
        self._order: link.FollowerOrder | None = None
        self._servings: dict[int, Serving] = {}  # by number
        self._never_served: set[int] = set()
        self._is_open = False
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Follow until told to leave; gives the exit code."""
        code = await self._done
        if self._timer is not None:
            self._timer.cancel()
        for future in self._asked.values():
            future.cancel()
        if self._engine is not None:
            await self._engine.stop()
        if self._endpoint is not None:
            self._endpoint.close()
        self._link.close()
        return code

    def _leave(self, code: int = 0) -> None:
        if not self._done.done():
            self._done.set_result(code)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what the lead tells ------------------------------------------------------------------------

    def _hear(self, message: link.ToFollower, document: bytes, fds: list[int]) -> None:
        if self._done.done() and not isinstance(message, link.WorkerEnded):  # it leaves
            for fd in fds:
                os.close(fd)
            return
        try:
            self._do(message, document, fds)
        except PoolError as e:
            log.error("cannot follow", code=e.code, reason=e.message)
            self._leave(1)
        except Exception:
            log.defect("cannot follow", message=type(message).__name__)
            self._leave(1)

    def _do(self, message: link.ToFollower, document: bytes, fds: list[int]) -> None:
        match message:
            case link.Welcome():
                self._begin(link.decode_order(document))
            case link.Begin(number):
                self._take(number, link.decode_generation(document), fds)
            case link.WorkerJoined(number):
                replicas = self._replicas(number)
                if replicas is None:
                    for fd in fds:
                        os.close(fd)
                else:
                    replicas.joined(message, fds)
            case link.WorkerLeaving(number, worker):
                if (replicas := self._replicas(number)) is not None:
                    replicas.leaving(worker)
            case link.WorkerEnded(number, worker, how, is_own_doing, cause):
                if (replicas := self._replicas(number)) is not None:
                    replicas.ended(worker, End(how, is_own_doing, cause))
            case link.QuarantineFailed(number, how):
                if number in self._servings:
                    self._servings[number].quarantine_failed(how)
            case link.GenerationFailed(number, how):
                if number in self._servings:
                    self._running_engine().failed(self._servings[number], how)
            case link.Finish(number):
                if number in self._never_served:
                    self._spawn(self._running_engine().discard(self._servings[number]))
                elif number not in self._servings:
                    self._link.send(link.Retired(number))
            case link.Serve(version):
                self._serve(version, link.decode_state(document))
            case link.Drain(timeout_s):
                self._spawn(self._drain(timeout_s))
            case link.Told(id_, error):
                self._told(id_, error, document)
            case link.Count():
                self._say_count()
            case link.Stop():
                self._leave()

    def _running_engine(self) -> Engine:
        assert self._engine is not None, "welcomed first"
        return self._engine

    def _replicas(self, number: int) -> LedReplicas | None:
        serving = self._servings.get(number)
        if serving is None:
            return None
        assert isinstance(serving.replicas, LedReplicas), "made by `_take`"
        return serving.replicas

    def _begin(self, order: link.FollowerOrder) -> None:
        self._order = order
        logs.apply(order.config.server.log_level, order.config.server.access_log)
        self._engine = Engine(order.config)
        self._endpoint = Endpoint(self._engine, order.config.server, order.endpoints, dict, front=order.index)
        self._endpoint.ask_status = self._ask_status
        self._timer = self._loop.call_later(_COUNT_S, self._beat)

    def _take(self, number: int, order: link.GenerationOrder, fds: Sequence[int]) -> None:
        """A generation begins."""
        engine, mine = self._running_engine(), self._order
        assert mine is not None, "welcomed first"
        arena_fd, board_fd = fds
        board = Board(board_fd, mine.index, mine.fronts)
        known = engine.models.get(order.model)
        generation = Generation(
            order.model,
            order.config,
            order.report,
            None if known is None else known.metrics,
            Arena.attach(arena_fd, order.slots, order.slot_bytes),
        )

        def hire(listener: Listener) -> LedReplicas:
            return LedReplicas(generation, listener, board, number, self._tell)

        self._servings[number] = Serving(generation, hire, engine, board)
        self._never_served.add(number)
        engine.adopt(self._servings[number])

    def _tell(self, message: Any) -> None:
        if isinstance(message, link.Retired):
            self._servings.pop(message.generation, None)
            self._never_served.discard(message.generation)
        self._link.send(message)

    def _serve(self, version: int, state: link.State) -> None:
        """Serve what the lead serves; open the endpoint, the first time."""
        engine, endpoint = self._running_engine(), self._endpoint
        assert endpoint is not None, "welcomed first"
        engine.apply_server(state.config.server)
        for name, number in state.served.items():
            serving, config = self._servings[number], state.config.models[name]
            self._never_served.discard(number)
            known = engine.models.get(name)
            if known is None or known.serving is not serving:
                engine.switch(name, serving)
            if serving.generation.config != config:
                engine.apply_model(name, config)
            if name in state.failed and engine.models[name].state != "failed":
                engine.failed(serving, state.failed[name])
        for name in [name for name in engine.models if name not in state.config.models]:
            engine.remove(name)
        engine.rewire(engine.wire(state.config, {}))
        engine.config = msgspec.structs.replace(
            engine.config, models=state.config.models, pipelines=state.config.pipelines
        )
        logs.apply(state.config.server.log_level, state.config.server.access_log)
        if self._is_open:
            endpoint.apply(state.config.server)
        else:
            endpoint.open()
            self._is_open = True
            # What exists now lives as long as the process: no collection need walk it again.
            gc.collect()
            gc.freeze()
        self._link.send(link.Following(version, endpoint.endpoints))

    async def _drain(self, timeout_s: float) -> None:
        self._link.send(link.Drained(await self._running_engine().drain(timeout_s)))

    # -- what is told to the lead -------------------------------------------------------------------

    def _beat(self) -> None:
        self._timer = self._loop.call_later(_COUNT_S, self._beat)
        self._say_count()

    def _say_count(self) -> None:
        if self._endpoint is not None:
            tally = tallies.count(self._running_engine(), self._endpoint.describe())
            self._link.send(link.Counted(), link.encode_document(tally))

    async def _ask_status(self) -> dict[str, Any]:
        """The lead's status document, for a client of this front.

        Raises:
            InternalError: it cannot tell.
        """
        id_ = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._asked[id_] = future
        try:
            self._link.send(link.Ask(id_))
            return await future
        finally:
            del self._asked[id_]

    def _told(self, id_: int, error: str, document: bytes) -> None:
        future = self._asked.get(id_)
        if future is None or future.done():
            return
        if error:
            future.set_exception(InternalError(error))
        else:
            future.set_result(link.decode_any(document))


def main(link_fd: int, lifeline_fd: int, number: int) -> int:
    """Follow the lead at the other end of `link_fd`."""
    # Ctrl-C, and a SIGTERM to the whole group, are for the lead, which tells what to do.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    die_with_front(lifeline_fd)
    logs.start(os.environ, front=number)
    faulthandler.enable()
    faulthandler.register(TRACEBACK_SIGNAL)
    keep_freed_memory()
    allow_descriptors()

    async def run() -> int:
        return await Follower(socket.socket(fileno=link_fd)).run()

    return uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
