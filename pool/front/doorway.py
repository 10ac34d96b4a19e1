"""The sockets beside `ipc://` endpoints, by which local clients come past ZeroMQ. Runs in the front.

Beside the socket file of each such endpoint lies another, of a Unix socket. What a client is there for, its
first packet says by its magic: to share memory (`pool.front.regions`), or to talk (`pool.front.lines`). Who
may not use the server gets no answer there.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

from pool import wire
from pool.endpoints import side_path
from pool.errors import PoolError, WireError
from pool.front.logs import Log

log = Log("pool.doorway")

# Of a first packet: one byte more than any has, to see that it has no more.
_FIRST_BYTES = wire.REGION_OFFER.size + 1
_MAGIC_BYTES = 4

_BACKLOG = 64

# Of those who have not said what they want. Nobody takes longer to say so than the front to listen.
_VISITORS_MAX = 64

_PAUSE_S = 1.0  # without descriptors, until the next look whether there are some again

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Visitor:
    """A connection, and whose it is as far as the kernel knows.

    Attributes:
        sock: Its end here; does not block.
        pid: Of the process that made it.
        uid: Of that process's user.
    """

    __slots__ = ("pid", "sock", "uid")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pid, self.uid, _ = _PEER.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        )


# Takes a visitor in, whose connection is its own then, or raises. What is left in the list of descriptors
# is closed.
Host = Callable[[Visitor, bytes, list[int]], None]


class Doorway:
    """The listening sockets, and those who have not said yet what they want.

    Args:
        hosts: Who takes visitors in, by the magic that they begin with.
        is_allowed: Whether a user, by number, may come in.
        has_room: Whether a connection may keep the descriptor it got. (ZeroMQ cannot do without, these can.)
    """

    def __init__(
        self,
        hosts: Mapping[bytes, Host],
        is_allowed: Callable[[int], bool] = lambda _: True,
        has_room: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._hosts = dict(hosts)
        self._is_allowed = is_allowed
        self._has_room = has_room
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[str, socket.socket] = {}
        self._visitors: set[Visitor] = set()

    def listen(self, endpoint: str) -> None:
        """Let in whoever may open an endpoint's socket file, if it has one.

        Args:
            endpoint: Where this server listens now, and so no other.

        Beside its file lies another, with the same mode and owner; one that a dead server left is replaced.
        Where that cannot be, the log says so: clients do without.
        """
        path = side_path(endpoint)
        if path is None:
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            beside = os.stat(endpoint.removeprefix("ipc://"))
            with suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise FileExistsError(errno.EEXIST, "a file that is not a socket is there")
                os.unlink(path)
            listener.bind(path)
            self._listeners[path] = listener
            with suppress(PermissionError):  # then fewer may open it
                os.chown(path, beside.st_uid, beside.st_gid)
            os.chmod(path, stat.S_IMODE(beside.st_mode))
            listener.listen(_BACKLOG)  # nobody can connect before the permissions hold
            self._loop.add_reader(listener.fileno(), self._accept, listener)
        except OSError as e:
            log.warning("local clients go through ZeroMQ", endpoint=endpoint, path=path, reason=e.strerror)
            if path not in self._listeners:
                listener.close()

    def close(self) -> None:
        """Let nobody in any more and remove the socket files."""
        for path, listener in self._listeners.items():
            self._loop.remove_reader(listener.fileno())
            listener.close()
            with suppress(FileNotFoundError):
                os.unlink(path)
        self._listeners.clear()
        for visitor in list(self._visitors):
            self._forget(visitor)
            visitor.sock.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as e:
            # Without descriptors the listener would stay readable, and the loop awake for nothing.
            if e.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.warning("cannot let a client in", reason=e.strerror)
            self._loop.remove_reader(listener.fileno())
            self._loop.call_later(_PAUSE_S, self._listen_again, listener)
            return
        sock.setblocking(False)
        visitor = Visitor(sock)
        is_full = len(self._visitors) >= _VISITORS_MAX or not self._has_room(sock.fileno())
        if is_full or not self._is_allowed(visitor.uid):
            sock.close()
            return
        self._visitors.add(visitor)
        self._loop.add_reader(sock.fileno(), self._on_readable, visitor)
        log.debug("connection", pid=visitor.pid, uid=visitor.uid)

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _on_readable(self, visitor: Visitor) -> None:
        """The first packet is there, or the connection has ended."""
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(visitor.sock, _FIRST_BYTES, 2, flags=socket.MSG_CMSG_CLOEXEC)
            self._forget(visitor)
            if not data:
                visitor.sock.close()
                return
            host = self._hosts.get(data[:_MAGIC_BYTES])
            if host is None:
                raise WireError(f"{data[:_MAGIC_BYTES]!r}; wanted one of {sorted(self._hosts)}")
            host(visitor, data, fds)
        except BlockingIOError:
            pass
        except PoolError as e:
            log.debug("not let in", pid=visitor.pid, uid=visitor.uid, reason=e.message)
            with suppress(OSError):
                visitor.sock.send(wire.encode_error(0, e))
            visitor.sock.close()
        except OSError:
            self._forget(visitor)
            visitor.sock.close()
        finally:
            for fd in fds:
                os.close(fd)

    def _forget(self, visitor: Visitor) -> None:
        """It is somebody else's now, or about to be closed."""
        self._loop.remove_reader(visitor.sock.fileno())
        self._visitors.discard(visitor)
