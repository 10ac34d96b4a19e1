"""Starts zygotes and has models loaded. Runs in the front, on its event loop."""

from __future__ import annotations

import asyncio
import os

from pool.config import ModelConfig, Placement, placement
from pool.errors import ModelLoadError, PoolError
from pool.front.logs import Log
from pool.front.zygotes import Lifeline, Zygote, describe_exit
from pool.shm import control, weights

log = Log("pool.supervisor")


class Supervisor:
    """Zygotes and loaders of one front. Make it inside a running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lifeline = Lifeline()
        self.zygotes: dict[str, Zygote] = {}  # those that can fork, by backend
        self._known: list[Zygote] = []  # all that have a process
        self._starting: dict[str, asyncio.Future[Zygote]] = {}
        self.lost: dict[str, int] = {}  # zygotes that ended unasked, by backend
        self._is_stopping = False

    async def zygote(self, backend: str) -> Zygote:
        """The running zygote of a backend, started if there is none.

        Raises:
            ModelLoadError: it could not start.
        """
        starting = self._starting.get(backend)
        if starting is None:
            starting = self._starting[backend] = asyncio.ensure_future(self._start_zygote(backend))
        try:
            return await asyncio.shield(starting)
        except PoolError:
            self._starting.pop(backend, None)
            raise

    async def _start_zygote(self, backend: str) -> Zygote:
        zygote = Zygote(backend, self.lifeline, self._zygote_lost)
        self._known.append(zygote)
        started = self._loop.time()
        await zygote.start()
        self.zygotes[backend] = zygote
        self.lost.setdefault(backend, 0)
        took = self._loop.time() - started
        log.info("zygote started", backend=backend, pid=zygote.pid, took_s=took)
        return zygote

    def _zygote_lost(self, zygote: Zygote, how: str) -> None:
        self._known.remove(zygote)
        self.zygotes.pop(zygote.backend, None)
        self._starting.pop(zygote.backend, None)
        if not self._is_stopping:
            self.lost[zygote.backend] += 1
            log.error("zygote lost", backend=zygote.backend, pid=zygote.pid, how=how)
            self._starting[zygote.backend] = asyncio.ensure_future(self._start_zygote(zygote.backend))

    async def load(
        self, model: str, config: ModelConfig, timeout_s: float
    ) -> tuple[control.LoadReport, int | None]:
        """Load a model once in a loader process, which may take so long.

        Returns:
            What it found, and the memfd with the weights (the caller's to close) if they are shared.

        Raises:
            ModelLoadError: it cannot be loaded.
        """
        zygote = await self.zygote(config.backend)
        path = config.path if config.version is None else os.path.join(config.path, str(config.version))
        placed = place_worker(config, 0)
        order = control.LoaderOrder(model, config.backend, path, config.share_weights, placed)
        order_fd = control.write_order(order)
        weights_fd = weights.create()
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            child = zygote.fork("loader", [order_fd, self.lifeline.read_fd, write_fd, weights_fd])
        except PoolError:
            os.close(weights_fd)
            os.close(read_fd)
            raise
        finally:
            os.close(order_fd)
            os.close(write_fd)
        try:
            document = await asyncio.wait_for(_read_pipe(read_fd), timeout_s)
            code = await child.ended
        except asyncio.TimeoutError:
            child.kill()
            os.close(weights_fd)
            raise ModelLoadError(f"model {model!r}: not loaded within {timeout_s:g} s") from None
        except BaseException:
            child.kill()
            os.close(weights_fd)
            raise
        reply = control.decode_outcome(document) if document else None
        if isinstance(reply, control.LoadReport) and reply.weights_shared:
            return reply, weights_fd
        os.close(weights_fd)
        if isinstance(reply, control.LoadReport):
            return reply, None
        if reply is not None:
            raise ModelLoadError(f"model {model!r}: {reply.message}")
        how = child.refusal or describe_exit(code)
        raise ModelLoadError(f"model {model!r}: its loader ended before it reported ({how})")

    async def stop(self) -> None:
        """End every zygote and, with them, every child that is left."""
        self._is_stopping = True
        for starting in self._starting.values():
            starting.cancel()
        for zygote in self._known:
            await zygote.stop()
        self.zygotes.clear()
        self.lifeline.close()


def place_worker(config: ModelConfig, index: int) -> Placement:
    """Where a worker of the model runs, on the cores this process may use."""
    return placement(config, index, len(os.sched_getaffinity(0)))


async def _read_pipe(fd: int) -> bytes:
    """Everything written to a pipe until its last writer closes it; closes `fd`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    try:
        return await reader.read()
    finally:
        transport.close()
