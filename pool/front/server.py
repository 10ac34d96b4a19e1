"""`pool serve` and `pool check`: the front process from its first line to its exit code."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from typing import Any

import msgspec
import uvloop

from pool.config import Config
from pool.endpoints import default_endpoint
from pool.errors import ConfigError, PoolError
from pool.front.endpoint import Endpoint
from pool.front.engine import Engine
from pool.front.reloading import Reloads
from pool.front.sizing import plan_arena
from pool.front.status import describe_report
from pool.front.supervisor import Supervisor

log = logging.getLogger("pool")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

EXIT_OK = 0
EXIT_FAILED = 1  # a model does not load, or draining took too long
EXIT_CONFIG = 2


def serve(config: Config, path: str) -> int:
    """Serve until SIGTERM or SIGINT; gives the process's exit code (`docs/operations.md`).

    Args:
        config: Checked.
        path: The file it is from, read again on SIGHUP.
    """
    logging.basicConfig(
        level=config.server.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    keep_freed_memory()
    return uvloop.run(_serve(config, os.path.abspath(path)))


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


async def _serve(config: Config, path: str) -> int:
    loop = asyncio.get_running_loop()
    stops = 0
    stopping = asyncio.Event()
    hurrying = asyncio.Event()

    def stop() -> None:
        nonlocal stops
        stops += 1
        (stopping if stops == 1 else hurrying).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    engine = Engine(config)
    reloads = Reloads(engine, path)
    endpoint = Endpoint(
        engine,
        config.server,
        config.server.endpoints or (default_endpoint(),),
        lambda: {"reload": reloads.describe(), "config": msgspec.to_builtins(engine.config)},
    )
    starting: asyncio.Task[None] | None = None
    try:
        endpoint.open()
        log.info("listening %s", " ".join(endpoint.endpoints))
        starting = loop.create_task(engine.start())
        code = await _run(engine, reloads, starting, stopping, hurrying)
    except ConfigError as e:
        log.error("%s", e.message)
        code = EXIT_CONFIG
    except PoolError as e:
        log.error("%s: %s", e.code, e.message)
        code = EXIT_FAILED
    finally:
        if starting is not None and not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
        await engine.stop()
        endpoint.close()
    log.info("stopped exit_code=%d", code)
    return code


async def _run(
    engine: Engine,
    reloads: Reloads,
    starting: asyncio.Task[None],
    stopping: asyncio.Event,
    hurrying: asyncio.Event,
) -> int:
    loop = asyncio.get_running_loop()
    stop = loop.create_task(stopping.wait())
    try:
        await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What exists now lives as long as the process: no collection need walk it again.
            gc.collect()
            gc.freeze()
            log.info("ready models=%s", ",".join(engine.models))
            loop.add_signal_handler(signal.SIGHUP, reloads.ask)
            await stop
    finally:
        stop.cancel()
    timeout_s = engine.config.server.drain_timeout_s
    log.info("draining timeout_s=%g", timeout_s)
    drain = loop.create_task(engine.drain(timeout_s))
    await reloads.stop()
    hurry = loop.create_task(hurrying.wait())
    await asyncio.wait([drain, hurry], return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    finished = drain.done() and drain.result()
    drain.cancel()
    return EXIT_OK if finished else EXIT_FAILED


def check(config: Config) -> dict[str, Any]:
    """Load every model of a config in a loader process, serve nothing, and report.

    Raises:
        ModelLoadError: one cannot be loaded.
    """
    return asyncio.run(_check(config))


async def _check(config: Config) -> dict[str, Any]:
    supervisor = Supervisor()
    models: dict[str, Any] = {}
    try:
        for name, model in config.models.items():
            started = time.monotonic()
            report, weights_fd = await supervisor.load(name, model, config.server.start_timeout_s)
            if weights_fd is not None:
                os.close(weights_fd)
            slots, slot_bytes = plan_arena(model, report)
            models[name] = describe_report(report, slots, slot_bytes) | {
                "path": report.path,
                "max_batch_size": model.max_batch_size,
                "load_s": time.monotonic() - started,
            }
    finally:
        await supervisor.stop()
    return {"models": models}
