"""Requests that never stop, each noted: what a server's clients see while it loses a worker.

`python -m bench.peers.steady FILE` with a JSON document in FILE (see `Orders`); writes to its log
a line for each request: when it ended (monotonic), 1 if well, and how long it took, in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np

from pool import AsyncClient, PoolError

# A request without an answer for so long is lost.
PATIENCE_S = 10.0
# Between a failed request and the next of the same client: a refused connection is no load test.
_PAUSE_S = 0.02

Ask = Callable[[], Awaitable[None]]


class Orders(msgspec.Struct):
    """What to do.

    Attributes:
        protocol: `http`, `grpc` or `pool`.
        endpoint: `host:port`, or pool's.
        path: Of the URL, or of the gRPC method.
        headers: Of HTTP requests.
        body: File of the request's body; for pool a `.npy` of one row with its row axis.
        clients: Each has one request under way.
        seconds: How long.
        log: File to write.
    """

    protocol: str
    endpoint: str
    path: str
    headers: dict[str, str]
    body: str
    clients: int
    seconds: float
    log: str


class Refused(Exception):
    """An answer that is none."""


async def main(orders: Orders) -> None:
    lines: list[str] = []
    until = time.monotonic() + orders.seconds
    async with contextlib.AsyncExitStack() as stack:
        asks = [await _asking(orders, stack) for _ in range(orders.clients)]
        await asyncio.gather(*(_go_on(ask, until, lines) for ask in asks))
    Path(orders.log).write_text("".join(lines))


async def _go_on(ask: Ask, until: float, lines: list[str]) -> None:
    while (began := time.monotonic()) < until:
        is_well = True
        try:
            await asyncio.wait_for(ask(), PATIENCE_S)
        except (Refused, OSError, EOFError, ValueError, PoolError, asyncio.TimeoutError):
            is_well = False
        ended = time.monotonic()
        lines.append(f"{ended} {int(is_well)} {ended - began}\n")
        if not is_well:
            await asyncio.sleep(_PAUSE_S)


async def _asking(orders: Orders, stack: contextlib.AsyncExitStack) -> Ask:
    if orders.protocol == "pool":
        client = await stack.enter_async_context(AsyncClient(orders.endpoint, timeout=PATIENCE_S))
        row = np.load(orders.body, allow_pickle=False)

        async def ask() -> None:
            await client.predict("model", row)

        return ask
    body = Path(orders.body).read_bytes()
    if orders.protocol == "grpc":
        return _grpc(orders, body, stack)
    return Http(orders, body).ask


class Http:
    """A client with one connection, which it opens anew after a failure."""

    def __init__(self, orders: Orders, body: bytes) -> None:
        self._host, _, port = orders.endpoint.partition(":")
        self._port = int(port)
        lines = [f"POST {orders.path} HTTP/1.1", f"Host: {orders.endpoint}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in orders.headers.items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> None:
        """One request.

        Raises:
            Refused · OSError · EOFError · ValueError: it was not answered well.
        """
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host, self._port)
            reader, writer = self._streams
            writer.write(self._request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status, *headers = head.split("\r\n")
            length = next(int(h.split(":")[1]) for h in headers if h.startswith("content-length:"))
            await reader.readexactly(length)
            if " 200 " not in f"{status} ":
                raise Refused(status)
        except StopIteration:
            self._close()
            raise Refused("an answer without a length") from None
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def _grpc(orders: Orders, body: bytes, stack: contextlib.AsyncExitStack) -> Ask:
    import grpc

    limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    channel = grpc.aio.insecure_channel(orders.endpoint, limits)
    stack.push_async_callback(channel.close)
    call = channel.unary_unary(orders.path)

    async def ask() -> None:
        try:
            await call(body, timeout=PATIENCE_S)
        except grpc.RpcError as e:
            raise Refused(str(e)) from None

    return ask


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Orders)))
