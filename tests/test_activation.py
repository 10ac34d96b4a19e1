"""Sockets handed over by a service manager: found, matched with endpoints, and served."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

import pytest
import zmq

from pool.config import ServerConfig
from pool.errors import ConfigError
from pool.front.activation import PassedSocket, assign, take_sockets
from pool.front.binding import bind


@contextlib.contextmanager
def listening(*addresses):
    """Sockets at consecutive descriptors, and the environment that tells of them."""
    made = []
    for address in addresses:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if isinstance(address, tuple) and ":" in address[0]:
            family = socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.bind(address)
        sock.listen()
        made.append(sock)
    first = 400  # where nothing else is
    for i, sock in enumerate(made):
        os.dup2(sock.fileno(), first + i)
    names = ":".join(f"s{i}" for i in range(len(made)))
    environment = {"LISTEN_FDS": str(len(made)), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names}
    try:
        yield first, environment, made
    finally:
        for i, sock in enumerate(made):
            sock.close()
            with contextlib.suppress(OSError):
                os.close(first + i)


def test_sockets_are_told_by_their_addresses(tmp_path):
    path = f"{tmp_path}/a.sock"
    with listening(path, ("127.0.0.1", 0), ("::1", 0)) as (first, environment, made):
        found = take_sockets(environment, first)
        assert environment == {}
        ports = [sock.getsockname()[1] for sock in made[1:]]
        assert found == [
            PassedSocket(first, "s0", f"ipc://{path}"),
            PassedSocket(first + 1, "s1", f"tcp://127.0.0.1:{ports[0]}"),
            PassedSocket(first + 2, "s2", f"tcp://[::1]:{ports[1]}"),
        ]
        for passed in found:
            assert not os.get_inheritable(passed.fd)
            assert not os.get_blocking(passed.fd)


@pytest.mark.parametrize("environment", [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x"}])
def test_what_is_for_nobody_or_another_process_is_left_and_forgotten(environment):
    assert take_sockets(environment) == []
    assert environment == {}


def test_what_cannot_be_served_is_told(tmp_path):
    pid = str(os.getpid())
    with pytest.raises(ConfigError, match=r"LISTEN_FDS 'many'"):
        take_sockets({"LISTEN_FDS": "many", "LISTEN_PID": pid})
    with pytest.raises(ConfigError, match=r"'' \(descriptor 4000\).*Bad file descriptor"):
        take_sockets({"LISTEN_FDS": "1", "LISTEN_PID": pid}, 4000)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{tmp_path}/d")
        with pytest.raises(ConfigError, match=r"'d' .*wanted a listening stream socket"):
            take_sockets({"LISTEN_FDS": "1", "LISTEN_PID": pid, "LISTEN_FDNAMES": "d"}, sock.fileno())


def test_each_socket_finds_its_endpoint(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    sockets = [
        PassedSocket(3, "file", f"ipc://{tmp_path}/real/pool.sock"),
        PassedSocket(4, "one", "tcp://127.0.0.1:9000"),
        PassedSocket(5, "all", "tcp://0.0.0.0:9001"),
        PassedSocket(6, "six", "tcp://[::1]:9002"),
    ]
    endpoints = [
        "tcp://*:9001",
        "tcp://[0:0::1]:9002",
        f"ipc://{tmp_path}/link/pool.sock",
        "tcp://localhost:9000",
        "tcp://127.0.0.1:9003",
    ]
    assert assign(sockets, endpoints) == dict(zip(endpoints, (5, 6, 3, 4), strict=False))


def test_without_endpoints_those_of_the_sockets_are_served():
    assert assign([PassedSocket(3, "a", "tcp://127.0.0.1:1")], ()) == {"tcp://127.0.0.1:1": 3}
    assert assign([], ()) == {}


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:9001",
        "tcp://127.0.0.2:9000",
        "tcp://*:9000",
        "ipc:///run/x",
        "tcp://no.such.invalid:9000",
    ],
)
def test_a_socket_at_no_endpoint_is_an_error(endpoint):
    with pytest.raises(
        ConfigError, match=r"'pool@x.socket' .* at tcp://127.0.0.1:9000; wanted one of .*" + "tcp|ipc"
    ):
        assign([PassedSocket(3, "pool@x.socket", "tcp://127.0.0.1:9000")], [endpoint])


def test_two_sockets_at_one_endpoint_are_an_error():
    twice = [PassedSocket(3, "a", "tcp://127.0.0.1:9000"), PassedSocket(4, "b", "tcp://127.0.0.1:9000")]
    with pytest.raises(ConfigError, match="'b'"):
        assign(twice, ["tcp://127.0.0.1:9000"])


# -- served -----------------------------------------------------------------------------------------


def echo_once(router, endpoint):
    """A request there and back; the client connects before the server looks."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.connect(endpoint)
        dealer.send(b"hello")
        assert router.poll(5000)
        router.send_multipart(router.recv_multipart())
        assert dealer.poll(5000)
        assert dealer.recv() == b"hello"
    finally:
        dealer.close(0)
        context.term()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_passed_socket_outlives_its_server(tmp_path, kind):
    path = tmp_path / "pool.sock"
    with listening(str(path) if kind == "ipc" else ("127.0.0.1", 0)) as (first, environment, _):
        (passed,) = take_sockets(environment, first)
        if kind == "ipc":
            path.chmod(0o604)
        for _ in range(2):  # the manager hands the same socket to one server after the other
            context = zmq.Context()
            router = context.socket(zmq.ROUTER)
            fd = os.dup(passed.fd)
            bind(router, passed.endpoint, ServerConfig(), fd)
            other = tmp_path / "other.sock"
            bind(router, f"ipc://{other}", ServerConfig(ipc_mode="0640"))
            assert stat.S_IMODE(other.stat().st_mode) == 0o640, "the next endpoint is bound as usual"
            echo_once(router, passed.endpoint)
            echo_once(router, f"ipc://{other}")
            router.close(0)
            context.term()
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)
            other.unlink()
            if kind == "ipc":
                assert path.is_socket()
                assert stat.S_IMODE(path.stat().st_mode) == 0o604, "the manager's, as it was"
