"""Binding a socket to an endpoint: socket files, permissions, and who else is there. Runs in the front."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

import zmq

from pool.config import ServerConfig
from pool.endpoints import SIDE_SUFFIX
from pool.errors import ConfigError
from pool.front.gate import HIDDEN_SUFFIX

# Connections that wait to be accepted, of a socket that was handed over: as many as ZeroMQ has of its own.
# A service manager's queue is as long as the kernel allows; all of it would come in after the gate is closed.
_BACKLOG = 100


def bind(
    router: zmq.Socket[bytes], endpoint: str, config: ServerConfig, passed_fd: int | None = None
) -> None:
    """Bind `router` to an endpoint.

    Args:
        router: Not bound there yet.
        endpoint: `ipc://` or `tcp://`.
        config: Says whose a socket file is, and its mode.
        passed_fd: The socket listening there, if the service manager made it (`pool.front.activation`);
            ZeroMQ's from now on. Its file is the manager's, permissions and all.

    Raises:
        ConfigError: it cannot be bound; the sentence says which and why.
    """
    path = endpoint.removeprefix("ipc://") if endpoint.startswith("ipc://") else None
    if passed_fd is not None:
        if path is not None:
            with socket.socket(fileno=os.dup(passed_fd)) as lent:
                lent.listen(_BACKLOG)
        router.setsockopt(zmq.USE_FD, passed_fd)
    elif path is not None:
        _prepare_ipc(path, config.ipc_gid)
    router.setsockopt(zmq.IPV6, endpoint.startswith("tcp://["))
    mask = os.umask(0o177)  # nobody else may connect until the file is whose it is to be
    try:
        router.bind(endpoint)
    except zmq.ZMQError as e:
        raise ConfigError(f"endpoint {endpoint}: cannot bind: {e.strerror}") from None
    finally:
        os.umask(mask)
        if passed_fd is not None:
            router.setsockopt(zmq.USE_FD, -1)  # which is not for the next endpoint
    if path is not None and passed_fd is None:
        _give(path, config.ipc_gid, path)
        os.chmod(path, config.ipc_permissions)


def _give(path: str, gid: int | None, endpoint_path: str) -> None:
    """Make a file or directory a group's.

    Raises:
        ConfigError: the server may not.
    """
    if gid is None:
        return
    try:
        os.chown(path, -1, gid)
    except OSError as e:
        raise ConfigError(
            f"endpoint ipc://{endpoint_path}: cannot give {path} to group {gid} (ipc_group): {e.strerror}; "
            "wanted a group of the server's"
        ) from None


def _prepare_ipc(path: str, gid: int | None) -> None:
    """Make the socket's directory, and make sure no living server listens there.

    A socket file left behind by a killed server does not matter: ZeroMQ replaces it.

    Raises:
        ConfigError: something else is there, a server answers, or the directory is somebody else's.
    """
    directory = os.path.dirname(path)
    try:
        if not os.path.isdir(directory):
            os.makedirs(directory, mode=0o750, exist_ok=True)
            _give(directory, gid, path)
        _check_owner(path, directory)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise ConfigError(f"endpoint ipc://{path}: {e.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"endpoint ipc://{path}: a file that is not a socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise ConfigError(f"endpoint ipc://{path}: another server is listening there")


def _check_owner(path: str, directory: str) -> None:
    """Below a directory like /tmp anybody may have made this one first, to put a socket of theirs in it."""
    owner = os.stat(directory).st_uid
    anybody_makes = os.stat(os.path.dirname(directory)).st_mode & stat.S_ISVTX
    if anybody_makes and owner != os.geteuid():
        raise ConfigError(
            f"endpoint ipc://{path}: {directory} belongs to user {owner}; wanted {os.geteuid()}, who serves"
        )


def listen_shared(endpoint: str, *, is_first: bool) -> int:
    """A socket that listens at a `tcp://` endpoint where other fronts listen as well.

    The kernel gives each connection to one of them (SO_REUSEPORT, socket(7)), by its addresses.

    Args:
        endpoint: Where.
        is_first: Whether nobody may listen there yet. (Another server of the same user, which shares as well,
            would be joined.)

    Returns:
        A descriptor, the caller's.

    Raises:
        ConfigError: it cannot be bound; the sentence says which and why.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        found = socket.getaddrinfo(
            None if host == "*" else host.strip("[]"),
            0 if port == "*" else int(port),
            family,
            socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        address = found[0][4]
        if is_first:
            with _tcp_socket(family) as probe:
                probe.bind(address)
        listener = _tcp_socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
            # ZeroMQ accepts when told that somebody is there, who may be gone by then: it must not wait.
            listener.setblocking(False)
            return listener.detach()
        finally:
            listener.close()
    except OSError as e:
        raise ConfigError(f"endpoint {endpoint}: cannot bind: {e.strerror}") from None


def _tcp_socket(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # as ZeroMQ does
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return made


def remove_stale(endpoint: str) -> None:
    """Remove what a front that was killed has left of an `ipc://` endpoint, where nobody listens now."""
    path = endpoint.removeprefix("ipc://")
    for file, kind in (
        (path, socket.SOCK_STREAM),
        (path + HIDDEN_SUFFIX, socket.SOCK_STREAM),
        (path + SIDE_SUFFIX, socket.SOCK_SEQPACKET),
    ):
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as probe:
            try:
                probe.connect(file)
            except ConnectionRefusedError:
                if stat.S_ISSOCK(os.stat(file).st_mode):
                    os.unlink(file)
