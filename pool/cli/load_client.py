"""One client process of `pool bench`: sends requests over one connection and times every answer.

    python -m pool.cli.load_client

It reads a `Task` as a line of JSON, connects, has one request answered, prints `{"is_ready": true}`, and
waits for another line. Then it runs, printing `{"done": n}` now and then, and ends with the line of a
`Result` followed by its `Answers`: two float64 per answered request, in native order, first all latencies. A
failure before that is the line `{"code": ..., "message": ...}`.

The work per request is a client's own, done by the same core as `pool.Client`: a request is made and joined
with others, the answer decoded into arrays. Only the inputs are checked and encoded once, beforehand: they
repeat.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import math
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from pool.client.connection import Connection
from pool.client.core import ClientCore, Reply, Request, timeout_to_ms
from pool.client.curve import keys_of
from pool.errors import DeadlineExceeded, InvalidInput, PoolError, Unavailable
from pool.sample import Recipe, sample_inputs
from pool.signature import Signature

Inputs = dict[str, npt.NDArray[Any]]

# Of each answered request, in the order of the answers: latency and instant of its answer on the system-wide
# monotonic clock, in seconds; shape [2, answered].
Answers = npt.NDArray[np.float64]

VARIANTS = 16  # different inputs a client makes up, sent in turn
FILE_VARIANTS = 256  # different inputs it cuts from a file at most
BURST = 64  # sent, or taken, before looking at the other side
TELL_S = 0.1  # between two lines about the progress


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process is to do.

    Attributes:
        endpoint: Where the server is.
        model: Whom to ask.
        requests: How many to send.
        rows: Rows of each.
        window: Most requests without an answer at a time; None for no limit (only with a rate).
        rate: Requests per second, sent at random instants (a Poisson process) whether or not earlier ones
            were answered; None to send one for each answer.
        input: A `.npz` or `.npy` file of inputs; None to make them up.
        recipe: How to make them up.
        seed: Other values and other instants for each client.
        timeout_s: Longest time without any answer.
        patience_s: Timeout of each request, counted from when it is sent, or with a rate from when it was to
            be sent; the server is told what remains. None for no timeout.
        server_key: The server's public key or its file, for endpoints with keys.
        secret_key: File of the client's own key.
    """

    endpoint: str
    model: str
    requests: int
    rows: int
    window: int | None
    rate: float | None
    input: str | None
    recipe: Recipe
    seed: int
    timeout_s: float
    patience_s: float | None = None
    server_key: str | None = None
    secret_key: str | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process saw.

    Attributes:
        answered: Requests that succeeded.
        errors: Those that did not, by code.
        started_s: Instant of the first request, on the system-wide monotonic clock.
        ended_s: Instant of the last answer.
        cpu_s: CPU time of this process between the two.
    """

    answered: int
    errors: dict[str, int]
    started_s: float
    ended_s: float
    cpu_s: float


def make_inputs(task: Task, signature: Signature) -> list[Inputs]:
    """The inputs that requests take in turn.

    Raises:
        ValueError: the file's arrays have not enough rows.
    """
    if task.input is None:
        return [
            sample_inputs(signature, task.rows, task.seed * VARIANTS + i, task.recipe)
            for i in range(VARIANTS)
        ]
    arrays = read_file(Path(task.input), signature)
    if not signature.batched:
        return [arrays]
    rows = min((len(array) for array in arrays.values()), default=0)
    count = min(rows // task.rows, FILE_VARIANTS)
    if count == 0:
        raise ValueError(f"{task.input} has {rows} rows; wanted at least {task.rows}")
    return [
        {
            name: np.ascontiguousarray(array[i * task.rows : (i + 1) * task.rows])
            for name, array in arrays.items()
        }
        for i in range(count)
    ]


def read_file(file: Path, signature: Signature) -> Inputs:
    """The arrays of a `.npz` by name; that of a `.npy` under the name of the signature's first input."""
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {signature.inputs[0].name: loaded}
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def instants(rate: float, count: int, seed: int) -> npt.NDArray[np.float64]:
    """Seconds from the start at which to send each request: a Poisson process of that rate."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


class LoadClient:
    """The connection, the requests under way, and the times taken.

    Args:
        task: What to do.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._core = ClientCore()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # The window, or the rate, is the only limit: a queue of ZeroMQ's own must not be another.
        self._context.setsockopt(zmq.SNDHWM, 0)
        self._context.setsockopt(zmq.RCVHWM, 0)
        self._connection = Connection(self._context, task.endpoint, keys_of(task.server_key, task.secret_key))
        self._prepared: list[Request] = []  # of each input; sent again and again under other ids
        self._latencies_s: list[float] = []
        self._answered_s: list[float] = []
        self._errors: dict[str, int] = {}
        self._done = 0
        self._next_tell_s = 0.0

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._context.term()

    # -- before ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Connect, learn the signature, and have one request of each input answered.

        Raises:
            PoolError: there is no server, or it does not take the inputs.
            OSError, ValueError: nor can the file be used.
        """
        task = self._task
        deadline = time.monotonic() + task.timeout_s
        while not self._connection.is_connected():
            if time.monotonic() >= deadline:
                raise Unavailable(f"no server at {task.endpoint}")
            self._connection.monitor.poll(100)
        reply = self._call(self._core.signature_request(task.model))
        signature = self._core.learn(task.model, None, reply.take_document()).signature()
        for inputs in make_inputs(task, signature):
            request = self._core.request(task.model, inputs)
            assert request is not None, "the signature was learnt"
            if len(self._prepared) < VARIANTS:
                self._call(request).take_outputs()
            self._prepared.append(request)

    def _call(self, request: Request) -> Reply:
        self._connection.send(request.message())
        message = self._connection.receive_within(self._task.timeout_s)
        if message is None:
            raise DeadlineExceeded(f"no answer from {self._task.endpoint} within {self._task.timeout_s:g} s")
        return self._core.receive(message)

    # -- during ------------------------------------------------------------------------------------

    def run(self) -> tuple[Result, Answers]:
        """Send everything and take every answer; what has none after `timeout_s` of silence is an error.

        Returns:
            The result, and the successes. A latency counts from the instant a request was sent, or with a
            rate from the instant it was to be sent.
        """
        gc.collect()
        gc.disable()  # nothing here makes cycles, and a collection would be measured as latency
        cpu_s = time.process_time()
        started_s = time.monotonic()
        code = self._converse(started_s)
        ended_s = time.monotonic()
        if self._done < self._task.requests:
            self._errors[code] = self._errors.get(code, 0) + self._task.requests - self._done
        result = Result(
            answered=len(self._latencies_s),
            errors=self._errors,
            started_s=started_s,
            ended_s=ended_s,
            cpu_s=time.process_time() - cpu_s,
        )
        return result, np.array([self._latencies_s, self._answered_s], np.float64)

    def _converse(self, started_s: float) -> str:
        """Send what is due while the window has room, take what has come, wait for either.

        Returns:
            The code of the error that requests left over at the end had.
        """
        task = self._task
        total = task.requests
        window = task.window or total
        due_s: list[float] | None = None
        if task.rate is not None:
            due_s = (started_s + instants(task.rate, total, task.seed)).tolist()
        begun_s: list[float] = [] if due_s is None else due_s  # what latencies are counted from
        variants = itertools.cycle(
            [(each.head, each.rows, each.pattern, each.tensors) for each in self._prepared]
        )
        send, clock = self._connection.send, time.monotonic
        patience_s = math.inf if task.patience_s is None else task.patience_s
        millis = timeout_to_ms(patience_s)
        sent = 0
        heard_s = started_s
        has_waited = False
        while self._done < total:
            now = clock()
            limit = min(total, self._done + window)
            stop = min(limit, sent + BURST)
            end = stop if due_s is None else bisect.bisect_right(due_s, now, sent, stop)
            due = [
                Request(id_, head, millis, rows, pattern, tensors)
                for id_, (head, rows, pattern, tensors) in zip(range(sent, end), variants, strict=False)
            ]
            if due_s is None:
                begun_s += [now] * len(due)
            elif task.patience_s is not None:
                for request in due:
                    request.millis = timeout_to_ms(due_s[request.id] + patience_s - now)
            under_way = sent - self._done  # without those that are sent now, of which none is answered yet
            for frames, _ in self._core.bundle(due):
                send(frames)
            sent = end
            if self._take(begun_s, under_way):
                heard_s = clock()
                has_waited = False
                continue
            if has_waited and self._connection.is_broken() and not self._take(begun_s, under_way):
                return Unavailable.code  # what came before it broke was taken
            if sent == stop < limit:
                continue
            until_s = heard_s + task.timeout_s if sent > self._done else math.inf
            if due_s is not None and sent < limit:
                until_s = min(until_s, due_s[sent])
            self._wait(until_s)
            has_waited = True
            if sent > self._done and clock() >= heard_s + task.timeout_s:
                return DeadlineExceeded.code
            if sent == self._done:
                heard_s = clock()
        return DeadlineExceeded.code

    def _take(self, begun_s: list[float], under_way: int) -> int:
        """Take answers that have come, `BURST` at most or a bundle of them; the number taken.

        Args:
            begun_s: By request, whose ids are the places here.
            under_way: How many answers there may be: none is looked for beyond them.
        """
        receive, decode, clock = self._connection.receive, self._core.receive_all, time.monotonic
        latencies_s, answered_s = self._latencies_s, self._answered_s
        most = min(BURST, under_way)
        count = 0
        try:
            while count < most:
                replies = decode(receive())
                count += len(replies)
                now = clock()
                taken_s = [now - begun_s[reply.id] for reply in replies if reply.error is None]
                latencies_s += taken_s
                answered_s += [now] * len(taken_s)
                if len(taken_s) < len(replies):
                    self._count_errors(replies)
        except zmq.Again:
            pass
        self._done += count
        if count and clock() >= self._next_tell_s:
            self._next_tell_s = clock() + TELL_S
            tell({"done": self._done})
        return count

    def _count_errors(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if reply.error is not None:
                code = reply.error.code
                self._errors[code] = self._errors.get(code, 0) + 1

    def _wait(self, until_s: float) -> None:
        """Wait for news or that instant."""
        timeout_s = max(0.0, until_s - time.monotonic())
        if self._task.rate is None:
            self._connection.wait(-1 if timeout_s == math.inf else math.ceil(timeout_s * 1e3))
        elif not self._connection.has_message():  # of which its descriptor may not tell any more
            # `wait` counts whole milliseconds, and the next request may be due sooner.
            watched = self._connection.descriptors()
            select.select(watched, [], [], None if timeout_s == math.inf else timeout_s)


def tell(line: dict[str, Any]) -> None:
    """Print a line for the parent."""
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def _obey(client: LoadClient) -> int:
    try:
        client.prepare()
    except PoolError as e:
        tell({"code": e.code, "message": e.message})
        return 1
    except (OSError, ValueError) as e:
        tell({"code": InvalidInput.code, "message": str(e)})
        return 1
    tell({"is_ready": True})
    if not sys.stdin.buffer.readline():
        return 0  # the parent gave up
    result, answers = client.run()
    tell(msgspec.to_builtins(result))
    sys.stdout.buffer.write(answers.tobytes())
    sys.stdout.buffer.flush()
    return 0


def main() -> int:
    """Do the task that comes on the standard input."""
    try:
        with LoadClient(msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)) as client:
            return _obey(client)
    except (KeyboardInterrupt, BrokenPipeError):
        return 130  # the parent tells


if __name__ == "__main__":
    sys.exit(main())
