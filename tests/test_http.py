"""The HTTP server for whoever watches, spoken to by hand."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pool.errors import ConfigError
from pool.front import http
from pool.front.http import Answer, HttpServer

BODY = b"x" * 1000


async def page(path):
    if path == "/boom":
        raise RuntimeError("boom")
    return Answer(200, BODY) if path == "/page" else Answer(404, b"")


def with_server(scenario, serve=page):
    """Run a scenario, which is given the server's port."""

    async def main():
        server = HttpServer("127.0.0.1:*", serve)
        await server.open()
        try:
            return await scenario(int(server.address.rpartition(":")[2]))
        finally:
            await server.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, "connections left behind"

    return asyncio.run(main())


async def read_answer(reader, method="GET"):
    """Status, fields and body of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines if line)
    length = 0 if method == "HEAD" else int(fields["content-length"])
    return int(first.split()[1]), fields, await reader.readexactly(length)


async def ask(port, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        answer = await read_answer(reader, request.split(b" ")[0].decode("latin-1"))
        return answer, await is_closed(reader) if answer[1].get("connection") == "close" else False
    finally:
        writer.close()


async def is_closed(reader):
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    return True


def get(path, version="1.1", fields="", method="GET"):
    return f"{method} {path} HTTP/{version}\r\nHost: h\r\n{fields}\r\n".encode()


def test_a_page_and_its_head():
    async def scenario(port):
        (status, fields, body), is_over = await ask(port, get("/page?a=b"))
        assert (status, body, is_over) == (200, BODY, False)
        assert fields["content-type"] == "text/plain; charset=utf-8"
        (status, fields, body), _ = await ask(port, get("/page", method="HEAD"))
        assert (status, body, fields["content-length"]) == (200, b"", "1000")

    with_server(scenario)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/nowhere"), 404),
        (get("/page", method="POST"), 405),
        (get("/boom"), 500),
        (get("page"), 400),
        (get("/page", version="2.0"), 400),
        (b"GET /page\r\n\r\n", 400),
        (b" \r\n\r\n", 400),
        (get("/page", fields="Content-Length: 3\r\n"), 400),
        (get("/page", fields="Transfer-Encoding: chunked\r\n"), 400),
        (get("/page", fields="no colon\r\n"), 400),
        (get("/page", fields="Bad : space\r\n"), 400),
        (get("/page", fields=f"A: {'a' * 10_000}\r\n"), 431),
        (b"\xff\x00\xfe\r\n\r\n", 400),
    ],
)
def test_what_is_refused(request_, status):
    async def scenario(port):
        (got, fields, body), _ = await ask(port, request_)
        assert got == status
        assert body
        assert status != 405 or fields["allow"] == "get, head"

    with_server(scenario)


def test_a_connection_serves_one_request_after_the_other_until_told():
    async def scenario(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            get("/page") + get("/nowhere") + get("/page", fields="Connection: close\r\n") + get("/page")
        )
        assert [(await read_answer(reader))[0] for _ in range(3)] == [200, 404, 200]
        assert await is_closed(reader)
        writer.close()
        assert (await ask(port, get("/page", version="1.0")))[1]

    with_server(scenario)


def test_whoever_says_nothing_makes_room_for_others():
    async def scenario(port):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(http._CONNECTIONS)]
        for _ in range(3):
            assert (await ask(port, get("/page")))[0][0] == 200
        # The one that had waited longest went first.
        assert await is_closed(silent[0][0])
        silent[-1][1].write(get("/page"))
        assert (await read_answer(silent[-1][0]))[0] == 200
        for _, writer in silent:
            writer.close()

    with_server(scenario)


def test_a_request_that_dribbles_in_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "_REQUEST_S", 0.05)

    async def scenario(port):
        (status, _, _), is_over = await ask(port, b"GET /page HTTP/1.1\r\nHo")
        assert (status, is_over) == (408, True)

    with_server(scenario)


def test_silence_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "_IDLE_S", 0.05)

    async def scenario(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await is_closed(reader)
        writer.close()

    with_server(scenario)


def test_an_answer_that_nobody_takes_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "_ANSWER_S", 0.05)
    size = 64 << 20

    async def large(path):
        return Answer(200, bytes(size if path == "/large" else 1))

    async def main():
        server = HttpServer("127.0.0.1:*", large)
        await server.open()
        port = int(server.address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(get("/large"))
        # Others are answered meanwhile.
        assert (await ask(port, get("/page")))[0][0] == 200
        while server._connections:
            await asyncio.sleep(0.01)
        got = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                got += len(data)
        assert got < size
        writer.close()
        await server.close()

    asyncio.run(main())


def test_an_address_in_use_is_told():
    async def scenario(port):
        with pytest.raises(ConfigError, match=rf"^server.metrics: cannot listen at 127.0.0.1:{port}: "):
            await HttpServer(f"127.0.0.1:{port}", page).open()

    with_server(scenario)
