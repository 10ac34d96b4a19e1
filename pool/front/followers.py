"""The other fronts of a server, as the one that leads has them (`[server] fronts`). Runs in the lead.

A follower is a process that serves the same models at the same endpoints, with memory of its own and the
lead's workers. It knows nothing that it was not told: what is served, and the lives of the workers. So one
that dies, or is silent for too long, is started again and told anew. What it had admitted is lost with its
connections, as that of any front; the workers find its doorbells closed, and forget it.

The lead waits for no follower but where something of it must not be pulled away: a generation ends when every
follower has finished with it, and a reload is over when all of them serve what it brought.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from pool.endpoints import front_endpoint
from pool.errors import ConfigError
from pool.front import link, tallies
from pool.front.binding import remove_stale
from pool.front.engine import Engine
from pool.front.generation import Generation
from pool.front.link import Link
from pool.front.logs import Log
from pool.front.processes import Member, measure_processes, no_usage
from pool.front.replicas import Replicas
from pool.front.sharing import Life, SharedGeneration
from pool.front.tallies import Tally
from pool.front.workers import backoff_s
from pool.front.zygotes import Child, describe_exit
from pool.shm.arena import Arena
from pool.shm.board import Board
from pool.shm.control import TRACEBACK_SIGNAL

log = Log("pool.followers")

# A follower says each second what it has counted. One that is silent for so long is hung or stopped; while it
# starts it may have to wait for a machine that is busy with many others.
_SILENCE_S = 5.0
_START_S = 60.0
_LOOK_S = 0.5
# Between asking a silent one where it is and killing it: to write a traceback takes milliseconds.
_TRACEBACK_GRACE_S = 0.25
# One that is asked to leave waits 2 s for its batches, and 1 s for ZeroMQ to send replies.
_STOP_GRACE_S = 5.0
# Serving for so long, it was no failed start.
_STABLE_S = 10.0
# Longest a status document waits for what followers counted since their last word.
_COUNT_S = 0.5


class _Follower:
    """One of the fronts, and the process that takes its place when it dies.

    Attributes:
        index: Its number; the lead is 0.
        life: The present process, if there is one.
        restarts: Processes started to replace one that ended.
        failures: Ends in a row without a while of serving in between.
        past: What its former processes counted.
        last_error: Why the last process ended.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.life: Life | None = None
        self.restarts = 0
        self.failures = 0
        self.past: Tally = {}
        self.last_error = ""

    @property
    def state(self) -> str:
        """`serving`, `starting`, or `backoff`: about to be started again."""
        if self.life is None:
            return "backoff"
        return "serving" if self.life.version else "starting"

    @property
    def requests(self) -> int:
        """Predictions admitted by all its processes, as far as they told."""
        counted = {} if self.life is None else self.life.counted
        return int(counted.get("requests", 0) + self.past.get("requests", 0))


class Followers:
    """All of them. Make it inside a running event loop.

    Args:
        engine: The lead's; told of this by its `sharing`.
        fronts: How many fronts there are, the lead included.
        ask_status: Gives the status document, for clients of followers.
        count: Gives what the lead has counted.
    """

    def __init__(
        self,
        engine: Engine,
        fronts: int,
        ask_status: Callable[[], Awaitable[dict[str, Any]]],
        count: Callable[[], Tally],
    ) -> None:
        self._engine = engine
        self._fronts = fronts
        self._ask_status = ask_status
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._followers = [_Follower(index) for index in range(1, fronts)]
        self._shared: dict[int, SharedGeneration] = {}
        self._numbers = itertools.count(1)
        self._version = 0
        self._endpoints: list[tuple[str, ...]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_started = self._is_stopping = False
        self._news = asyncio.Event()  # set whenever a follower has counted

    def lives(self) -> list[Life]:
        """The processes there are."""
        return [follower.life for follower in self._followers if follower.life is not None]

    # -- what is served (Sharing) -------------------------------------------------------------------

    async def begin(self, generation: Generation) -> SharedGeneration:
        """A generation is about to get workers.

        Raises:
            ConfigError: the other fronts cannot be given memory for it.
        """
        try:
            board = Board.create(self._fronts)
        except OSError as e:
            raise ConfigError(f"model {generation.model!r}: no memory for a board: {e.strerror}") from None
        shared = SharedGeneration(next(self._numbers), generation, board, self.lives)
        self._shared[shared.number] = shared
        try:
            for life in self.lives():
                await self._give(life, shared)
        except BaseException:
            shared.is_ending = True
            del self._shared[shared.number]
            self._tell_finish(shared)
            board.close()
            raise
        return shared

    async def _give(self, life: Life, shared: SharedGeneration) -> None:
        """Give a follower memory for a generation, and its workers.

        Raises:
            ConfigError: there is none.
        """
        async with life.lock:
            if not life.lacks(shared) or life.child.ended.done():
                return
            arena = shared.generation.arena
            slots, slot_bytes = len(arena.slots), arena.slot_bytes
            # To reserve gigabytes takes the kernel a second, and the lead serves meanwhile.
            fd = await self._loop.run_in_executor(None, Arena.make_memory, slots, slot_bytes)
            if not life.lacks(shared) or life.child.ended.done():
                os.close(fd)
                return
            life.arenas[shared.number] = fd
            report = msgspec.structs.replace(shared.generation.report, weights=())
            order = link.GenerationOrder(
                shared.generation.model, shared.generation.config, report, slots, slot_bytes
            )
            begin, document = link.Begin(shared.number), link.encode_document(order)
            try:
                life.link.send(begin, document, fds=[fd, shared.board.fd])
            except OSError as e:
                raise ConfigError(
                    f"model {order.model!r}: not passed to front {life.front}: {e.strerror}"
                ) from None
            for worker in shared.ready:
                life.join(shared, worker)

    async def end(self, generation: Generation) -> None:
        """Its workers are about to end: returns when no follower needs them."""
        shared = self._find(generation)
        if shared is None:
            return
        shared.is_ending = True
        try:
            self._tell_finish(shared)
            waits = [life.retired[shared.number] for life in self.lives() if shared.number in life.retired]
            if waits:
                await asyncio.wait(waits)
        finally:
            del self._shared[shared.number]

    def _tell_finish(self, shared: SharedGeneration) -> None:
        for life in self.lives():
            if shared.number in life.arenas:
                life.retired[shared.number] = self._loop.create_future()
                life.link.send(link.Finish(shared.number))

    def failed(self, generation: Generation, how: str) -> None:
        """Its last worker was given up."""
        shared = self._find(generation)
        if shared is not None:
            shared.failure = how
            for life in self.lives():
                if shared.number in life.arenas:
                    life.link.send(link.GenerationFailed(shared.number, how))

    def _find(self, generation: Generation) -> SharedGeneration | None:
        return next((each for each in self._shared.values() if each.generation is generation), None)

    async def follow(self) -> None:
        """The lead serves something else: have the followers serve it, too."""
        if not self._is_started:
            return
        self._version += 1
        for follower in self._followers:
            models, pipelines = self._engine.models, self._engine.pipelines.metrics
            follower.past = tallies.past(follower.past, models, pipelines)
        for life in self.lives():
            if life.version:  # the others are told when they have come so far
                self._tell_state(life)
        version = self._version
        for life in self.lives():
            while life.version and life.version < version and not life.child.ended.done():
                life.changed.clear()
                await life.changed.wait()

    def _tell_state(self, life: Life) -> None:
        numbers = {shared.generation: shared.number for shared in self._shared.values()}
        served = {
            name: numbers[model.serving.generation]
            for name, model in self._engine.models.items()
            if model.serving is not None
        }
        failed = {
            shared.generation.model: shared.failure
            for shared in self._shared.values()
            if shared.failure and served.get(shared.generation.model) == shared.number
        }
        state = link.State(self._engine.config, served, failed)
        try:
            life.link.send(link.Serve(self._version), link.encode_document(state))
        except OSError as e:  # it is told when it is started again
            log.error("a front cannot be told", front=life.front, reason=e.strerror)
            life.child.kill()

    # -- lives --------------------------------------------------------------------------------------

    async def start(self, endpoints: Sequence[tuple[str, ...]]) -> None:
        """Start them, and wait until each serves; one that ends meanwhile is tried again, not waited for.

        Args:
            endpoints: Where each is to listen.
        """
        self._endpoints = list(endpoints)
        self._is_started = True
        self._version += 1
        self._look()
        for follower in self._followers:
            self._launch(follower)
        for life in self.lives():
            while not life.version and not life.child.ended.done():
                life.changed.clear()
                await life.changed.wait()

    def _launch(self, follower: _Follower) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline = self._engine.lifeline_fd
        arguments = (its.fileno(), lifeline, follower.index)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "pool.front.follower", *map(str, arguments)],
                pass_fds=(its.fileno(), lifeline),
                stdin=subprocess.DEVNULL,
            )
        except OSError as e:
            mine.close()
            follower.failures += 1
            self._try_again(follower, f"cannot be started: {e.strerror}")
            return
        finally:
            its.close()
        child = Child(self._loop)
        life = follower.life = Life(follower.index, child, process)
        life.link = Link(
            mine,
            link.decode_to_lead,
            lambda message, document, _: self._hear(follower, life, message, document),
            lambda: None,  # the process tells more of its end
        )
        child.on_gone = lambda: self._gone(follower, life)
        child.started(process.pid)
        if not child.is_watched:  # out of descriptors
            child.kill()
            self._gone(follower, life)
            return
        order = link.FollowerOrder(
            follower.index, self._fronts, self._engine.config, self._endpoints[follower.index - 1]
        )
        life.link.send(link.Welcome(), link.encode_document(order))
        self._spawn(self._introduce(life))

    async def _introduce(self, life: Life) -> None:
        """Tell a new process all there is."""
        try:
            while missing := [each for each in self._shared.values() if life.lacks(each)]:
                for shared in missing:
                    await self._give(life, shared)
                if life.child.ended.done():
                    return
        except (ConfigError, OSError) as e:
            log.error("a front cannot be told", front=life.front, reason=str(e))
            life.child.kill()
            return
        self._tell_state(life)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _gone(self, follower: _Follower, life: Life) -> None:
        life.link.read()  # its last words
        how = describe_exit(life.process.wait())
        life.child.end(life.process.returncode)
        life.close()
        for shared in self._shared.values():
            shared.board.clear(life.front)
            replicas = self._replicas_of(shared)
            if replicas is not None:
                replicas.dismiss_quarantine(life.front)
        for endpoint in self._endpoints[follower.index - 1]:
            remove_stale(endpoint)
        kept = tallies.past(life.counted, self._engine.models, self._engine.pipelines.metrics)
        follower.past = tallies.add(follower.past, kept)
        follower.life = None
        if self._is_stopping:
            return
        if life.version and time.monotonic() - life.started_at > _STABLE_S:
            follower.failures = 0
        follower.failures += 1
        self._try_again(follower, how, life.process.pid)

    def _try_again(self, follower: _Follower, how: str, pid: int | None = None) -> None:
        pause = backoff_s(follower.failures, random.random())
        follower.last_error = how
        log.error("front lost", front=follower.index, pid=pid, how=how, restart_in_s=pause)
        self._loop.call_later(pause, self._retry, follower)

    def _retry(self, follower: _Follower) -> None:
        if not self._is_stopping and not self._engine.is_draining:
            follower.restarts += 1
            self._launch(follower)

    def _look(self) -> None:
        """Look for followers that are silent."""
        self._timer = self._loop.call_later(_LOOK_S, self._look)
        for life in self.lives():
            life.link.read()  # what came while the lead itself was busy
            silence = time.monotonic() - life.heard_at
            if silence > (_SILENCE_S if life.version else _START_S):
                log.error("front hangs", front=life.front, pid=life.child.pid, silent_s=silence)
                life.heard_at = time.monotonic()
                life.child.send(TRACEBACK_SIGNAL)
                self._loop.call_later(_TRACEBACK_GRACE_S, life.child.kill)

    # -- what followers tell ------------------------------------------------------------------------

    def _hear(self, follower: _Follower, life: Life, message: link.ToLead, document: bytes) -> None:
        life.heard_at = time.monotonic()
        match message:
            case link.Counted():
                self._take_count(life, link.decode_any(document))
            case link.Following(version, endpoints):
                if not life.version:
                    took = time.monotonic() - life.started_at
                    log.info(
                        "front ready", front=life.front, pid=life.child.pid, took_s=took, endpoints=endpoints
                    )
                life.version, life.endpoints = version, endpoints
                if version < self._version:
                    self._tell_state(life)
                life.changed.set()
            case link.Retired(number):
                self._retired(life, number)
            case link.Drained(is_finished):
                if life.drained is not None and not life.drained.done():
                    life.drained.set_result(is_finished)
            case link.Ask(id_):
                self._spawn(self._tell_status(life, id_))
            case link.Interrupt(_, worker, reason):
                if worker in life.joined:
                    shared, hung, child = life.joined[worker]
                    replicas = self._replicas_of(shared)
                    if replicas is not None:
                        replicas.kill(hung, child, reason)
            case link.Worn(_, worker, reason):
                if worker in life.joined:
                    shared, old, _ = life.joined[worker]
                    replicas = self._replicas_of(shared)
                    if replicas is not None and old.role == "serving":
                        replicas.replace(old, reason)
            case link.CallQuarantine(number) | link.DismissQuarantine(number):
                found = self._shared.get(number)
                replicas = None if found is None else self._replicas_of(found)
                if replicas is not None and isinstance(message, link.CallQuarantine):
                    replicas.call_quarantine(follower.index)
                elif replicas is not None:
                    replicas.dismiss_quarantine(follower.index)

    def _replicas_of(self, shared: SharedGeneration) -> Replicas | None:
        crew = self._engine.crew_of(shared.generation)
        return crew if isinstance(crew, Replicas) else None

    def _retired(self, life: Life, number: int) -> None:
        fd = life.arenas.pop(number, None)
        if fd is not None:
            os.close(fd)
        for id_, (shared, worker, _) in list(life.joined.items()):
            if shared.number == number:
                del life.joined[id_]
                life.numbers.pop((number, worker.id), None)
        future = life.retired.pop(number, None)
        if future is not None and not future.done():
            future.set_result(None)

    def _take_count(self, life: Life, counted: Tally) -> None:
        before, life.counted = life.counted, counted
        life.counts += 1
        self._news.set()
        # Whoever finishes batches of any front is well.
        for name, model in counted["models"].items():
            served = self._engine.models.get(name)
            if served is None or served.serving is None:
                continue
            old = before.get("models", {}).get(name, {}).get("workers", {})
            for worker in served.serving.replicas.workers:
                done = model.get("workers", {}).get(worker.index, {}).get("batches", 0)
                if done > old.get(worker.index, {}).get("batches", 0):
                    worker.failures = 0

    async def _tell_status(self, life: Life, id_: int) -> None:
        try:
            document = link.encode_document(await self._ask_status())
        except Exception as e:  # such as file descriptors used up: whoever asks is to hear of it
            log.defect("cannot tell the status")
            life.link.send(link.Told(id_, f"{type(e).__name__}: {e}"))
        else:
            life.link.send(link.Told(id_), document)

    # -- looking ------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Have followers say what they have counted by now; those that do not soon are told as they were."""
        awaited = {life: life.counts for life in self.lives() if life.version}
        for life in awaited:
            life.link.send(link.Count())
        deadline = self._loop.time() + _COUNT_S
        while any(life.counts == count and life in self.lives() for life, count in awaited.items()):
            self._news.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), deadline - self._loop.time())
            if self._loop.time() >= deadline:
                return

    def total(self) -> Tally:
        """What all fronts have counted, those that have ended included."""
        parts = [self._count()]
        for follower in self._followers:
            parts.append(follower.past)
            if follower.life is not None:
                parts.append(follower.life.counted)
        return tallies.add_all(parts)

    async def describe(self) -> list[dict[str, Any]]:
        """Each of them, for the status document."""
        pids = [life.process.pid for life in self.lives()]
        usage = await self._loop.run_in_executor(None, measure_processes, pids)
        fronts = []
        for follower in self._followers:
            life = follower.life
            fronts.append(
                {
                    "index": follower.index,
                    "state": follower.state,
                    "endpoints": [] if life is None else list(life.endpoints),
                    "requests": follower.requests,
                    "clients": 0 if life is None else life.counted.get("now", {}).get("clients", 0),
                    "restarts": follower.restarts,
                    "last_error": follower.last_error,
                    **(no_usage(None) if life is None else usage.get(life.process.pid, no_usage(None))),
                }
            )
        return fronts

    def counts(self) -> list[tuple[int, int, int, bool]]:
        """Of each: its number, requests, restarts, and whether it serves."""
        return [
            (each.index, each.requests, each.restarts, each.state == "serving") for each in self._followers
        ]

    def members(self) -> list[Member]:
        """Their processes."""
        return [Member(life.process.pid, "front", place=str(life.front)) for life in self.lives()]

    # -- the end ------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> bool:
        """Have them refuse new requests, and finish what they admitted.

        Returns:
            Whether all was finished in time.
        """
        waits = []
        for life in self.lives():
            life.drained = self._loop.create_future()
            waits.append(life.drained)
            life.link.send(link.Drain(timeout_s))
        return all(await asyncio.gather(*waits))

    async def stop(self) -> None:
        """Have them answer what is left, and leave; those that do not are killed."""
        self._is_stopping = True
        if self._timer is not None:
            self._timer.cancel()
        lives = self.lives()
        for life in lives:
            life.link.send(link.Stop())
        if lives:
            ends = [life.child.ended for life in lives]
            await asyncio.wait(ends, timeout=_STOP_GRACE_S)
            for life in lives:
                life.child.kill()
            await asyncio.wait(ends)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def endpoints_of(front: int, bound: Sequence[tuple[str, str]], lent: Sequence[str]) -> tuple[str, ...]:
    """Where a follower listens.

    Args:
        front: Its number.
        bound: Of the lead: endpoints as they were asked for, and what they turned out to be.
        lent: Those whose sockets are the service manager's. Of `tcp://`, nobody can listen there as well.
    """
    found = []
    for asked, actual in bound:
        if asked.startswith("ipc://"):
            found.append(front_endpoint(asked, front))
        elif asked not in lent:  # which the kernel would not let others share
            found.append(actual)
    return tuple(found)
