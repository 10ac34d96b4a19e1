"""A front's end of lines that does as a test scripts it: welcomes, answers, lies, falls silent, hangs up.

It lies beside a scripted server's endpoint (`tests/scripted_server.py`), whose scripts it takes. What goes
over a line is read here, what goes through ZeroMQ there: so a test sees which way a message took.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence

from pool import packets, wire
from pool.client.route import Frame
from pool.endpoints import side_path
from pool.wire import Header, Kind
from tests.scripted_server import Answer, answer_properly, unbundle


def welcome(
    most: int = packets.REQUEST_MAX_BYTES,
    magic: bytes = packets.LINE_MAGIC,
    version: int = packets.LINE_VERSION,
) -> bytes:
    """What a front says to a hello."""
    return packets.WELCOME.pack(magic, version, most)


def cut(frames: Sequence[Frame], sizes: Sequence[int] = (packets.PACKET_MAX_BYTES,)) -> list[bytes]:
    """A message as packets of these sizes, the last of them for all that follow."""
    message = packets.make_table(frames) + b"".join(frames)
    found, i = [], 0
    while message:
        size = sizes[min(i, len(sizes) - 1)]
        found.append(message[:size])
        message = message[size:]
        i += 1
    return found


class ScriptedLines:
    """Listens beside an endpoint, in a thread of this process. Regions are refused without a word.

    Args:
        endpoint: Of the server.
        answer: What is said to requests, as a `ScriptedServer` does.
        greeting: What a hello is answered with; `b""` is the end of the connection, None nothing at all
            until `greet`.
        sizes: Of the packets that replies are cut into.

    Attributes:
        requests: Every header that came over a line.
        came: Released once per hello.
        predicted, cancelled: Released once per PREDICT and CANCEL received.
        peers: Lines that said hello and were not ended here.
    """

    def __init__(
        self,
        endpoint: str,
        answer: Answer = answer_properly,
        greeting: bytes | None = welcome(),
        sizes: Sequence[int] = (packets.PACKET_MAX_BYTES,),
    ) -> None:
        path = side_path(endpoint)
        assert path is not None
        self.answer = answer
        self.requests: list[Header] = []
        self.came = threading.Semaphore(0)
        self.predicted = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self.peers: list[socket.socket] = []
        self._greeting = greeting
        self._sizes = sizes
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="scripted-lines")
        self._thread.start()

    def _run(self) -> None:
        while True:
            watched = [self._stop_read, self._listener, *self.peers]
            ready, _, _ = select.select(watched, [], [])
            if self._stop_read in ready:
                return
            for sock in ready:
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    self._accept()
                elif sock in self.peers:
                    self._take(sock)

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        if peer.recv(100) != packets.HELLO.pack(packets.LINE_MAGIC, packets.LINE_VERSION):
            peer.close()
            return
        if self._greeting == b"":
            peer.close()
        else:
            self.peers.append(peer)
            if self._greeting is not None:
                with contextlib.suppress(OSError):  # its client may be gone again
                    peer.send(self._greeting)
        self.came.release()

    def _take(self, peer: socket.socket) -> None:
        try:
            packet = peer.recv(1 << 20)
        except OSError:
            packet = b""
        if not packet:
            self._end(peer)
            return
        first, *tensors = map(bytes, packets.split(memoryview(packet)))
        for header, payloads in unbundle(wire.decode_header(first), tensors):
            self.requests.append(header)
            for message in self.answer(header, payloads) or ():
                with contextlib.suppress(OSError):
                    for part in cut(message, self._sizes):
                        peer.send(part)
            if header.kind is Kind.PREDICT:
                self.predicted.release()
            elif header.kind is Kind.CANCEL:
                self.cancelled.release()

    def _end(self, peer: socket.socket) -> None:
        self.peers.remove(peer)
        peer.close()

    def greet(self, greeting: bytes | None = None) -> None:
        """Welcome those who said hello, now and from now on."""
        self._greeting = welcome() if greeting is None else greeting
        for peer in self.peers:
            peer.send(self._greeting)

    def say(self, parts: Sequence[bytes]) -> None:
        """Send packets over the last line."""
        for part in parts:
            self.peers[-1].send(part)

    def hang_up(self) -> None:
        """End every line, whoever else has a part of it; what was sent is still read."""
        for peer in list(self.peers):
            with contextlib.suppress(OSError):  # its client was first
                peer.shutdown(socket.SHUT_RDWR)  # the thread, which is told, closes it

    def kinds(self) -> list[Kind]:
        """The kinds of the requests that came over lines."""
        return [header.kind for header in self.requests]

    def ids(self, kind: Kind) -> list[int]:
        """The ids of those of that kind."""
        return [header.id for header in self.requests if header.kind is kind]

    def stop(self) -> None:
        """End all lines and listen no more."""
        os.write(self._stop_write, b"x")
        self._thread.join()
        for peer in list(self.peers):
            self._end(peer)
        self._listener.close()
        os.close(self._stop_read)
        os.close(self._stop_write)
        os.unlink(self._path)


@contextlib.contextmanager
def scripted_lines(
    endpoint: str,
    answer: Answer = answer_properly,
    greeting: bytes | None = welcome(),
    sizes: Sequence[int] = (packets.PACKET_MAX_BYTES,),
) -> Iterator[ScriptedLines]:
    """Scripted lines for the length of a block."""
    lines = ScriptedLines(endpoint, answer, greeting, sizes)
    try:
        yield lines
    finally:
        lines.stop()
