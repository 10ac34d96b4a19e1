"""Where a pool server is reached: endpoint strings, checked and defaulted. Pure; used by client and front."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address

from pool.errors import ConfigError

# sockaddr_un.sun_path holds 108 bytes, the last of them the terminating zero.
MAX_IPC_PATH_BYTES = 107

SOCKET_NAME = "pool.sock"

# Beside an endpoint's socket file lies that of the socket for regions and lines (`docs/wire.md` 7, 8).
SIDE_SUFFIX = ".fd"

# Fronts of one server, at most. Beside the socket file of the first lie those of the others, numbered.
MAX_FRONTS = 16


def default_endpoint() -> str:
    """The endpoint used when none is named: `pool.sock` in the first of these directories.

    `$RUNTIME_DIRECTORY` (systemd's `RuntimeDirectory=`), `$XDG_RUNTIME_DIR/pool`, `/tmp/pool-UID`.
    """
    # systemd joins several directories with colons.
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime:
        directory = runtime
    elif session:
        directory = f"{session}/pool"
    else:
        directory = f"/tmp/pool-{os.getuid()}"
    return f"ipc://{directory}/{SOCKET_NAME}"


def side_path(endpoint: str) -> str | None:
    """The file of the socket by which an endpoint's clients pass regions and open lines.

    Returns:
        None where there can be none: not `ipc://`, or the path would be too long.
    """
    if not endpoint.startswith("ipc://"):
        return None
    path = endpoint.removeprefix("ipc://") + SIDE_SUFFIX
    return path if len(os.fsencode(path)) <= MAX_IPC_PATH_BYTES else None


def front_endpoint(endpoint: str, front: int) -> str:
    """Where a front of a server listens that is reached at an endpoint; of `tcp://`, all at the same place.

    Args:
        endpoint: Of the server.
        front: Its number; the first is 0.
    """
    return f"{endpoint}.{front}" if front and endpoint.startswith("ipc://") else endpoint


def check_endpoint(endpoint: str, *, bind: bool = False) -> None:
    """Check an endpoint before it reaches a socket.

    Args:
        endpoint: `ipc:///absolute/path` or `tcp://host:port`, an IPv6 host in brackets.
        bind: Whether it is to be listened on: then the host may be `*` (every interface) and the
            port `*` (any free one).

    Raises:
        ConfigError: it is neither; the message says which part is wrong.
    """
    transport, separator, address = endpoint.partition("://")
    if not separator or transport not in ("ipc", "tcp"):
        raise ConfigError(f"endpoint {endpoint!r}; wanted ipc:///absolute/path or tcp://host:port")
    if transport == "ipc":
        _check_path(endpoint, address)
    else:
        _check_host_port(endpoint, address, bind)


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine reaches a well-formed `tcp://` endpoint, or `host:port`.

    `localhost` counts, for whatever it resolves to is looked at when it is bound. No other name does.
    """
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_path(endpoint: str, path: str) -> None:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigError(
            f"endpoint {endpoint!r}: got path {path!r}; wanted an absolute path of a socket file"
        )
    size = len(os.fsencode(path))
    if size > MAX_IPC_PATH_BYTES:
        raise ConfigError(
            f"endpoint {endpoint!r}: path has {size} bytes; wanted at most {MAX_IPC_PATH_BYTES} "
            "(the limit of Unix sockets)"
        )


def _check_host_port(endpoint: str, address: str, bind: bool) -> None:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\*|[0-9]{1,5})", address)
    if match is None:
        raise ConfigError(f"endpoint {endpoint!r}; wanted tcp://host:port (an IPv6 host in brackets)")
    host, port = match.groups()
    if not bind and host == "*":
        raise ConfigError(f"endpoint {endpoint!r}: got host '*'; wanted the host to connect to")
    if port == "*":
        if not bind:
            raise ConfigError(f"endpoint {endpoint!r}: got port '*'; wanted the port to connect to")
    elif not 1 <= int(port) <= 65535:
        raise ConfigError(f"endpoint {endpoint!r}: got port {port}; wanted 1 to 65535")
