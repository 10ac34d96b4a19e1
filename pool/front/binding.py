"""Binding a socket to an endpoint: socket files, permissions, and who else is there. Runs in the front."""

from __future__ import annotations

import os
import socket
import stat

import zmq

from pool.errors import ConfigError


def bind(router: zmq.Socket[bytes], endpoint: str, permissions: int) -> str | None:
    """Bind `router` to an endpoint.

    Args:
        router: Not bound there yet.
        endpoint: `ipc://` or `tcp://`.
        permissions: Of the socket file.

    Returns:
        The socket file to remove when done, for `ipc://`.

    Raises:
        ConfigError: it cannot be bound; the sentence says which and why.
    """
    path = endpoint.removeprefix("ipc://") if endpoint.startswith("ipc://") else None
    if path is not None:
        _prepare_ipc(path)
    try:
        router.bind(endpoint)
    except zmq.ZMQError as e:
        raise ConfigError(f"endpoint {endpoint}: cannot bind: {e.strerror}") from None
    if path is not None:
        os.chmod(path, permissions)
    return path


def _prepare_ipc(path: str) -> None:
    """Make the socket's directory, and make sure no living server listens there.

    A socket file left behind by a killed server does not matter: ZeroMQ replaces it.

    Raises:
        ConfigError: something else is there, a server answers, or the directory is somebody else's.
    """
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
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
