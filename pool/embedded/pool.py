"""`Pool`: the front's engine in an application's own event loop. Application's process.

The calls of `pool.AsyncClient`, without a server: requests go straight into the slots that the workers run.
It installs no signal handler and configures no logging: both are the application's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec

from pool.client.conversion import Array, check_cast
from pool.client.core import ModelInfo, check_model, check_timeout, output_names
from pool.client.retry import Attempts, Retry
from pool.client.timeline import answer_with_timeline
from pool.config import Config, load_config
from pool.embedded.calls import Answer, Calls, Future, Timed
from pool.endpoints import check_endpoint, default_endpoint
from pool.errors import Cancelled, ConfigError, DeadlineExceeded, PoolError, Unavailable
from pool.front.endpoint import Endpoint
from pool.front.engine import Engine
from pool.front.logs import ACCESS
from pool.predictor import Predictor

# Seconds. Loops count timers in milliseconds and may ring this much early.
_TIMER_SLACK = 0.001


class Pool(Predictor):
    """A pool of workers of this application's own.

        async with Pool.from_file("pool.toml") as pool:
            outputs = await pool.predict("digits", images)

    Args:
        config: Checked (`pool.config.load_config`).
        timeout: Longest a call may take, in seconds, unless it says otherwise; `math.inf` for ever.
        cast: `"safe"` makes lossless casts of inputs only (int32 to int64, float32 to float64);
            `"same_kind"` also float64 to float32 and the like.
        retry: Which failed predictions are made again, and when; None for none of them.

    Raises:
        InvalidInput: `cast` is neither. DeadlineExceeded: `timeout` is not above 0.

    Use it as an async context manager, or await `start` and `close`. It belongs to the event loop that
    starts it; any number of that loop's tasks may share it. A process forked from the application must let
    go of what it inherits (as `subprocess` does), or the workers stay when the application is killed.
    """

    def __init__(
        self, config: Config, *, timeout: float = 60.0, cast: str = "safe", retry: Retry | None = None
    ) -> None:
        self._config = config
        self._timeout = check_timeout(timeout)
        self._cast = check_cast(cast)
        self._retry = retry
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._calls: Calls | None = None  # from start to close
        self._starting: asyncio.Task[None] | None = None
        self._endpoints: list[Endpoint] = []
        self._closed: asyncio.Future[None] | None = None  # for those who pause
        self._closing: asyncio.Task[None] | None = None
        self._started_at = 0.0

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = 60.0,
        cast: str = "safe",
        retry: Retry | None = None,
    ) -> Pool:
        """A pool of the models of a configuration file; the rest as for the class.

        Raises:
            ConfigError: the file cannot be read or breaks a rule; every mistake is one line of the message.
        """
        return cls(load_config(path), timeout=timeout, cast=cast, retry=retry)

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load every model and start its workers; returns when all are ready. Nothing is left if it fails.

        Raises:
            ModelLoadError: a model cannot be loaded. ConfigError: the memory for its requests is not there.
            Unavailable: a model was not ready within `start_timeout_s`. Cancelled: the pool is closed.
            RuntimeError: it was started before.
        """
        self._check_open()
        if self._engine is not None:
            raise RuntimeError("this Pool was started already")
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        self._started_at = time.monotonic()
        # Of the log, this alone: it has a line for each answer, and is slow even where nobody reads it.
        logging.getLogger(ACCESS).disabled = not self._config.server.access_log
        self._engine = Engine(self._config)
        self._calls = Calls(self._engine, self._cast)
        self._starting = self._loop.create_task(self._engine.start())
        try:
            await self._starting
        except asyncio.CancelledError:
            if self._closing is not None and self._starting.cancelled():
                await self.close()
                raise Cancelled("the pool was closed") from None
            await self.close()
            raise
        except BaseException:
            await self.close()
            raise

    async def serve(self, endpoints: str | Sequence[str] | None = None) -> tuple[str, ...]:
        """Serve the same models to clients elsewhere, until the pool is closed.

        Args:
            endpoints: `ipc:///path` or `tcp://host:port`; None for those of the configuration, or
                `default_endpoint()` if it names none.

        Returns:
            The endpoints.

        Raises:
            ConfigError: an endpoint is not well formed or cannot be bound.
            Cancelled: the pool is closed. Unavailable: it is not started.
        """
        engine, _ = self._running()
        if endpoints is None:
            endpoints = self._config.server.endpoints or (default_endpoint(),)
        elif isinstance(endpoints, str):
            endpoints = (endpoints,)
        for each in endpoints:
            check_endpoint(each, bind=True)
        endpoint = Endpoint(engine, self._config.server, endpoints, self._describe)
        try:
            endpoint.open()
        except ConfigError:
            endpoint.close()
            raise
        self._endpoints.append(endpoint)
        return endpoint.endpoints

    async def stop(self, timeout: float | None = None) -> bool:
        """Refuse new requests (`Unavailable`), finish those admitted, close. Once closed, nothing happens.

        Args:
            timeout: Longest to wait for them, in seconds; None for `drain_timeout_s` of the configuration.

        Returns:
            Whether all were finished in time.
        """
        finished = True
        if self._engine is not None and self._closing is None:
            timeout_s = self._config.server.drain_timeout_s if timeout is None else timeout
            try:
                finished = await self._engine.drain(timeout_s)
            except BaseException:
                await self.close()
                raise
        await self.close()
        return finished

    async def close(self) -> None:
        """End the workers and give all memory back; calls under way raise `Cancelled`.

        A second time, nothing happens; two at once both wait until it is done. A task that is cancelled
        meanwhile still waits for the end, since nothing may be left behind.
        """
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        cancelled: asyncio.CancelledError | None = None
        while not self._closing.done():
            try:
                await asyncio.wait([self._closing])
            except asyncio.CancelledError as e:
                cancelled = e
        if cancelled is not None:
            raise cancelled
        self._closing.result()

    async def _close(self) -> None:
        calls, self._calls = self._calls, None
        if self._engine is None or calls is None:
            return
        assert self._closed is not None, "it was started"
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        calls.close()
        self._closed.set_result(None)
        try:
            await self._engine.stop()
        finally:
            for endpoint in self._endpoints:
                endpoint.close()

    async def __aenter__(self) -> Pool:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise Cancelled("the pool is closed")

    def _running(self) -> tuple[Engine, Calls]:
        """The parts, if this is their loop.

        Raises:
            Cancelled: the pool is closed. Unavailable: it is not started. RuntimeError: another loop's.
        """
        self._check_open()
        if self._engine is None or self._calls is None:
            raise Unavailable("the pool is not started; wanted `async with`, or a call of `start`")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this Pool belongs to another event loop; wanted one pool per loop")
        return self._engine, self._calls

    # -- calls (Predictor) --------------------------------------------------------------------------

    async def predict(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        signature: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        cast: str | None = None,
        priority: int | None = None,
        retry: Retry | None = None,
        timeline: bool = False,
    ) -> dict[str, Array]:
        """As `Predictor.predict`; the inputs are copied before it waits for the first time."""
        if timeout is None:
            timeout = self._timeout
        else:
            check_timeout(timeout)
        if outputs is not None and type(outputs) is not tuple:
            outputs = output_names(outputs)
        retry = self._retry if retry is None else retry
        attempts: Attempts | None = None
        patience = timeout
        deadline = 0.0
        if retry is not None:
            began = time.monotonic()
            deadline = began + timeout
            attempts = Attempts(retry, began, deadline)
        while True:
            _, calls = self._running()
            future: Future | None = None
            answer: Answer | None = None
            try:
                began_ns = time.monotonic_ns() if timeline else 0
                future = calls.begin(
                    model, inputs, version, signature, outputs, cast, priority, patience, timeline
                )
                answer = await future
                if isinstance(answer, Timed):
                    # Nothing lies between this call and the front: what it did before the rows were read
                    # is `send`, and there is no way there.
                    ended_ns, received_ns = time.monotonic_ns(), answer.timeline.received_ns
                    handed_ns = max(began_ns, received_ns)
                    return answer_with_timeline(answer, began_ns, handed_ns, ended_ns, answer.timeline)
                if isinstance(answer, dict):
                    return answer
                raise answer
            except asyncio.CancelledError:
                if future is not None:
                    calls.give_up(future)
                raise
            except PoolError as e:
                if attempts is None:
                    raise
                await self._pause(attempts.pause_after(e, time.monotonic(), random.random()))
            finally:
                answer = None  # an error's traceback holds this frame, which must not hold the error
            patience = deadline - time.monotonic()

    async def _pause(self, seconds: float) -> None:
        assert self._closed is not None, "it runs"
        await asyncio.wait((self._closed,), timeout=seconds + _TIMER_SLACK)

    async def signature(
        self, model: str, version: int | None = None, *, timeout: float | None = None
    ) -> ModelInfo:
        """As `Predictor.signature`; known at once, whatever the timeout."""
        _check_timeout(timeout)
        _, calls = self._running()
        check_model(model, version)
        return calls.learn(model, version)

    async def models(self, *, timeout: float | None = None) -> dict[str, dict[str, Any]]:
        """As `Predictor.models`; known at once, whatever the timeout."""
        _check_timeout(timeout)
        engine, _ = self._running()
        return engine.describe_models()

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As `Predictor.status`; its `front` is this process, as far as its pool goes."""
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        engine, calls = self._running()
        try:
            document = await asyncio.wait_for(engine.status(), None if timeout == math.inf else timeout)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"the status was not known within {timeout:g} s") from None
        document["front"] |= {
            "uptime_s": time.monotonic() - self._started_at,
            "endpoints": [each for endpoint in self._endpoints for each in endpoint.endpoints],
            "clients": sum(endpoint.describe()["clients"] for endpoint in self._endpoints),
            "requests": calls.requests,
            "replies": calls.replies,
            "dropped_replies": 0,
            "errors": dict(calls.errors),
            **self._describe(),
        }
        return document

    def _describe(self) -> dict[str, Any]:
        return {"metrics": "", "config": msgspec.to_builtins(self._config)}

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether the pool is started."""
        _check_timeout(timeout)
        self._check_open()
        return self._engine is not None

    async def ready(self, model: str | None = None, *, timeout: float | None = None) -> bool:
        """As `Predictor.ready`; False before the pool is started."""
        _check_timeout(timeout)
        self._check_open()
        if self._engine is None:
            return False
        models = self._engine.readiness()
        return all(models.values()) if model is None else models[self._engine.known(model)]


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None:
        check_timeout(timeout)
