"""The sockets beside the endpoints': who is let in, for what, and the files they have."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from pool import wire
from pool.endpoints import side_path
from pool.errors import Unavailable
from pool.front import doorway
from pool.front.doorway import Doorway
from tests.raw import bound


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="pool-") as made:
        yield Path(made)


class Host:
    """Takes in whoever comes, or refuses."""

    def __init__(self, refusal=None):
        self.refusal = refusal
        self.taken = []

    def take(self, visitor, data, fds):
        if self.refusal is not None:
            raise self.refusal
        self.taken.append((data, len(fds), visitor.pid, visitor.uid))
        visitor.sock.send(b"in")
        visitor.sock.close()


async def say(path, data, fds=()):
    """Knock, and give what is answered: bytes, or the error."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, path)
        socket.send_fds(sock, [data], list(fds))
        answer = await asyncio.wait_for(loop.sock_recv(sock, 65_536), 10)
        if answer in (b"", b"in"):
            return answer
        assert await loop.sock_recv(sock, 1) == b"", "closed"
        return wire.decode_error(wire.decode_header(answer))


def opened(folder, go, hosts, is_allowed=lambda _: True):
    """Run a coroutine function with the path of a doorway; nothing may be left of it."""

    async def inside():
        endpoint = f"ipc://{folder}/s"
        door = Doorway(hosts, is_allowed)
        with bound(endpoint):
            door.listen(endpoint)
        try:
            await go(side_path(endpoint))
        finally:
            door.close()
        assert os.listdir(folder) == []

    files = set(os.listdir("/proc/self/fd"))
    asyncio.run(inside())
    assert set(os.listdir("/proc/self/fd")) == files


def test_the_first_four_bytes_say_where_to(folder):
    one, other = Host(), Host()

    async def go(path):
        assert await say(path, b"aaaa") == b"in"
        assert await say(path, b"bbbb and more", [0, 1]) == b"in"
        assert "b'cccc'; wanted one of [b'aaaa', b'bbbb']" in (await say(path, b"cccc")).message
        assert "b'a'; wanted" in (await say(path, b"a")).message

    opened(folder, go, {b"aaaa": one.take, b"bbbb": other.take})
    assert one.taken == [(b"aaaa", 0, os.getpid(), os.getuid())]
    assert other.taken == [(b"bbbb and more", 2, os.getpid(), os.getuid())]


def test_who_is_refused_hears_why(folder):
    async def go(path):
        refused = await say(path, b"aaaa", [0])
        assert isinstance(refused, Unavailable)
        assert refused.message == "no room"

    opened(folder, go, {b"aaaa": Host(Unavailable("no room")).take})


def test_who_may_not_come_in_hears_nothing(folder):
    host = Host()

    async def go(path):
        answer = b""
        with contextlib.suppress(ConnectionError):  # it was closed before the packet
            answer = await say(path, b"aaaa")
        assert answer == b""

    opened(folder, go, {b"aaaa": host.take}, is_allowed=lambda _: False)
    assert not host.taken


def test_those_who_say_nothing_are_so_many_and_no_more(folder, monkeypatch):
    monkeypatch.setattr(doorway, "_VISITORS_MAX", 3)

    async def go(path):
        loop = asyncio.get_running_loop()
        silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
        for sock in silent:
            sock.setblocking(False)
            await loop.sock_connect(sock, path)
        assert await asyncio.wait_for(loop.sock_recv(silent[3], 1), 10) == b"", "one too many"
        silent.pop(0).close()  # one leaves
        while True:
            try:
                if await say(path, b"aaaa") == b"in":
                    break
            except ConnectionError:
                pass
        for sock in silent:
            sock.close()

    opened(folder, go, {b"aaaa": Host().take})


def test_where_descriptors_are_short_nobody_takes_one_who_can_do_without(folder):
    host = Host()
    short = []

    async def inside():
        endpoint = f"ipc://{folder}/s"
        door = Doorway({b"aaaa": host.take}, has_room=lambda fd: fd >= 0 and not short)
        with bound(endpoint):
            door.listen(endpoint)
        assert await say(side_path(endpoint), b"aaaa") == b"in"
        short.append(True)
        with contextlib.suppress(ConnectionError):
            assert await say(side_path(endpoint), b"aaaa") == b""
        door.close()

    asyncio.run(inside())
    assert len(host.taken) == 1


def test_without_descriptors_nobody_is_let_in_until_there_are_some(folder, monkeypatch):
    monkeypatch.setattr(doorway, "_PAUSE_S", 0.02)

    async def go(path):
        loop = asyncio.get_running_loop()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
            try:
                sock.connect(path)
                await asyncio.sleep(0.05)  # some pauses pass
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            sock.send(b"aaaa")
            assert await asyncio.wait_for(loop.sock_recv(sock, 16), 10) == b"in"

    opened(folder, go, {b"aaaa": Host().take})


# -- the socket file -----------------------------------------------------------------------------------


def listening(endpoint, permissions=0o660):
    """The mode and the owner of the file while somebody listens; None if there is no such socket."""

    async def go():
        made = Doorway({})
        try:
            with bound(endpoint, permissions):
                made.listen(endpoint)
            found = os.stat(side_path(endpoint))
            if not stat.S_ISSOCK(found.st_mode):
                return None
            return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
        except FileNotFoundError:
            return None
        finally:
            made.close()

    return asyncio.run(go())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_the_file_has_the_endpoints_permissions_and_owner(folder, mode):
    assert listening(f"ipc://{folder}/s", mode) == (mode, os.geteuid(), os.getegid())
    assert not os.listdir(folder)


def test_a_file_that_a_dead_server_left_is_replaced(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(f"{folder}/s.fd")
    assert listening(f"ipc://{folder}/s")
    assert not os.listdir(folder)


def test_a_file_that_is_no_socket_is_left_alone_and_clients_do_without(folder, caplog):
    (folder / "s.fd").write_text("precious")
    assert listening(f"ipc://{folder}/s") is None
    assert (folder / "s.fd").read_text() == "precious"
    (record,) = caplog.records
    assert (record.message, record.fields["path"]) == ("local clients go through ZeroMQ", f"{folder}/s.fd")
    assert record.fields["reason"] == "a file that is not a socket is there"


def test_a_folder_where_no_file_can_be_made_means_that_clients_do_without(folder, caplog):
    (folder / "s.fd").mkdir()
    assert listening(f"ipc://{folder}/s") is None
    assert "go through ZeroMQ" in caplog.text


def test_an_endpoint_whose_path_has_no_room_for_a_suffix_goes_without(folder):
    path = f"{folder}/".ljust(105, "x")
    endpoint = f"ipc://{path}"

    async def go():
        made = Doorway({})
        made.listen(endpoint)
        made.close()

    asyncio.run(go())
    assert side_path(endpoint) is None
    assert side_path(endpoint[:-1]) == f"{path[:-1]}.fd"
    assert side_path("tcp://127.0.0.1:5600") is None
    assert not os.listdir(folder)
