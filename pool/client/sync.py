"""`Client`: the blocking shell over the core, for scripts and threads. Client process.

A call takes an idle connection (the one used last, so that few stay in use), or opens one; sends;
waits; and puts it back. Nothing runs between calls: no background thread of Python, no shared queue.
A connection on which anything went wrong midway may still deliver a late reply, so it is closed.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import zmq

from pool.client.connection import Connection
from pool.client.conversion import Array
from pool.client.core import ClientCore, ModelInfo, Request, check_timeout, timeout_to_ms
from pool.client.curve import Key, keys_of
from pool.client.dial import Dial, Preference, endpoints_of, not_connected
from pool.client.reply import Reply, read_flag, read_models
from pool.client.retry import Attempts, Retry
from pool.client.timeline import answer_with_timeline
from pool.errors import Cancelled, DeadlineExceeded, PoolError, Unavailable

# Idle connections kept. Each has 4 file descriptors; a burst of more threads than this opens and closes some.
_MAX_IDLE = 64

# Threads that may call at the same time: a connection is 3 ZeroMQ sockets, of which a context has 1,023
# unless told otherwise.
_MAX_SOCKETS = 16_384


class Client:
    """A blocking client of a pool server. Any number of threads may share one.

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

    Nothing is connected until the first call. A client made before a fork works on both sides of it.
    Use it as a context manager, or call `close`.
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
        self._preference = Preference(endpoints_of(endpoint))
        self._keys = keys_of(server_key, secret_key)
        self._timeout = check_timeout(timeout)
        self._connect_timeout = check_timeout(connect_timeout)
        self._core = ClientCore(cast=cast)
        self._retry = retry
        self._share_memory = share_memory
        self._closing = threading.Event()  # for those who pause
        self._lock = threading.Lock()  # over all below
        self._idle: list[Connection] = []
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._pid = 0  # whose context it is
        self._inherited: object = None
        self._closed = False

    # -- calls -------------------------------------------------------------------------------------

    def predict(
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
        """Run a model on a batch of rows. A request whose timeout passes is withdrawn.

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
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        began = time.monotonic()
        deadline = began + timeout
        timeout_ms = timeout_to_ms(timeout)
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
                    reply = self._exchange(request, timeout, deadline)
                    if reply.error is not None:
                        self._core.note_refusal(model, reply.error)
                    outputs_ = reply.take_outputs()
                    if timeline:
                        now_ns = time.monotonic_ns()
                        return answer_with_timeline(outputs_, began_ns, handed_ns, now_ns, reply.timeline)
                    return outputs_
                self._learn(model, version, timeout, deadline)
            except PoolError as e:
                if attempts is None:
                    raise
                self._closing.wait(attempts.pause_after(e, time.monotonic(), random.random()))
            timeout_ms = timeout_to_ms(deadline - time.monotonic())

    def signature(self, model: str, version: int | None = None, *, timeout: float | None = None) -> ModelInfo:
        """What a model takes and gives, asked of the server anew.

        Raises:
            ModelNotFound, VersionNotFound: there is no such model.
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        return self._learn(model, version, timeout, time.monotonic() + timeout)

    def models(self, *, timeout: float | None = None) -> dict[str, dict[str, Any]]:
        """The models served: name -> `version`, `ready`, `signatures` (names).

        Raises:
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return read_models(self._ask(self._core.models_request(), timeout))

    def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The server's status document: what `pool status --json` prints.

        Raises:
            DeadlineExceeded, Unavailable, Cancelled, WireError, InternalError: as for `predict`.
        """
        return self._ask(self._core.status_request(), timeout)

    def live(self, *, timeout: float | None = None) -> bool:
        """Whether a server answers; False if none does within the timeout.

        The timeout is `connect_timeout` unless given.

        Raises:
            Cancelled, WireError, InternalError: as for `predict`.
        """
        return self._ask_flag(self._core.live_request(), "live", timeout)

    def ready(self, model: str | None = None, *, timeout: float | None = None) -> bool:
        """Whether the model, or with None every model, can answer now; False if no server answers.

        The timeout is `connect_timeout` unless given.

        Raises:
            ModelNotFound: the server has no such model.
            Cancelled, WireError, InternalError: as for `predict`.
        """
        return self._ask_flag(self._core.ready_request(model), "ready", timeout)

    def close(self) -> None:
        """Close every connection; calls under way in other threads raise `Cancelled`."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            context, self._context = self._context, None
        self._closing.set()
        if context is None or self._pid != os.getpid():
            return
        for connection in idle:
            connection.close()
        # Interrupts the connections in use, and returns when their threads have closed them.
        context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- one request, one reply --------------------------------------------------------------------

    def _learn(self, model: str, version: int | None, timeout: float, deadline: float) -> ModelInfo:
        request = self._core.signature_request(model, version)
        reply = self._exchange(request, timeout, deadline)
        return self._core.learn(model, version, reply.take_document())

    def _ask(self, request: Request, timeout: float | None) -> dict[str, Any]:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        return self._exchange(request, timeout, time.monotonic() + timeout).take_document()

    def _ask_flag(self, request: Request, flag: str, timeout: float | None) -> bool:
        try:
            document = self._ask(request, self._connect_timeout if timeout is None else timeout)
        except (Unavailable, DeadlineExceeded):
            return False
        return read_flag(document, flag)

    def _exchange(self, request: Request, timeout: float, deadline: float) -> Reply:
        try:
            connection = self._take(timeout, deadline)
            try:
                reply = self._converse(connection, request, timeout, deadline)
            except BaseException:
                connection.close()
                raise
        except zmq.ContextTerminated:
            raise Cancelled("the client was closed") from None
        if isinstance(reply.error, Unavailable):
            self._preference.avoid(connection.endpoint, time.monotonic())
        self._put_back(connection)
        return reply

    def _converse(self, connection: Connection, request: Request, timeout: float, deadline: float) -> Reply:
        id_ = request.id
        connection.send(request.message())  # has room: nothing else is under way on it
        is_broken = False
        while True:
            connection.wait(0 if is_broken else _poll_ms(deadline))
            try:
                # First: what the server still sent before it went away counts.
                reply = self._core.receive(connection.receive())
                if reply.id == id_:
                    return reply
            except zmq.Again:
                if is_broken:
                    self._preference.avoid(connection.endpoint, time.monotonic())
                    where = connection.endpoint
                    raise Unavailable(f"the server at {where} went away before it answered") from None
                is_broken = connection.is_broken()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"no answer from {connection.endpoint} within {timeout:g} s")

    # -- connections -------------------------------------------------------------------------------

    def _take(self, timeout: float, deadline: float) -> Connection:
        """An idle connection that still stands, or a new one; the caller has it to itself."""
        while True:
            with self._lock:
                context = self._own_context()
                connection = self._pop_idle()
            if connection is None:
                return self._dial(context, timeout, deadline)
            try:
                if not connection.is_broken():
                    return connection
            except BaseException:  # the context ends, and waits until this is closed
                connection.close()
                raise
            connection.close()

    def _pop_idle(self) -> Connection | None:
        """The connection used last whose endpoint is as good as any. Called with the lock held."""
        now = time.monotonic()
        for i in reversed(range(len(self._idle))):
            if not self._preference.has_better(self._idle[i].endpoint, now):
                return self._idle.pop(i)
        return None

    def _own_context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """This process's context, made when first needed. Called with the lock held."""
        if self._closed:
            raise Cancelled("the client is closed")
        if self._context is None or self._pid != os.getpid():
            # After a fork the parent's sockets are the parent's: kept, since to drop them is to close them.
            self._inherited = (self._context, self._idle)
            self._idle = []
            self._context = zmq.Context()
            self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
            self._pid = os.getpid()
        return self._context

    def _dial(self, context: zmq.Context[zmq.Socket[bytes]], timeout: float, deadline: float) -> Connection:
        patience = min(deadline, time.monotonic() + self._connect_timeout)
        dial = Dial(context, self._preference, self._keys, time.monotonic(), self._share_memory)
        try:
            while True:
                now = time.monotonic()
                until = min(patience, dial.decides_at) if now < dial.decides_at else patience
                zmq.zmq_poll([(each.monitor, zmq.POLLIN) for each in dial.connections], _poll_ms(until))
                now = time.monotonic()
                connection = dial.take(now)
                if connection is not None:
                    return connection
                if now >= patience or dial.is_refused:
                    raise not_connected(dial, self._connect_timeout, timeout)
        finally:
            dial.close()

    def _put_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                self._idle[0].regions.trim()  # the one idle for longest
                return
        connection.close()


def _poll_ms(deadline: float) -> int:
    """Whole milliseconds until the deadline, rounded up, as ZeroMQ's poll takes them; -1 for ever."""
    if deadline == math.inf:
        return -1
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))
