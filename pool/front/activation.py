"""Sockets that the service manager listens on and hands over (sd_listen_fds(3)). Runs in the front.

The manager keeps such a socket while the service is restarted: who connects meanwhile waits in its queue
instead of being refused. So nothing here, and nothing in ZeroMQ with a socket it was given, removes a
socket file or changes its mode: file, owner and mode are the unit's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from pool.errors import ConfigError

_FIRST_FD = 3  # SD_LISTEN_FDS_START


class PassedSocket(NamedTuple):
    """A listening socket that was handed over.

    Attributes:
        fd: This process's; closed by whoever binds it.
        name: What its unit calls it.
        endpoint: Where it listens, as an endpoint with a numeric address.
    """

    fd: int
    name: str
    endpoint: str


def take_sockets(environment: MutableMapping[str, str], first_fd: int = _FIRST_FD) -> list[PassedSocket]:
    """The sockets handed to this process, and what told of them taken out of the environment.

    Args:
        environment: With `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`, if there are any.
        first_fd: The first descriptor.

    Raises:
        ConfigError: one of them is not a listening stream socket of the kinds served.
    """
    number = environment.pop("LISTEN_FDS", "")
    pid = environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if not number or pid != str(os.getpid()):
        return []
    if not number.isascii() or not number.isdecimal():
        raise ConfigError(f"LISTEN_FDS {number!r}; wanted a number of sockets")
    sockets = []
    for i in range(int(number)):
        fd = first_fd + i
        name = names[i] if i < len(names) else ""
        sockets.append(PassedSocket(fd, name, _listening_endpoint(fd, name)))
    return sockets


def _listening_endpoint(fd: int, name: str) -> str:
    try:
        # ZeroMQ accepts when told that somebody is there, who may be gone by then: it must not wait.
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        probe = socket.socket(fileno=os.dup(fd))
    except OSError as e:
        raise ConfigError(
            f"socket {name!r} (descriptor {fd}) from the service manager: {e.strerror}"
        ) from None
    with probe:
        is_listening = probe.type == socket.SOCK_STREAM and probe.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        )
        address = probe.getsockname()
        if is_listening and probe.family == socket.AF_UNIX and isinstance(address, str) and address:
            return f"ipc://{address}"
        if is_listening and probe.family == socket.AF_INET:
            return f"tcp://{address[0]}:{address[1]}"
        if is_listening and probe.family == socket.AF_INET6:
            return f"tcp://[{address[0]}]:{address[1]}"
    raise ConfigError(
        f"socket {name!r} (descriptor {fd}) from the service manager; wanted a listening stream socket with "
        "a path or an internet address (ListenStream= and Accept=no)"
    )


def assign(sockets: Sequence[PassedSocket], endpoints: Sequence[str]) -> dict[str, int]:
    """Which endpoint is served on which of the sockets.

    Args:
        sockets: Handed over.
        endpoints: Configured. With none, those of the sockets are served.

    Returns:
        Descriptors by endpoint; endpoints that are not among them are to be bound as usual.

    Raises:
        ConfigError: a socket that is at none of the endpoints, which nobody would serve.
    """
    if not endpoints:
        return {passed.endpoint: passed.fd for passed in sockets}
    found: dict[str, int] = {}
    for passed in sockets:
        match = next((e for e in endpoints if e not in found and _is_at(passed.endpoint, e)), None)
        if match is None:
            raise ConfigError(
                f"socket {passed.name!r} from the service manager listens at {passed.endpoint}; wanted one "
                f"of server.endpoints: {', '.join(endpoints)}"
            )
        found[match] = passed.fd
    return found


def _is_at(actual: str, endpoint: str) -> bool:
    """Whether a socket's address is what a configured endpoint means."""
    if actual.startswith("ipc://") or endpoint.startswith("ipc://"):
        return (
            actual.startswith("ipc://")
            and endpoint.startswith("ipc://")
            and _place(actual) == _place(endpoint)
        )
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    actual_host, _, actual_port = actual.removeprefix("tcp://").rpartition(":")
    return port in (actual_port, "*") and ip_address(_bare(actual_host)) in _addresses(_bare(host))


def _place(endpoint: str) -> str:
    """The path of a socket file, however it is spelt (/var/run is /run)."""
    return os.path.realpath(endpoint.removeprefix("ipc://"))


def _bare(host: str) -> str:
    return host.strip("[]").partition("%")[0]


def _addresses(host: str) -> set[object]:
    if host == "*":
        return {ip_address("0.0.0.0"), ip_address("::")}
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {ip_address(str(entry[4][0]).partition("%")[0]) for entry in found}
