"""The front and the worker of the naked loop (`bench.peers.naked`): receive into a slot, run there, answer.

`python -m bench.peers.naked_front serve ENDPOINT LINE_FD BACKEND PATH SHAPE` starts the other with `work`.

Without admission, deadlines or checks. The worker is pinned to one core, which was no slower than leaving it
to the kernel and often faster; nobody stays awake for what may come, which cost CPU and gained nothing.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import zmq

from bench.peers.doors import Array
from pool import packets, wire
from pool.backends import BoundCall, find_backend
from pool.config import Placement
from pool.shm.arena import Arena, align, slot_bytes_for
from pool.shm.lifeline import die_with_front
from pool.signature import Signature, choose_signature
from pool.wire import HEAD, HEAD_BYTES, Flag, Kind, ResultMeta, TensorMeta

SLOTS = 8
# Batches the worker has before one that is not full joins them: with one, it would wait for the front.
AHEAD = 2

_RING = struct.Struct("<HH")  # slot, rows; the same both ways
_START = struct.Struct("<QQQ")  # of a packet: bytes, frames, bytes of the header
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
    """Say the signature, then run each batch where it lies, until nobody is left to ring."""
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
    # A front that is killed with a ring unread resets the bell: it is gone, too.
    with socket.socket(fileno=bell_fd) as bell, suppress(ConnectionError):
        bell.send(msgspec.json.encode(signature))
        gc.disable()
        while ring := bell.recv(_RING.size):
            call, y = calls[ring]
            y[...] = call()[0]
            bell.send(ring)


def serve(endpoint: str, line_fd: int, backend: str, path: str, shape: Shape) -> None:
    """Start the worker, print its process id and the signature, serve until stdin is closed.

    It serves the line for as long as that is open, then the endpoint.
    """
    die_with_front(os.dup(0))
    arena = Arena.create(SLOTS, shape.slot_bytes)
    bell, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = (arena.fd, theirs.fileno())
    words = ["work", backend, path, json.dumps(shape), *map(str, fds)]
    worker = subprocess.Popen(command(*words), pass_fds=fds, stdin=subprocess.DEVNULL)
    theirs.close()
    signature = bell.recv(_SIGNATURE_BYTES)
    (output,) = msgspec.json.decode(signature, type=Signature).outputs
    assert output.shape, "rows of a known size"
    axes = tuple(axis for axis in output.shape[1:] if axis is not None)
    meta = wire.encode_meta(ResultMeta(1, (TensorMeta(output.name, output.dtype, axes),)))
    halves = [shape.cut(slot) for slot in arena.slots]
    print(json.dumps([worker.pid, json.loads(signature)]), flush=True)
    gc.disable()
    bell.setblocking(False)
    with socket.socket(fileno=line_fd) as line:
        _turn_line(line, bell, shape.rows, halves, meta)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm = router.rcvhwm = 0
        router.bind(endpoint)
        _turn(router, bell, shape.rows, halves, meta)


def _turn_line(
    line: socket.socket, bell: socket.socket, rows: int, halves: list[tuple[Array, Array]], meta: bytes
) -> None:
    widen(line)
    line.setblocking(False)
    ring, heard, pack, size = bell.send, bell.recv, _RING.pack, _RING.size
    recv, send = line.recvmsg_into, line.sendmsg
    wholes = [(source.data, target.data) for source, target in halves]
    sources = [[row.data for row in source.reshape(rows, -1)] for source, _ in halves]
    targets = [[row.data for row in target.reshape(rows, -1)] for _, target in halves]
    header = HEAD.pack(wire.head(Kind.RESULT), 0, 0, 1) + meta
    alone = packets.make_table([header, targets[0][0]]) + header[:HEAD_BYTES]
    tail = header[HEAD_BYTES + 8 :]
    header = HEAD.pack(wire.head(Kind.RESULT, Flag.BUNDLE), 0, 0, rows) + meta
    bundle = packets.make_table([header, bytes(wire.PART.size * rows), wholes[0][1]]) + header
    free = list(range(len(halves)))
    slot = free.pop()  # the open one
    waiting: list[bytearray] = []  # ids of its requests
    running: deque[tuple[int, Any]] = deque()  # slot, and ids of requests or a bundle's table
    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(bell, select.POLLIN)
    while True:
        poll.poll()
        if not running and not waiting:  # messages may have another form now
            start = line.recv(_START.size, socket.MSG_PEEK)
            if not start:
                return
            _, frames, header_bytes = _START.unpack(start)
            is_bundle = frames > 2
            ahead = 16 + 8 * frames + header_bytes + (wire.PART.size * rows if is_bundle else 0)
            front = bytearray(ahead)
            id_at = 16 + 8 * frames + HEAD_BYTES
            parts_at = ahead - wire.PART.size * rows
        try:
            while True:
                if is_bundle:
                    at = free[-1]
                    recv((front, wholes[at][0]))
                    ring(pack(free.pop(), rows))
                    running.append((at, front[parts_at:]))
                    continue
                recv((front, sources[slot][len(waiting)]))
                waiting.append(front[id_at : id_at + 8])
                if len(waiting) == rows:
                    ring(pack(slot, rows))
                    running.append((slot, waiting))
                    slot, waiting = free.pop(), []
        except BlockingIOError:
            pass
        try:
            while True:
                if waiting and len(running) < AHEAD:
                    ring(pack(slot, len(waiting)))
                    running.append((slot, waiting))
                    slot, waiting = free.pop(), []
                heard(size)
                at, asked = running.popleft()
                if is_bundle:
                    send((bundle, asked, wholes[at][1]))
                else:
                    for id_, answer in zip(asked, targets[at], strict=False):
                        send((alone, id_, tail, answer))
                free.append(at)
        except BlockingIOError:
            pass


def widen(line: socket.socket) -> None:
    """Give a line room for a bundle, as pool does."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, packets.REQUEST_MAX_BYTES)


def _turn(
    router: Any, bell: socket.socket, rows: int, halves: list[tuple[Array, Array]], meta: bytes
) -> None:
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
                if waiting and len(running) < AHEAD:
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


def command(*words: str) -> list[str]:
    """To start one of the two."""
    return [sys.executable, "-m", "bench.peers.naked_front", *words]


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "work":
        backend, path, shape, *fds = rest
        work(backend, path, Shape(*json.loads(shape)), *map(int, fds))
    else:
        endpoint, line, backend, path, shape = rest
        serve(endpoint, int(line), backend, path, Shape(*json.loads(shape)))
