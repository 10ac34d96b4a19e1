"""The data path with nothing in it but its I/O: what a loop of pool's shape gives at most in Python.

`python -m bench.peers.naked BACKEND PATH FILE IN_FLIGHT ROWS SECONDS` asks the model at PATH for the rows of
FILE (`bench.peers.expected`), each alone in a message and in bundles of ROWS; prints what either came to.

Three processes, as pool has them, and the frames that pool's client and front send: a client with messages
made beforehand; a front that receives into a slot and answers from it, without admission, deadlines or
checks; a worker that runs the model there. The worker has a core of its own, and nobody stays awake for what
may come: on two cores, that takes from ZeroMQ's threads more than it saves.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import zmq

from bench.peers.doors import Array
from pool import wire
from pool.backends import BoundCall, find_backend
from pool.client.core import ClientCore
from pool.config import Placement
from pool.shm.arena import Arena, align, slot_bytes_for
from pool.shm.lifeline import die_with_front
from pool.signature import Signature, choose_signature
from pool.wire import HEAD, HEAD_BYTES, Flag, Kind, ResultMeta, TensorMeta

WARM_UP_S = 0.3
SLOTS = 8
# Batches the worker has before one that is not full joins them: with one, it would wait for the front.
_AHEAD = 2
_PATIENCE_MS = 60_000
# The client's frames from here on are handed to ZeroMQ as they are, which costs less than to copy them.
_COPY_BYTES = 65_536
_TOLERANCE = 1e-3  # a batch of another size rounds in another order

_RING = struct.Struct("<HH")  # slot, rows; the same both ways
_SIGNATURE_BYTES = 65_536
_MORE, _NOBLOCK, _POLLIN = int(zmq.SNDMORE), int(zmq.NOBLOCK), int(zmq.POLLIN)


class Shape(NamedTuple):
    """Of a slot: rows of a full batch, bytes of a row's input and of its output."""

    rows: int
    row_bytes: int
    answer_bytes: int

    def cut(self, slot: Array) -> tuple[Array, Array]:
        """Input and output of a slot."""
        at = align(self.rows * self.row_bytes)
        return slot[: self.rows * self.row_bytes], slot[at : at + self.rows * self.answer_bytes]

    @property
    def slot_bytes(self) -> int:
        """Of both, on whole pages."""
        return slot_bytes_for(align(self.rows * self.row_bytes) + self.rows * self.answer_bytes)


def work(backend_name: str, path: str, shape: Shape, arena: int, bell_fd: int) -> None:
    """The worker: say the signature, then run each batch where it lies, until nobody is left to ring."""
    backend = find_backend(backend_name)
    backend.preload()
    backend.prepare(Placement(cores=(max(os.sched_getaffinity(0)),), threads=1))
    model = backend.load(backend.resolve(path)[1], None)
    signature = choose_signature(model.signatures, None)
    (given,), (got,) = signature.inputs, signature.outputs
    assert given.shape, "rows of a known size"
    assert got.shape, "rows of a known size"
    calls: dict[bytes, tuple[BoundCall, Array]] = {}
    for slot, memory in enumerate(Arena.attach(arena, SLOTS, shape.slot_bytes).slots):
        source, target = (half.reshape(shape.rows, -1) for half in shape.cut(memory))
        for rows in range(1, shape.rows + 1):
            x = source[:rows].view(given.dtype).reshape(rows, *given.shape[1:])
            call = model.bind(signature.name, [x])
            call()  # the first takes longer
            calls[_RING.pack(slot, rows)] = call, target[:rows].view(got.dtype).reshape(rows, *got.shape[1:])
    with socket.socket(fileno=bell_fd) as bell:
        bell.send(msgspec.json.encode(signature))
        gc.disable()
        while ring := bell.recv(_RING.size):
            call, y = calls[ring]
            y[...] = call()[0]
            bell.send(ring)


def serve(endpoint: str, backend: str, path: str, shape: Shape) -> None:
    """The front: start the worker, print its process id and the signature, serve until stdin is closed."""
    die_with_front(os.dup(0))
    arena = Arena.create(SLOTS, shape.slot_bytes)
    bell, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = (arena.fd, theirs.fileno())
    words = ["work", backend, path, json.dumps(shape), *map(str, fds)]
    worker = subprocess.Popen(_command(*words), pass_fds=fds, stdin=subprocess.DEVNULL)
    theirs.close()
    signature = bell.recv(_SIGNATURE_BYTES)
    (output,) = msgspec.json.decode(signature, type=Signature).outputs
    assert output.shape, "rows of a known size"
    axes = tuple(axis for axis in output.shape[1:] if axis is not None)
    meta = wire.encode_meta(ResultMeta(1, (TensorMeta(output.name, output.dtype, axes),)))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm = router.rcvhwm = 0
        router.bind(endpoint)
        print(json.dumps([worker.pid, json.loads(signature)]), flush=True)
        gc.disable()
        _turn(router, bell, shape.rows, [shape.cut(slot) for slot in arena.slots], meta)


def _turn(
    router: Any, bell: socket.socket, rows: int, halves: list[tuple[Array, Array]], meta: bytes
) -> None:
    bell.setblocking(False)
    ring, heard, pack, size = bell.send, bell.recv, _RING.pack, _RING.size
    # pyzmq's Python layer over `send` costs 0.65 µs a frame.
    recv, recv_into, get, send = router.recv, router.recv_into, router.get, super(zmq.Socket, router).send
    events, again, is_bundle = zmq.EVENTS, zmq.Again, int(Flag.BUNDLE)
    wholes = [(source.data, target.data) for source, target in halves]
    sources = [[row.data for row in source.reshape(rows, -1)] for source, _ in halves]
    targets = [[row.data for row in target.reshape(rows, -1)] for _, target in halves]
    head, id_at, id_end = wire.head(Kind.RESULT), HEAD_BYTES, HEAD_BYTES + 8
    tail = HEAD.pack(head, 0, 0, 1)[id_end:] + meta
    bundle_header = HEAD.pack(wire.head(Kind.RESULT, Flag.BUNDLE), 0, 0, rows) + meta
    free = list(range(len(halves)))
    slot = free.pop()  # the open one
    waiting: list[tuple[bytes, bytes]] = []  # whom its rows are of, and the headers of their answers
    running: deque[tuple[int, Any, bytes | None]] = deque()  # slot, whom of, and a bundle's table
    poll = select.poll()
    poll.register(get(zmq.FD), select.POLLIN)
    poll.register(bell, select.POLLIN)
    while True:
        if not int(get(events)) & _POLLIN:  # the descriptor tells only news
            poll.poll()
        try:
            while True:
                who, header = recv(_NOBLOCK), recv()
                if header[6] & is_bundle:
                    table, at = recv(), free.pop()
                    recv_into(wholes[at][0])
                    ring(pack(at, rows))
                    running.append((at, who, table))
                    continue
                recv_into(sources[slot][len(waiting)])
                waiting.append((who, head + header[id_at:id_end] + tail))
                if len(waiting) == rows:
                    ring(pack(slot, rows))
                    running.append((slot, waiting, None))
                    slot, waiting = free.pop(), []
        except again:
            pass
        try:
            while True:
                if waiting and len(running) < _AHEAD:
                    ring(pack(slot, len(waiting)))
                    running.append((slot, waiting, None))
                    slot, waiting = free.pop(), []
                heard(size)
                at, whom, asked = running.popleft()
                if asked is not None:
                    send(whom, _MORE)
                    send(bundle_header, _MORE)
                    send(asked, _MORE)  # ids, no time left to say, rows: as it came
                    send(wholes[at][1])
                else:
                    for (one, header), answer in zip(whom, targets[at], strict=False):
                        send(one, _MORE)
                        send(header, _MORE)
                        send(answer)
                free.append(at)
        except BlockingIOError:
            pass


def load(
    dealer: Any, core: ClientCore, x: Array, y: Array, in_flight: int, rows: int, seconds: float,
    pids: dict[str, int],
) -> dict[str, float]:  # fmt: skip
    """The client: messages of so many rows for so long; the first answers and the last are checked.

    Answers come in the order of their messages: there is one client and one worker.
    """
    made: list[tuple[list[Any], list[int], Array]] = []
    # One message more than are under way: a slot gets other rows each time, so no old answer is right.
    for first in range(in_flight // rows + 1):
        places = (first + np.arange(rows)) % len(x)
        requests = [core.request("model", x[place : place + 1]) for place in places]
        ((frames, _),) = core.bundle([request for request in requests if request])
        lent = [zmq.Frame(frame, copy=False) if len(frame) >= _COPY_BYTES else frame for frame in frames]
        made.append((lent, [request[0] for request in requests if request], y[places]))
    to_send, to_come, parts = itertools.cycle(made), itertools.cycle(made), len(made[0][0])
    send, recv, clock = super(zmq.Socket, dealer).send, dealer.recv, time.monotonic

    def put() -> None:
        *before, last = next(to_send)[0]
        for frame in before:
            send(frame, _MORE)
        send(last)

    def check() -> None:
        _, ids, wanted = next(to_come)
        for reply, id_, want in zip(core.receive_all(dealer.recv_multipart()), ids, wanted, strict=True):
            (got,) = reply.take_outputs().values()
            if reply.id != id_ or not np.allclose(got[0], want, _TOLERANCE, _TOLERANCE):
                sys.exit(f"a wrong answer: to {id_}, {want.tolist()}; got to {reply.id}, {got[0].tolist()}")

    def go_on(until: float) -> int:
        answered = 0
        while clock() < until:
            for _ in range(parts):
                recv()
            next(to_come)
            answered += rows
            put()
        return answered

    for _ in range(in_flight // rows):
        put()
    for _ in range(in_flight // rows):
        check()
        put()
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
    assert in_flight // rows + _AHEAD < SLOTS, "full batches, those that are not full, and the open one"
    with np.load(file, allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
    shape = Shape(rows, x[0].nbytes, y[0].nbytes)
    core = ClientCore()
    with tempfile.TemporaryDirectory(prefix="pb-") as folder:
        endpoint = f"ipc://{folder}/s"
        command = _command("serve", endpoint, backend, path, json.dumps(shape))
        with (
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as front,
            zmq.Context() as context,
            context.socket(zmq.DEALER) as dealer,
        ):
            assert front.stdout is not None
            worker, signature = json.loads(front.stdout.readline())
            pids = {"client": os.getpid(), "front": front.pid, "worker": worker}
            core.learn("model", None, {"model": "model", "version": 1, "signatures": [signature]})
            dealer.sndhwm = dealer.rcvhwm = dealer.linger = 0
            dealer.rcvtimeo = _PATIENCE_MS
            dealer.connect(endpoint)
            gc.disable()
            found = {
                name: load(dealer, core, x, y, in_flight, count, seconds, pids)
                for name, count in (("naked loop", 1), ("naked loop bundled", rows))
            }
    print(json.dumps(found))


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "bench.peers.naked", *words]


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "work":
        backend, path, shape, *fds = rest
        work(backend, path, Shape(*json.loads(shape)), *map(int, fds))
    elif what == "serve":
        endpoint, backend, path, shape = rest
        serve(endpoint, backend, path, Shape(*json.loads(shape)))
    else:
        path, file, in_flight, rows, seconds = rest
        main(what, path, file, int(in_flight), int(rows), float(seconds))
