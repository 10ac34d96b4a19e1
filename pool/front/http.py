"""A small HTTP server for whoever watches. Runs in the front, on its event loop.

It takes GET and HEAD without a body, and tells nothing that is secret; it has no password. What is asked of
it is bounded: the size of a request, the time to send one and to take the answer, and the connections, of
which the one that has waited longest makes room for a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pool.errors import ConfigError
from pool.front.logs import Log

log = Log("pool.http")

_REQUEST_BYTES = 8_192
_CONNECTIONS = 32
# A scraper keeps its connection from one scrape to the next: every minute, mostly, or sooner.
_IDLE_S = 120.0
_REQUEST_S = 5.0  # from its first byte to its last
_ANSWER_S = 10.0  # for the client to take it

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
TEXT = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """What a page holds."""

    status: int
    body: bytes
    content_type: str = TEXT


Page = Callable[[str], Awaitable[Answer]]


class _Refused(Exception):
    """The request gets this status, and the connection is closed."""

    def __init__(self, status: int) -> None:
        self.status = status


class _Request(NamedTuple):
    method: str
    path: str
    is_kept: bool  # the connection, after it


class HttpServer:
    """Answers requests with what `page` gives for a path.

    Args:
        address: `HOST:PORT`, an IPv6 host in brackets; port `*` for any free one.
        page: Called with the path, without the query.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, address: str, page: Page) -> None:
        self.address = address
        self._page = page
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._waiting: dict[asyncio.Task[None], None] = {}  # for a request; longest first

    async def open(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be bound; the sentence says why.
        """
        host, _, port = self.address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._serve,
                None if host == "*" else host.strip("[]"),
                0 if port == "*" else int(port),
                limit=_REQUEST_BYTES,
            )
        except OSError as e:
            raise ConfigError(f"server.metrics: cannot listen at {self.address}: {e.strerror or e}") from None
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Stop; connections are cut."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "streams are served by tasks"
        self._connections[task] = writer
        if len(self._connections) > _CONNECTIONS and self._waiting:
            next(iter(self._waiting)).cancel()
        try:
            is_kept = len(self._connections) <= _CONNECTIONS + 1
            while is_kept:
                is_kept = await self._answer_one(task, reader, writer)
        except (ConnectionError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # it left, or did not read, or had to make room; nobody waits for this task
        finally:
            del self._connections[task]
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # closing would wait for a client that does not read
            else:
                writer.close()

    async def _answer_one(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer the next request; gives whether there may be another one."""
        request: _Request | None = None
        self._waiting[task] = None
        try:
            request = await _read_request(reader)
            if request is None:
                return False
        except _Refused as e:
            answer = Answer(e.status, b"")
        finally:
            del self._waiting[task]
        if request is not None:
            answer = await self._find(request)
        is_kept = request is not None and request.is_kept
        if answer.status != 200 and not answer.body:
            answer = answer._replace(body=f"{_REASONS[answer.status]}\n".encode())
        head = (
            f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\n"
            f"Content-Type: {answer.content_type}\r\n"
            f"Content-Length: {len(answer.body)}\r\n"
            f"Cache-Control: no-store\r\n"
            + ("Allow: GET, HEAD\r\n" if answer.status == 405 else "")
            + ("" if is_kept else "Connection: close\r\n")
            + "\r\n"
        )
        writer.write(
            head.encode() + (b"" if request is not None and request.method == "HEAD" else answer.body)
        )
        await asyncio.wait_for(writer.drain(), _ANSWER_S)
        return is_kept

    async def _find(self, request: _Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return Answer(405, b"")
        try:
            return await self._page(request.path)
        except Exception:
            log.defect("cannot make the page", path=request.path)
            return Answer(500, b"")


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    """The next request; None when the client has closed.

    Raises:
        _Refused: it is none, or too long, or took too long, or has a body.
    """
    first = await asyncio.wait_for(reader.read(1), _IDLE_S)
    if not first:
        return None
    try:
        rest = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise _Refused(431) from None
    except asyncio.TimeoutError:
        raise _Refused(408) from None
    lines = (first + rest).decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1") or not words[1].startswith("/"):
        raise _Refused(400)
    fields = {}
    for line in lines[1:-2]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _Refused(400)
        fields[name.lower()] = value.strip()
    # A body would have to be read before the next request: nobody who watches sends one.
    if fields.get("content-length", "0") != "0" or "transfer-encoding" in fields:
        raise _Refused(400)
    is_kept = words[2] == "HTTP/1.1" and fields.get("connection", "").lower() != "close"
    return _Request(words[0], words[1].partition("?")[0], is_kept)
