"""Binding real sockets to real addresses."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest
import zmq

from pool.config import ServerConfig
from pool.errors import ConfigError
from pool.front.binding import bind, listen_shared, remove_stale


@pytest.fixture
def router():
    context = zmq.Context()
    made = context.socket(zmq.ROUTER)
    yield made
    made.close(0)
    context.term()


def test_the_directory_and_the_socket_are_made_for_owner_and_group(router, tmp_path):
    path = tmp_path / "run" / "pool" / "pool.sock"
    bind(router, f"ipc://{path}", ServerConfig(ipc_mode="0640"))
    assert path.is_socket()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o027 == 0


def test_tcp_has_no_file_to_remove(router):
    bind(router, "tcp://127.0.0.1:*", ServerConfig())


def test_a_socket_file_nobody_listens_on_is_replaced(router, tmp_path):
    path = tmp_path / "pool.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    bind(router, f"ipc://{path}", ServerConfig())
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


def test_a_server_that_listens_is_left_alone(router, tmp_path):
    path = tmp_path / "pool.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match=f"endpoint ipc://{path}: another server is listening there"):
            bind(router, f"ipc://{path}", ServerConfig())
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_not_a_socket_is_left_alone(router, tmp_path, kind):
    path = tmp_path / "pool.sock"
    path.write_text("precious") if kind == "file" else path.mkdir()
    with pytest.raises(ConfigError, match="a file that is not a socket is there"):
        bind(router, f"ipc://{path}", ServerConfig())
    assert path.exists()


def test_a_directory_that_cannot_be_made_is_a_mistake_of_the_config(router, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"endpoint ipc://.*: Not a directory"):
        bind(router, f"ipc://{tmp_path}/file/run/pool.sock", ServerConfig())


def test_a_port_in_use_is_a_mistake_of_the_config(router):
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"endpoint {endpoint}: cannot bind: Address already in use"):
            bind(router, endpoint, ServerConfig())


def test_no_descriptor_is_left_by_a_refusal(router, tmp_path):
    path = Path(tmp_path / "pool.sock")
    path.write_text("")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError):
        bind(router, f"ipc://{path}", ServerConfig())
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_directory_of_somebody_else_in_a_place_for_all_is_not_trusted(router, tmp_path):
    tmp_path.chmod(0o1777)  # as /tmp is
    theirs = tmp_path / "pool"
    theirs.mkdir()
    try:
        os.chown(theirs, 12345, -1)
    except PermissionError:
        pytest.skip("only root can give a directory away")
    with pytest.raises(ConfigError, match=r"belongs to user 12345; wanted \d+, who serves"):
        bind(router, f"ipc://{theirs}/pool.sock", ServerConfig())


def test_a_socket_file_is_given_to_a_group_with_the_directory_made_for_it(router, tmp_path):
    gid = 4711 if os.geteuid() == 0 else os.getgid()
    config = ServerConfig(ipc_group=str(gid), ipc_mode="0620")
    path = tmp_path / "run" / "pool.sock"
    there = tmp_path / "pool.sock"
    before = tmp_path.stat().st_gid
    bind(router, f"ipc://{path}", config)
    bind(router, f"ipc://{there}", config)
    assert [each.stat().st_gid for each in (path, path.parent, there)] == [gid] * 3
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, there)] == [0o620] * 2
    assert tmp_path.stat().st_gid == before, "a directory of somebody else's"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has somebody to become")
def test_a_group_the_server_is_not_in_is_a_mistake_of_the_config(router):
    with tempfile.TemporaryDirectory(prefix="pool-binding-") as directory:
        os.chown(directory, 65534, -1)
        os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=r"cannot give .*pool.sock to group 4711 \(ipc_group\)"):
                bind(router, f"ipc://{directory}/pool.sock", ServerConfig(ipc_group="4711"))
        finally:
            os.seteuid(0)


def test_ipv6_is_served_where_it_is_named(router):
    bind(router, "tcp://[::1]:*", ServerConfig())
    assert router.last_endpoint.startswith(b"tcp://[::1]:")
    bind(router, "tcp://127.0.0.1:*", ServerConfig())
    assert router.last_endpoint.startswith(b"tcp://127.0.0.1:")


def test_fronts_listen_at_one_port_and_no_other_server_does():
    first = listen_shared("tcp://127.0.0.1:*", is_first=True)
    with socket.socket(fileno=first) as lead:
        host, port = lead.getsockname()
        endpoint = f"tcp://{host}:{port}"
        with socket.socket(fileno=listen_shared(endpoint, is_first=False)) as other:
            met = set()
            for sock in (lead, other):
                assert sock.getsockname() == (host, port)
                assert not sock.getblocking() or not os.get_blocking(sock.fileno())
            with contextlib.ExitStack() as stack:
                while len(met) < 2:  # the kernel chooses by the client's port
                    stack.enter_context(socket.create_connection((host, port), timeout=10))
                    for sock in (lead, other):
                        with contextlib.suppress(BlockingIOError):
                            sock.accept()[0].close()
                            met.add(sock)
        with pytest.raises(ConfigError, match="Address already in use"):
            listen_shared(endpoint, is_first=True)


@pytest.mark.parametrize("endpoint", ["tcp://*:*", "tcp://[::1]:*", "tcp://localhost:*"])
def test_what_is_shared_is_bound_by_any_address(endpoint):
    with socket.socket(fileno=listen_shared(endpoint, is_first=True)) as listener:
        assert listener.getsockname()[1] > 0


def test_a_name_that_is_no_address_cannot_be_shared():
    with pytest.raises(ConfigError, match=r"endpoint tcp://nowhere\.invalid:1: cannot bind"):
        listen_shared("tcp://nowhere.invalid:1", is_first=True)


def test_what_a_dead_front_left_is_removed_and_what_lives_is_not(tmp_path):
    endpoint = f"ipc://{tmp_path}/pool.sock.1"
    files = [tmp_path / name for name in ("pool.sock.1", "pool.sock.1.full", "pool.sock.1.fd")]
    kinds = [socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET]
    sockets = [socket.socket(socket.AF_UNIX, kind) for kind in kinds]
    for sock, file in zip(sockets, files, strict=True):
        sock.bind(str(file))
        sock.listen()
    remove_stale(endpoint)
    assert all(file.exists() for file in files)
    for sock in sockets:
        sock.close()
    remove_stale(endpoint)
    assert not any(file.exists() for file in files)
    (tmp_path / "pool.sock.1").write_text("mine")
    remove_stale(endpoint)
    assert (tmp_path / "pool.sock.1").read_text() == "mine"
