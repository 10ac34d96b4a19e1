"""One client process of `pool chaos`: asks, checks every answer to the bit, and accounts for each request.

    python -m pool.cli.chaos_client

It reads a `Task` as a line of JSON, connects, prints `{"is_ready": true}` and asks. Every tenth of a second
it prints a `Report` with the counts since its start, so that little is unknown about one that is killed. At
the line `stop` it asks no more, awaits what is under way, and ends with a last report. It ends at once when
its standard input closes: then the command is gone.

There are three kinds, for the three ways to speak to a server:

    asyncio    `AsyncClient`, many requests on one connection
    blocking   `Client` in several threads
    raw        messages made and taken apart here, bundles among them, and replies counted by id: the
               others' clients would drop a second reply in silence
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from pool.backends.drill import answer
from pool.cli.chaos_tally import Tally
from pool.client.aio import AsyncClient
from pool.client.connection import Connection
from pool.client.core import ClientCore, Reply
from pool.client.curve import keys_of
from pool.client.sync import Client
from pool.errors import PoolError, Unavailable, WireError

Inputs = dict[str, npt.NDArray[Any]]
Kind = Literal["asyncio", "blocking", "raw"]

TELL_S = 0.1
# A server answers a request with a deadline at the deadline. Those of the raw kind have one, at the end of
# the patience, and are lost when the reply has not come by so many times as much.
GRACE = 1.25
# After its last reply the raw kind listens for so long, for a second one.
LINGER_S = 0.5
# Rows of a request, drawn evenly: mostly few; some that fill a batch; some that must be split over two.
_ROWS = (1, 1, 1, 1, 2, 2, 3, 4, 5, 8, 13, 21, 34, 55, 89)
_BURST = 8  # requests that the raw kind sends at once now and then, as a bundle
_BURST_SHARE = 0.05


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process is to do.

    Attributes:
        kind: How it speaks to the server.
        is_local: Whether it may go past ZeroMQ.
        endpoint: Where that is.
        model: A model of the drill backend.
        version: Of the model; answers depend on it.
        row_items: Floats in a row.
        max_rows: Most rows of a request.
        rate: Requests per second, at random instants; fewer while `window` are under way.
        window: Most requests without an answer at a time.
        patience_s: A request without a reply for so long is lost.
        seed: Other requests and instants for each process.
        server_key: The server's public key or its file, for endpoints with keys.
        secret_key: File of the client's own key.
    """

    kind: Kind
    is_local: bool
    endpoint: str
    model: str
    version: int
    row_items: int
    max_rows: int
    rate: float
    window: int
    patience_s: float
    seed: int
    server_key: str | None = None
    secret_key: str | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a client process has seen since its start."""

    tally: Tally
    is_last: bool


class Questions:
    """Requests no two of which are alike, and what their answers must be.

    Args:
        task: Whom to ask, and the seed.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._generator = np.random.default_rng(task.seed)
        self._lock = threading.Lock()

    def next(self) -> Inputs:
        """A request that does no harm."""
        with self._lock:
            rows = min(_ROWS[self._generator.integers(len(_ROWS))], self._task.max_rows)
            x = self._generator.random((rows, self._task.row_items), np.float32)
        return {"x": x, "fault": np.zeros(rows, np.int32), "argument": np.zeros(rows, np.float32)}

    def mistake(self, inputs: Inputs, outputs: Inputs) -> str:
        """What is wrong with an answer; '' if nothing is."""
        if "y" not in outputs:
            return "wrong: a reply without the output 'y'"
        y, want = outputs["y"], answer(inputs["x"], self._task.version)
        if y.shape != want.shape:
            return f"wrong: an answer of shape {list(y.shape)}; wanted {list(want.shape)}"
        differing = np.flatnonzero(np.any(y != want, axis=1))
        if len(differing):
            row = int(differing[0])
            return f"wrong: row {row} of {len(want)} is {y[row].tolist()}; wanted {want[row].tolist()}"
        return ""


class Player:
    """What the three kinds have in common.

    Args:
        task: What to do.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.questions = Questions(task)
        self.chance = random.Random(task.seed)
        self.tally = Tally()
        self.lock = threading.Lock()  # over the tally
        self.is_stopping = threading.Event()

    def play(self) -> None:
        """Ask until told to stop, then settle what is under way.

        Raises:
            PoolError: there is no server, or no such model.
        """
        raise NotImplementedError

    def is_ready(self) -> None:
        """Tell that it is connected, and start telling the counts."""
        tell({"is_ready": True})
        threading.Thread(target=self._keep_telling, daemon=True).start()

    def report(self, *, is_last: bool = False) -> None:
        """Tell the counts."""
        with self.lock:
            tell(msgspec.to_builtins(Report(tally=self.tally, is_last=is_last)))

    def _keep_telling(self) -> None:
        while not self.is_stopping.wait(TELL_S):
            self.report()

    def pause_s(self, rate: float) -> float:
        """How long to wait before the next request: a Poisson process of that rate."""
        return self.chance.expovariate(rate)

    def settle(self, inputs: Inputs, outcome: Inputs | PoolError | None) -> None:
        """Count a request once, with its answer, its error, or None if it is lost."""
        mistake = self.questions.mistake(inputs, outcome) if isinstance(outcome, dict) else ""
        with self.lock:
            if isinstance(outcome, PoolError):
                self.tally.fail(outcome, is_innocent=True)
            elif outcome is None:
                self.tally.lose(f"lost: no reply within {self.task.patience_s:g} s ({self.task.kind})")
            else:
                self.tally.answer(mistake)


class AsyncioPlayer(Player):
    """Many requests on one `AsyncClient`."""

    def play(self) -> None:
        """Ask until told to stop."""
        asyncio.run(self._play())

    async def _play(self) -> None:
        task = self.task
        under_way: set[asyncio.Task[None]] = set()
        async with AsyncClient(
            task.endpoint,
            timeout=math.inf,
            share_memory=task.is_local,
            server_key=task.server_key,
            secret_key=task.secret_key,
        ) as client:
            await client.signature(task.model, timeout=task.patience_s)
            self.is_ready()
            while not self.is_stopping.is_set():
                await asyncio.sleep(self.pause_s(task.rate))
                if len(under_way) < task.window:
                    call = asyncio.create_task(self._ask(client))
                    under_way.add(call)
                    call.add_done_callback(under_way.discard)
            await asyncio.gather(*under_way)

    async def _ask(self, client: AsyncClient) -> None:
        inputs = self.questions.next()
        outcome: Inputs | PoolError | None
        try:
            outcome = await asyncio.wait_for(client.predict(self.task.model, inputs), self.task.patience_s)
        except asyncio.TimeoutError:
            outcome = None
        except PoolError as e:
            outcome = e
        self.settle(inputs, outcome)


class BlockingPlayer(Player):
    """Threads that share a `Client`. One whose request is lost is left alone, and another takes its place."""

    def play(self) -> None:
        """Ask until told to stop."""
        task = self.task
        # Of each thread that asks: its request, and since when. Whoever takes an entry out settles it.
        self._under_way: dict[int, tuple[Inputs, float]] = {}
        self._numbers = itertools.count()
        with Client(
            task.endpoint,
            timeout=math.inf,
            share_memory=task.is_local,
            server_key=task.server_key,
            secret_key=task.secret_key,
        ) as client:
            client.signature(task.model, timeout=task.patience_s)
            self.is_ready()
            threads = [self._start(client) for _ in range(task.window)]
            while any(thread.is_alive() for thread in threads):
                time.sleep(TELL_S)
                for number, (inputs, since_s) in list(self._under_way.items()):
                    if time.monotonic() - since_s <= task.patience_s:
                        continue
                    if self._under_way.pop(number, None) is not None:
                        self.settle(inputs, None)
                        threads = [thread for thread in threads if thread.name != str(number)]
                        threads.append(self._start(client))

    def _start(self, client: Client) -> threading.Thread:
        number = next(self._numbers)
        thread = threading.Thread(target=self._ask, args=(client, number), name=str(number), daemon=True)
        thread.start()
        return thread

    def _ask(self, client: Client, number: int) -> None:
        task = self.task
        while not self.is_stopping.wait(self.pause_s(task.rate / task.window)):
            inputs = self.questions.next()
            self._under_way[number] = inputs, time.monotonic()
            outcome: Inputs | PoolError
            try:
                outcome = client.predict(task.model, inputs)
            except PoolError as e:
                outcome = e
            if self._under_way.pop(number, None) is None:
                return  # it was given up, and counted as lost
            self.settle(inputs, outcome)


class RawPlayer(Player):
    """Messages on a DEALER, without a client that would keep order; every reply is counted by its id."""

    def play(self) -> None:
        """Ask until told to stop."""
        task = self.task
        self._core = ClientCore()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._under_way: dict[int, tuple[Inputs, float]] = {}
        self._lost: set[int] = set()
        connection = self._connect()
        try:
            connection.send(self._core.signature_request(task.model).message())
            message = connection.receive_within(task.patience_s)
            if message is None:
                raise Unavailable(f"{task.endpoint} does not tell the signature of model {task.model!r}")
            self._core.learn(task.model, None, self._core.receive(message).take_document())
            self.is_ready()
            next_s = time.monotonic()
            silent_s = math.inf  # since when nothing has been under way, once it stops
            while time.monotonic() < silent_s + LINGER_S:
                now = time.monotonic()
                if self.is_stopping.is_set():
                    next_s = math.inf
                    silent_s = min(silent_s, now) if not self._under_way else math.inf
                elif now >= next_s:
                    self._ask(connection, now)
                    next_s = now + self.pause_s(task.rate / (1 + _BURST_SHARE * (_BURST - 1)))
                connection = self._listen(connection, min(next_s - time.monotonic(), TELL_S))
                self._give_up()
        finally:
            connection.close()
            self._context.term()

    def _connect(self) -> Connection:
        task = self.task
        keys = keys_of(task.server_key, task.secret_key)
        connection = Connection(self._context, task.endpoint, keys, task.is_local)
        deadline = time.monotonic() + self.task.patience_s
        while not connection.is_connected():
            if time.monotonic() >= deadline:
                connection.close()
                raise Unavailable(f"no server at {self.task.endpoint}")
            connection.monitor.poll(100)
        return connection

    def _ask(self, connection: Connection, now: float) -> None:
        task = self.task
        count = _BURST if self.chance.random() < _BURST_SHARE else 1
        requests = []
        for _ in range(min(count, task.window - len(self._under_way))):
            inputs = self.questions.next()
            request = self._core.request(task.model, inputs, timeout_ms=int(task.patience_s * 1e3))
            assert request is not None, "the signature was learnt"
            self._under_way[request.id] = inputs, now
            requests.append(request)
        for frames, _ in self._core.bundle(requests):
            connection.send(frames)

    def _listen(self, connection: Connection, timeout_s: float) -> Connection:
        """Take what comes within that time; gives the connection to go on with."""
        connection.wait(max(0, math.ceil(timeout_s * 1e3)))
        error: PoolError | None = None
        try:
            while True:
                for reply in self._core.receive_all(connection.receive()):
                    self._take(reply)
        except zmq.Again:
            if connection.is_broken():
                error = Unavailable(f"the server at {self.task.endpoint} went away before it answered")
        except WireError as e:
            error = e
        if error is None:
            return connection
        for inputs, _ in self._under_way.values():
            self.settle(inputs, error)
        self._under_way.clear()
        connection.close()
        return self._connect()

    def _take(self, reply: Reply) -> None:
        asked = self._under_way.pop(reply.id, None)
        if asked is not None:
            self.settle(asked[0], reply.error if reply.error is not None else reply.outputs or {})
        elif reply.id in self._lost:
            self._lost.remove(reply.id)  # late, and counted as lost already
        else:
            with self.lock:
                self.tally.repeat(f"duplicated: another reply to request {reply.id}")

    def _give_up(self) -> None:
        patience_s = self.task.patience_s * GRACE
        now = time.monotonic()
        while self._under_way:
            id_, (inputs, since_s) = next(iter(self._under_way.items()))  # the oldest
            if now - since_s <= patience_s:
                return
            del self._under_way[id_]
            self._lost.add(id_)
            self.settle(inputs, None)


PLAYERS: dict[Kind, type[Player]] = {
    "asyncio": AsyncioPlayer,
    "blocking": BlockingPlayer,
    "raw": RawPlayer,
}


def tell(line: dict[str, Any]) -> None:
    """Print a line for the command."""
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def _obey(player: Player) -> None:
    """Wait for the command to say stop, or to be gone."""
    if sys.stdin.buffer.readline():
        player.is_stopping.set()
    else:
        os._exit(1)


def main() -> None:
    """Do the task that comes on the standard input; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which tells when to stop
    player_task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    player = PLAYERS[player_task.kind](player_task)
    threading.Thread(target=_obey, args=(player,), daemon=True).start()
    code = 0
    try:
        player.play()
        player.report(is_last=True)
    except PoolError as e:
        tell({"code": e.code, "message": e.message})
        code = 1
    except BrokenPipeError:
        code = 1  # the command is gone
    os._exit(code)  # threads whose requests are lost wait for ever


if __name__ == "__main__":
    main()
