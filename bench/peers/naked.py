"""The data path with nothing in it but its I/O: what a loop of pool's shape gives at most in Python.

`python -m bench.peers.naked BACKEND PATH FILE IN_FLIGHT ROWS SECONDS` asks the model at PATH for the rows of
FILE (`bench.peers.expected`), each alone in a message and in bundles of ROWS, through ZeroMQ and over a line
past it (`pool.packets`); prints what each came to.

Three processes, as pool has them, and the frames that pool's client and front send. This is the client: its
messages are made beforehand, and all it does with most answers is to take them. The others: `naked_front`.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import psutil
import zmq

from bench.peers.doors import Array
from bench.peers.naked_front import AHEAD, SLOTS, Shape, command, widen
from pool import packets
from pool.client.core import ClientCore

WARM_UP_S = 0.3
_PATIENCE_S = 60
# Frames from here on are handed to ZeroMQ as they are, which costs less than to copy them.
_COPY_BYTES = 65_536
_TOLERANCE = 1e-3  # a batch of another size rounds in another order
_MORE = int(zmq.SNDMORE)


class Dealer:
    """Messages through ZeroMQ. The client does nothing with answers but to take them."""

    def __init__(self, dealer: zmq.Socket[bytes]) -> None:
        self._dealer = dealer
        self._send, self._recv = super(zmq.Socket, dealer).send, dealer.recv
        self.frames = dealer.recv_multipart

    def ready(self, frames: list[Any]) -> list[Any]:
        """A message, as `send` takes it again and again."""
        self._count = len(frames)
        return [zmq.Frame(frame, copy=False) if len(frame) >= _COPY_BYTES else frame for frame in frames]

    def send(self, message: list[Any]) -> None:
        """Send it."""
        send = self._send
        for frame in message[:-1]:
            send(frame, _MORE)
        send(message[-1])

    def skip(self) -> None:
        """Take an answer of the same number of frames."""
        recv = self._recv
        for _ in range(self._count):
            recv()


class Line:
    """The same over a line."""

    def __init__(self, line: socket.socket) -> None:
        widen(line)
        self._buffer = memoryview(bytearray(packets.PACKET_MAX_BYTES))
        self._line, self.send = line, line.sendall

    def ready(self, frames: list[Any]) -> bytes:
        """A message, as `send` takes it again and again."""
        return b"".join((packets.make_table(frames), *frames))

    def skip(self) -> None:
        """Take an answer."""
        self._line.recv_into(self._buffer)

    def frames(self) -> list[Any]:
        """The frames of the next answer."""
        return [bytes(frame) for frame in packets.split(self._buffer[: self._line.recv_into(self._buffer)])]


def load(
    talk: Dealer | Line, core: ClientCore, x: Array, y: Array, in_flight: int, rows: int, seconds: float,
    pids: dict[str, int],
) -> dict[str, float]:  # fmt: skip
    """The client: messages of so many rows for so long; the first answers and the last are checked.

    Answers come in the order of their messages: there is one client and one worker.
    """
    made: list[tuple[Any, list[int], Array]] = []
    # One message more than are under way: a slot gets other rows each time, so no old answer is right.
    for first in range(in_flight // rows + 1):
        places = (first + np.arange(rows)) % len(x)
        requests = [core.request("model", x[place : place + 1]) for place in places]
        ((frames, _),) = core.bundle([request for request in requests if request])
        made.append((talk.ready(frames), [request.id for request in requests if request], y[places]))
    to_send, to_come = itertools.cycle(made), itertools.cycle(made)
    send, skip, clock = talk.send, talk.skip, time.monotonic

    def check() -> None:
        _, ids, wanted = next(to_come)
        for reply, id_, want in zip(core.receive_all(talk.frames()), ids, wanted, strict=True):
            (got,) = reply.take_outputs().values()
            if reply.id != id_ or not np.allclose(got[0], want, _TOLERANCE, _TOLERANCE):
                sys.exit(f"a wrong answer: to {id_}, {want.tolist()}; got to {reply.id}, {got[0].tolist()}")

    def go_on(until: float) -> int:
        answered = 0
        while clock() < until:
            skip()
            next(to_come)
            answered += rows
            send(next(to_send)[0])
        return answered

    for _ in range(in_flight // rows):
        send(next(to_send)[0])
    for _ in range(in_flight // rows):
        check()
        send(next(to_send)[0])
    go_on(clock() + WARM_UP_S)
    before_s, began = [_cpu_s(pid) for pid in pids.values()], clock()
    answered = go_on(began + seconds)
    took, after_s = clock() - began, [_cpu_s(pid) for pid in pids.values()]
    for _ in range(in_flight // rows):
        check()
    spent_s = (after - before for after, before in zip(after_s, before_s, strict=True))
    costs = {f"{name}_cpu_us": cpu_s / answered * 1e6 for name, cpu_s in zip(pids, spent_s, strict=True)}
    return {"requests_per_s": answered / took, **costs}


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main(backend: str, path: str, file: str, in_flight: int, rows: int, seconds: float) -> None:
    assert in_flight // rows + AHEAD < SLOTS, "full batches, those that are not full, and the open one"
    with np.load(file, allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
    shape = Shape(rows, x[0].nbytes, y[0].nbytes)
    core = ClientCore()
    with tempfile.TemporaryDirectory(prefix="pb-") as folder:
        endpoint = f"ipc://{folder}/s"
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = command("serve", endpoint, str(theirs.fileno()), backend, path, json.dumps(shape))
        with (
            subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]
            ) as front,
            zmq.Context() as context,
            context.socket(zmq.DEALER) as dealer,
        ):
            theirs.close()
            assert front.stdout is not None
            worker, signature = json.loads(front.stdout.readline())
            pids = {"client": os.getpid(), "front": front.pid, "worker": worker}
            core.learn("model", None, {"model": "model", "version": 1, "signatures": [signature]})
            found = {}
            gc.disable()
            line.settimeout(_PATIENCE_S)
            for name, count in (("naked loop, line", 1), ("naked loop bundled, line", rows)):
                found[name] = load(Line(line), core, x, y, in_flight, count, seconds, pids)
            line.close()
            dealer.sndhwm = dealer.rcvhwm = dealer.linger = 0
            dealer.rcvtimeo = _PATIENCE_S * 1000
            dealer.connect(endpoint)
            for name, count in (("naked loop", 1), ("naked loop bundled", rows)):
                found[name] = load(Dealer(dealer), core, x, y, in_flight, count, seconds, pids)
    print(json.dumps(found))


if __name__ == "__main__":
    backend, path, file, in_flight, rows, seconds = sys.argv[1:]
    main(backend, path, file, int(in_flight), int(rows), float(seconds))
