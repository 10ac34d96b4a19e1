"""`pool serve` and `pool check`: the front process from its first line to its exit code."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import os
import resource
import signal
import time
from typing import Any

import msgspec
import uvloop

from pool.config import Config
from pool.endpoints import MAX_FRONTS, default_endpoint, front_endpoint, is_loopback
from pool.errors import ConfigError, PoolError
from pool.front import logs, tallies
from pool.front.access import check_curve
from pool.front.activation import assign, take_sockets
from pool.front.binding import remove_stale
from pool.front.endpoint import Endpoint
from pool.front.engine import Engine
from pool.front.followers import Followers, endpoints_of
from pool.front.heartbeat import Heartbeat
from pool.front.http import HttpServer
from pool.front.logs import Log
from pool.front.notify import Notifier, status
from pool.front.pipelines import wire_all
from pool.front.reloading import Reloads
from pool.front.sizing import plan_arena
from pool.front.status import describe_report
from pool.front.supervisor import Supervisor
from pool.front.tallies import Tally
from pool.pipelines import Wiring
from pool.shm.control import LoadReport

log = Log("pool")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

EXIT_OK = 0
EXIT_FAILED = 1  # a model does not load, or draining took too long
EXIT_CONFIG = 2


def serve(config: Config, path: str) -> int:
    """Serve until SIGTERM or SIGINT; gives the process's exit code (`docs/operations.md`).

    Args:
        config: Checked.
        path: The file it is from, read again on SIGHUP.

    Raises:
        ConfigError: the service manager handed over what cannot be served.
    """
    recent = logs.start(os.environ)
    logs.apply(config.server.log_level, config.server.access_log)
    # What blocks the loop is in the traceback that the service manager's SIGABRT leaves in the log.
    faulthandler.enable()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    keep_freed_memory()
    allow_descriptors()
    # Taken out of the environment before there is any child to inherit it.
    notifier = Notifier.from_environment(os.environ)
    assigned = assign(take_sockets(os.environ), config.server.endpoints)

    async def run() -> int:
        return await Front(config, os.path.abspath(path), notifier, assigned, recent).run()

    try:
        return uvloop.run(run())
    finally:
        notifier.close()


def keep_freed_memory() -> None:
    """Have the allocator keep what ZeroMQ frees, for the next message (mallopt(3); glibc only).

    By default a message of a picture is mapped anew each time and unmapped after: 150 page faults, which
    cost the front as much as receiving it. Now up to 256 MiB stay, and only messages of 32 MiB and more
    (the most that can be asked for) are mapped by themselves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def allow_descriptors() -> None:
    """Take all file descriptors there are for the asking: each connection is one.

    The usual soft limit of 1,024 is for programs that call select(2).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Front:
    """The front's parts, from start to stop. Make it inside a running event loop.

    Args:
        config: Checked.
        path: The file it is from.
        notifier: To the service manager.
        assigned: Sockets that it handed over, by endpoint.
        recent: The last warnings and errors.
    """

    def __init__(
        self, config: Config, path: str, notifier: Notifier, assigned: dict[str, int], recent: logs.Recent
    ) -> None:
        self._recent = recent
        self._loop = asyncio.get_running_loop()
        self._notifier = notifier
        self._engine = Engine(config)
        fronts = config.server.fronts
        self._followers: Followers | None = None
        if fronts > 1:
            self._followers = Followers(self._engine, fronts, self._status, self._count)
            self._engine.sharing = self._followers
        follow = None if self._followers is None else self._followers.follow
        self._reloads = Reloads(self._engine, path, self._reloading, follow)
        endpoints = config.server.endpoints or tuple(assigned) or (default_endpoint(),)
        self._lent = tuple(assigned)
        self._endpoint = Endpoint(
            self._engine,
            config.server,
            endpoints,
            self._describe,
            assigned,
            front=0 if fronts > 1 else None,
        )
        self._endpoint.ask_status = self._status
        self._heartbeat = Heartbeat(notifier, self._engine, self._requests)
        self._http: HttpServer | None = None
        self._stops = 0
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()

    async def run(self) -> int:
        """Start, serve, drain, stop; gives the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        starting: asyncio.Task[None] | None = None
        failure = ""
        try:
            self._heartbeat.start()
            self._endpoint.open()
            for endpoint in self._endpoint.endpoints:
                if endpoint.startswith("ipc://"):  # of a server that was killed, and had more fronts
                    for front in range(1, MAX_FRONTS):
                        remove_stale(front_endpoint(endpoint, front))
            log.info("listening", endpoints=self._endpoint.endpoints)
            address = self._engine.config.server.metrics
            if address is not None:
                await self._watch(address)
            starting = self._loop.create_task(self._start())
            code = await self._serve(starting)
        except ConfigError as e:
            code, failure = EXIT_CONFIG, e.message
            log.error("cannot serve", code=e.code, reason=e.message)
        except PoolError as e:
            code, failure = EXIT_FAILED, f"{e.code}: {e.message}"
            log.error("cannot serve", code=e.code, reason=e.message)
        finally:
            self._heartbeat.stopping()
            if starting is not None and not starting.done():
                starting.cancel()
                await asyncio.wait([starting])
            await self._reloads.stop()
            if self._followers is not None:
                await self._followers.stop()
            await self._engine.stop()
            if self._http is not None:
                await self._http.close()
            self._endpoint.close()
            self._heartbeat.close()
        if failure:  # the last word, which `systemctl status` keeps
            self._notifier.send(status(failure))
        log.info("stopped", exit_code=code)
        return code

    async def _start(self) -> None:
        """Start the workers of all models, then the other fronts.

        Raises:
            PoolError: one model cannot be served.
        """
        await self._engine.start()
        if self._followers is not None:
            bound = [(asked, self._endpoint.bound[asked]) for asked in self._endpoint.endpoints]
            fronts = range(1, self._engine.config.server.fronts)
            endpoints = [endpoints_of(front, bound, self._lent) for front in fronts]
            if not endpoints[0]:
                log.warning("other fronts have nowhere to listen", lent=self._lent)
            await self._followers.start(endpoints)

    async def _finish(self, timeout_s: float) -> bool:
        """Refuse new requests and finish what is admitted, at all fronts; whether that was done in time."""
        if self._followers is None:
            return await self._engine.drain(timeout_s)
        return all(await asyncio.gather(self._engine.drain(timeout_s), self._followers.drain(timeout_s)))

    # -- what all fronts have done ------------------------------------------------------------------

    def _count(self) -> Tally:
        return tallies.count(self._engine, self._endpoint.describe())

    async def _total(self) -> Tally:
        """What all fronts have counted."""
        if self._followers is None:
            return self._count()
        await self._followers.refresh()
        return self._followers.total()

    def _counts(self) -> list[tuple[int, int, int, bool]]:
        """Of each front: its number, requests, restarts, and whether it serves."""
        others = [] if self._followers is None else self._followers.counts()
        return [(0, self._endpoint.requests, 0, True), *others]

    def _requests(self) -> int:
        return sum(requests for _, requests, _, _ in self._counts())

    async def _status(self) -> dict[str, Any]:
        """The status document of the whole server."""
        document = await self._endpoint.status()
        front = document["front"]
        lead = {"index": 0, "state": "serving", "restarts": 0, "last_error": ""}
        for key in ("endpoints", "requests", "clients", "pid", "cpu_s", "uss_bytes", "pss_bytes"):
            lead[key] = front[key]
        document["fronts"] = [lead]
        if self._followers is not None:
            total = await self._total()
            document["fronts"] += await self._followers.describe()
            tallies.show(document, total)
        return document

    async def _watch(self, address: str) -> None:
        # prometheus_client takes a quarter of a second to import: only who asks for it waits.
        from pool.front.exposition import Exposition

        exposition = Exposition(self._engine, self._endpoint.describe, self._total, self._counts)
        self._http = HttpServer(address, exposition.page)
        await self._http.open()
        log.info("metrics", at=self._http.address)
        if not is_loopback(address):
            log.warning("metrics are open to all who reach their port", at=self._http.address)

    def _stop(self) -> None:
        self._stops += 1
        (self._stopping if self._stops == 1 else self._hurrying).set()

    def _reloading(self, is_reloading: bool) -> None:
        if not is_reloading:
            self._endpoint.apply(self._engine.config.server)
        if is_reloading:
            self._heartbeat.reloading()
        elif not self._stopping.is_set():
            self._heartbeat.ready()

    def _describe(self) -> dict[str, Any]:
        address = "" if self._http is None else self._http.address
        return {
            "metrics": address,
            "last_errors": self._recent.describe(),
            "reload": self._reloads.describe(),
            "config": msgspec.to_builtins(self._engine.config),
        }

    async def _serve(self, starting: asyncio.Task[None]) -> int:
        stop = self._loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                # What exists now lives as long as the process: no collection need walk it again.
                gc.collect()
                gc.freeze()
                log.info("ready", models=tuple(self._engine.models))
                self._heartbeat.ready()
                self._loop.add_signal_handler(signal.SIGHUP, self._reloads.ask)
                await stop
        finally:
            stop.cancel()
        self._heartbeat.stopping()
        return await self._drain(self._engine.config.server.drain_timeout_s)

    async def _drain(self, timeout_s: float) -> int:
        log.info("draining", timeout_s=timeout_s)
        drain = self._loop.create_task(self._finish(timeout_s))
        hurry = self._loop.create_task(self._hurrying.wait())
        await asyncio.wait([drain, hurry], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        finished = drain.done() and drain.result()
        drain.cancel()
        return EXIT_OK if finished else EXIT_FAILED


def check(config: Config, file: str) -> dict[str, Any]:
    """Load every model of a config in a loader process, serve nothing, and report.

    Args:
        config: Checked.
        file: Its name, as messages are to have it.

    Raises:
        ConfigError: it has keys, which this libzmq cannot use; or a pipeline does not fit its models.
        ModelLoadError: one cannot be loaded.
    """
    if config.server.curve_secret_key is not None:
        check_curve()
    return asyncio.run(_check(config, file))


async def _check(config: Config, file: str) -> dict[str, Any]:
    supervisor = Supervisor()
    models: dict[str, Any] = {}
    reports: dict[str, LoadReport] = {}
    try:
        for name, model in config.models.items():
            started = time.monotonic()
            report, weights_fd = await supervisor.load(name, model, config.server.start_timeout_s)
            if weights_fd is not None:
                os.close(weights_fd)
            reports[name] = report
            slots, slot_bytes = plan_arena(model, report)
            models[name] = describe_report(report, slots, slot_bytes) | {
                "path": report.path,
                "max_batch_size": model.max_batch_size,
                "load_s": time.monotonic() - started,
            }
    finally:
        await supervisor.stop()
    wirings = wire_all(config.pipelines, reports, file)
    pipelines = {name: _describe(wiring) for name, wiring in wirings.items()}
    return {"models": models, "pipelines": pipelines, "fronts": config.server.fronts}


def _describe(wiring: Wiring) -> dict[str, Any]:
    steps = [{"name": s.name, "model": s.model, "signature": s.signature.name} for s in wiring.steps]
    return {"steps": steps, "signatures": [msgspec.to_builtins(wiring.signature)]}
