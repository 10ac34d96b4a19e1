"""`AsyncClient`: the asyncio shell over the core. Client process; runs on asyncio's loop and on uvloop.

The calls; how requests and replies travel is the business of its `Exchange`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from pool.client.conversion import Array
from pool.client.core import ClientCore, ModelInfo, Request, check_timeout, timeout_to_ms
from pool.client.curve import Key, keys_of
from pool.client.dial import Preference, endpoints_of
from pool.client.exchange import Exchange
from pool.client.reply import read_flag, read_models
from pool.client.retry import Attempts, Retry
from pool.client.timeline import answer_with_timeline
from pool.errors import DeadlineExceeded, PoolError, Unavailable
from pool.predictor import Predictor


class AsyncClient(Predictor):
    """An asyncio client of a pool server. Any number of tasks of one loop may share one.

    Args:
        endpoint: `ipc:///path` or `tcp://host:port` of the server; a list of those is tried all at
            once and the first in it that answers is used, but one that was `Unavailable` a short while
            ago only if there is no other; None for `default_endpoint()`.
        timeout: Longest a call may take, in seconds, unless it says otherwise; `math.inf` for ever.
        connect_timeout: Longest to wait for a server to be there, in seconds.
        cast: `"safe"` makes lossless casts of inputs only (int32 to int64, float32 to float64);
            `"same_kind"` also float64 to float32 and the like.
        retry: Which failed predictions are made again, and when; None for none of them.
        share_memory: Whether to go past ZeroMQ to a server at an `ipc://` endpoint: large tensors by shared
            memory, the rest over a Unix socket. False to send everything through ZeroMQ.
        server_key: The server's public key, or the path of its file; for `tcp://` endpoints with keys.
        secret_key: This client's secret key, or the path of its file; both keys, or neither.

    Raises:
        ConfigError: an endpoint or a key is not well formed.
        InvalidInput: `cast` is neither.

    Nothing is connected until the first call, whose loop is the client's from then on. Use it as an
    async context manager, or await `close`. Arrays passed in must not change until the call returns.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | None = None,
        *,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        cast: str = "safe",
        retry: Retry | None = None,
        share_memory: bool = True,
        server_key: Key | None = None,
        secret_key: Key | None = None,
    ) -> None:
        preference = Preference(endpoints_of(endpoint))
        self._timeout = check_timeout(timeout)
        self._timeout_ms = timeout_to_ms(timeout)
        self._connect_timeout = check_timeout(connect_timeout)
        self._core = ClientCore(cast=cast)
        keys = keys_of(server_key, secret_key)
        self._exchange = Exchange(self._core, preference, keys, self._connect_timeout, share_memory)
        self._retry = retry

    # -- calls -------------------------------------------------------------------------------------

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
        """Run a model on a batch of rows; cancelling the call withdraws the request.

        Args:
            model: Name of the model.
            inputs: Name -> array of shape [rows, ...]; a bare array if the model has one input. A
                single example needs its row axis (`x[None]`). Strings are `bytes` or `str`.
            version: None for the version the server prefers.
            signature: None for `serving_default`, or the only one.
            outputs: Names of those wanted; None for all.
            timeout: Seconds for this call; None for the client's own.
            cast: For this call; None for the client's own.
            priority: 0 (first) to 3 (background work); None for what the server gives the model.
            retry: For this call; None for the client's own. `Retry(attempts=1)` is no retry.
            timeline: Whether to find out where the time went: the result is then an `Answer`, a dict
                whose attribute `timeline` tells it.

        Returns:
            Name -> array of shape [rows, ...], writable and the caller's own. Strings are object
            arrays of `bytes`.

        Raises:
            InvalidInput: an input has a wrong name, dtype, rank or shape, or the priority is wrong
                (nothing was sent); TooLarge if it has too many rows.
            ModelNotFound, VersionNotFound, SignatureNotFound: there is no such thing to call.
            ModelError: the model raised. WorkerLost: its process died.
            Overloaded: no room; try again after `retry_after_ms`.
            DeadlineExceeded: the timeout passed first.
            Unavailable: no server at the endpoint, or it went away.
            Cancelled: the client was closed.
            WireError: what answered is not a pool server of this protocol.
            InternalError: a defect in the server.
            After several attempts, it is the last one's error; its sentence says how many there were, its
            `__cause__` is the error before it.
        """
        timeout_ms = self._timeout_ms
        if timeout is None:
            timeout = self._timeout
        else:
            timeout_ms = timeout_to_ms(check_timeout(timeout))
        loop = self._exchange.running_loop()
        began = loop.time()
        deadline = began + timeout
        retry = self._retry if retry is None else retry
        attempts = None if retry is None else Attempts(retry, began, deadline)
        while True:
            try:
                began_ns = time.monotonic_ns() if timeline else 0
                request = self._core.request(
                    model,
                    inputs,
                    version=version,
                    signature=signature,
                    outputs=outputs,
                    timeout_ms=timeout_ms,
                    cast=cast,
                    priority=priority,
                    timeline=timeline,
                )
                if request is not None:
                    handed_ns = time.monotonic_ns() if timeline else 0
                    reply = await self._exchange.reply_to(request, timeout, deadline)
                    if reply.error is not None:
                        self._core.note_refusal(model, reply.error)
                    outputs_ = reply.take_outputs()
                    if timeline:
                        now_ns = time.monotonic_ns()
                        return answer_with_timeline(outputs_, began_ns, handed_ns, now_ns, reply.timeline)
                    return outputs_
                await self._learn(model, version, timeout, deadline)
            except PoolError as e:
                if attempts is None:
                    raise
                await self._exchange.pause(attempts.pause_after(e, loop.time(), random.random()))
            timeout_ms = timeout_to_ms(deadline - loop.time())

    async def signature(
        self, model: str, version: int | None = None, *, timeout: float | None = None
    ) -> ModelInfo:
        """What a model takes and gives, asked of the server anew.

        Raises:
            ModelNotFound, VersionNotFound: there is no such model.
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        return await self._learn(model, version, timeout, self._exchange.running_loop().time() + timeout)

    async def models(self, *, timeout: float | None = None) -> dict[str, dict[str, Any]]:
        """The models served: name -> `version`, `ready`, `signatures` (names).

        Raises:
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return read_models(await self._ask(self._core.models_request(), timeout))

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The server's status document: what `pool status --json` prints.

        Raises:
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._ask(self._core.status_request(), timeout)

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether a server answers; False if none does within the timeout.

        The timeout is `connect_timeout` unless given.

        Raises:
            Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._ask_flag(self._core.live_request(), "live", timeout)

    async def ready(self, model: str | None = None, *, timeout: float | None = None) -> bool:
        """Whether the model, or with None every model, can answer now; False if no server answers.

        The timeout is `connect_timeout` unless given.

        Raises:
            ModelNotFound: the server has no such model.
            Cancelled, WireError, InternalError: as for `predict`.
        """
        return await self._ask_flag(self._core.ready_request(model), "ready", timeout)

    async def close(self) -> None:
        """Close the connection; calls under way raise `Cancelled`."""
        self._exchange.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- one request, one reply --------------------------------------------------------------------

    async def _learn(self, model: str, version: int | None, timeout: float, deadline: float) -> ModelInfo:
        request = self._core.signature_request(model, version)
        reply = await self._exchange.reply_to(request, timeout, deadline)
        return self._core.learn(model, version, reply.take_document())

    async def _ask(self, request: Request, timeout: float | None) -> dict[str, Any]:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        deadline = self._exchange.running_loop().time() + timeout
        return (await self._exchange.reply_to(request, timeout, deadline)).take_document()

    async def _ask_flag(self, request: Request, flag: str, timeout: float | None) -> bool:
        try:
            document = await self._ask(request, self._connect_timeout if timeout is None else timeout)
        except (Unavailable, DeadlineExceeded):
            return False
        return read_flag(document, flag)
