"""A DEALER, or a line, that sends any frames: how tests speak to a real server when a client would not do."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import zmq

from pool import packets, wire
from pool.endpoints import side_path
from pool.errors import PoolError
from pool.wire import Flag, Header, Kind, PredictMeta, TensorMeta

ANSWER_TIMEOUT_MS = 60_000
ROW_ITEMS = 4  # of the drill model

ids = itertools.count(1 << 40)

Frame = bytes | memoryview
Answer = PoolError | dict[str, Any] | list[bytes]  # an ERROR's, an INFO's, a RESULT's


class Raw:
    """One connection.

    Args:
        endpoint: Of the server.
        options: Of the socket, set before it connects.

    Attributes:
        socket: The DEALER.
    """

    def __init__(self, endpoint: str, **options: Any) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = ANSWER_TIMEOUT_MS
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.connect(endpoint)

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, frames: Sequence[Frame]) -> int:
        """Send a message and give its id."""
        self.send_frames(frames)
        return wire.decode_header(bytes(frames[0])).id

    def send_frames(self, frames: Sequence[Frame]) -> None:
        """Send a message, whatever it is."""
        self.socket.send_multipart(frames)

    def receive_frames(self) -> list[bytes]:
        """The next message."""
        return self.socket.recv_multipart()

    def send_kind(self, kind: Kind, id_: int | None = None) -> int:
        """Send a message that is a header only; gives its id."""
        return self.send([wire.encode_header(Header(kind, next(ids) if id_ is None else id_, b""))])

    def receive(self) -> list[tuple[int, Answer]]:
        """The next message: whose replies it holds, in order."""
        header, *rest = self.receive_frames()
        decoded = wire.decode_header(header)
        if decoded.kind is Kind.INFO:
            return [(decoded.id, wire.decode_info(decoded.meta))]
        parts = [(decoded.id, 0, decoded.rows)]
        if decoded.flags & Flag.BUNDLE:
            table, *rest = rest
            parts = list(zip(*wire.split_parts(table, decoded.rows), strict=True))
        if decoded.kind is Kind.ERROR:
            assert not rest
            return [(id_, wire.decode_error(decoded)) for id_, _, _ in parts]
        assert decoded.kind is Kind.RESULT
        replies: list[tuple[int, Answer]] = []
        start = 0
        for id_, _, rows in parts:
            end = start + rows
            per_row = [len(frame) // max(1, decoded.rows) for frame in rest]
            replies.append(
                (id_, [frame[start * n : end * n] for frame, n in zip(rest, per_row, strict=True)])
            )
            start = end
        return replies

    def collect(self, count: int) -> dict[int, Answer]:
        """The next `count` replies, by id; each id once, in the order of their coming."""
        found: dict[int, Answer] = {}
        while len(found) < count:
            for id_, answer in self.receive():
                assert id_ not in found, "answered twice"
                found[id_] = answer
        assert len(found) == count
        return found

    def question(self, kind: Kind) -> dict[str, Any]:
        """Ask, and give the document: nothing else may be answered meanwhile."""
        id_ = self.send_kind(kind)
        (found,) = self.collect(1).items()
        assert found[0] == id_, found
        assert isinstance(found[1], dict)
        return found[1]


class RawLine(Raw):
    """A line (`docs/wire.md` 8).

    Args:
        endpoint: Of the server.

    Attributes:
        socket: The Unix socket.
        greeting: What the hello was answered with; empty if with the end.
    """

    def __init__(self, endpoint: str) -> None:
        path = side_path(endpoint)
        assert path is not None
        self.socket: Any = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.socket.settimeout(ANSWER_TIMEOUT_MS / 1000)
        self.socket.connect(path)
        self.greeting = b""
        with contextlib.suppress(ConnectionError):  # it is ended at once
            self.socket.send(packets.HELLO.pack(packets.LINE_MAGIC, packets.LINE_VERSION))
            self.greeting = self.socket.recv(1 << 16)

    def close(self) -> None:
        self.socket.close()

    def send_frames(self, frames: Sequence[Frame]) -> None:
        self.socket.sendmsg([packets.make_table(frames), *frames])

    def receive_frames(self) -> list[bytes]:
        """The next message; raises ConnectionError at the end of the line."""
        message = self._receive_packet()
        total = packets.message_bytes(memoryview(message))
        while len(message) < total:
            assert len(message) % packets.PACKET_MAX_BYTES == 0, "only the last packet is shorter"
            message += self._receive_packet()
        return [bytes(frame) for frame in packets.split(memoryview(message))]

    def _receive_packet(self) -> bytes:
        packet: bytes = self.socket.recv(1 << 20)
        if not packet:
            raise ConnectionError("the line has ended")
        assert len(packet) <= packets.PACKET_MAX_BYTES
        return packet

    def has_message(self) -> bool:
        """Whether something is there to be read, or its end."""
        return bool(select.select([self.socket], [], [], 0)[0])


def drill_meta(model: str, row_items: int = ROW_ITEMS, outputs: tuple[str, ...] | None = None) -> bytes:
    """The meta of requests to a drill model."""
    inputs = (
        TensorMeta("x", "float32", (row_items,)),
        TensorMeta("fault", "int32", ()),
        TensorMeta("argument", "float32", ()),
    )
    return wire.encode_meta(PredictMeta(model, None, None, inputs, outputs))


def drill_tensors(rows: int, row_items: int = ROW_ITEMS, value: float = 0.0) -> list[bytes]:
    """Rows that ask for no fault."""
    return [np.full((rows, row_items), value, np.float32).tobytes(), bytes(4 * rows), bytes(4 * rows)]


def drill(model: str, rows: int = 1, priority: int | None = None, **fields: Any) -> list[bytes]:
    """A request to a drill model."""
    flags = 0 if priority is None else Flag.PRIORITY
    header = Header(
        Kind.PREDICT, next(ids), drill_meta(model), rows=rows, priority=priority or 0, flags=flags, **fields
    )
    return [wire.encode_header(header), *drill_tensors(rows)]


def drill_bundle(
    model: str, parts: Sequence[tuple[int, int, int]], priority: int | None = None
) -> list[bytes]:
    """A bundle of (id, millis, rows) for a drill model."""
    rows = sum(part[2] for part in parts)
    flags = Flag.BUNDLE if priority is None else Flag.BUNDLE | Flag.PRIORITY
    header = Header(Kind.PREDICT, 0, drill_meta(model), rows=rows, priority=priority or 0, flags=flags)
    table = b"".join(wire.PART.pack(*part) for part in parts)
    return [wire.encode_header(header), table, *drill_tensors(rows)]


def await_that(condition: Callable[[], Any]) -> None:
    """Wait until it holds; it asks the server, which takes its time."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"


def await_room(raw: Raw, model: str, rows: int) -> None:
    """Wait until so many rows of a drill model are free."""

    def is_answered() -> bool:
        id_ = raw.send(drill(model, rows))
        return isinstance(raw.collect(1)[id_], list)

    await_that(is_answered)


def anonymous_bytes(pid: int) -> int:
    """Memory that is the process's alone, whatever it mapped of memory shared."""
    with open(f"/proc/{pid}/status") as status:
        (line,) = (line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def bound(endpoint: str, permissions: int = 0o600) -> Iterator[None]:
    """A socket file as an endpoint has one."""
    path = endpoint.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        os.chmod(path, permissions)
        try:
            yield
        finally:
            os.unlink(path)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """This process gets no new file descriptor."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
