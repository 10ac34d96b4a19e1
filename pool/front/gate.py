"""Taking no more local connections while file descriptors are short. Runs in the front.

libzmq 4.3.5 ends the process when it cannot accept a connection on an `ipc://` endpoint for want of a
descriptor (`ipc_listener.cpp`; `tcp://` only waits). It has no limit of its own to set. But a socket
whose file bears another name is found by nobody new, and those who are connected do not notice.

A file that the service manager made is hidden in the same way, and put back by a server that stops, or by the
next one after a server that was killed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from pool.front.logs import Log

log = Log("pool.endpoint")

# Descriptors left when the gate closes, a quarter of all within these: up to 100 connections wait in the
# listener's queue by then, more come during a turn of the loop, and processes that are started need some.
_RESERVE_LEAST, _RESERVE_MOST = 160, 512
_RESERVE_SHARE = 4

HIDDEN_SUFFIX = ".full"


class Gate:
    """The socket files of the `ipc://` endpoints.

    Args:
        limit: Descriptors this process may have (RLIMIT_NOFILE).

    Attributes:
        is_open: Whether new connections find them.
    """

    def __init__(self, limit: int) -> None:
        self.is_open = True
        reserve = max(_RESERVE_LEAST, min(_RESERVE_MOST, limit // _RESERVE_SHARE))
        self._closes_at = limit - reserve
        self._opens_at = self._closes_at - reserve // 4
        self._paths: list[str] = []
        self._lent: set[str] = set()

    def add(self, path: str, is_lent: bool = False) -> None:
        """A socket listens there.

        Args:
            path: Its file.
            is_lent: Whether it is the service manager's, and stays when the server stops.
        """
        with suppress(OSError):
            if is_lent and not os.path.lexists(path):
                os.rename(path + HIDDEN_SUFFIX, path)  # by a server that was killed
            else:
                os.unlink(path + HIDDEN_SUFFIX)
        self._paths.append(path)
        if is_lent:
            self._lent.add(path)

    def remove(self) -> None:
        """Nothing listens any more, or the service manager alone."""
        for path in self._paths:
            if path in self._lent:
                if not self.is_open:
                    _show(path)
                continue
            for name in (path, path + HIDDEN_SUFFIX):
                with suppress(FileNotFoundError):
                    os.unlink(name)

    def has_room(self, fd: int) -> bool:
        """Whether whoever got this descriptor, and could do without, may keep it."""
        return fd < self._closes_at

    def accepted(self, fd: int) -> None:
        """A connection has this descriptor: the kernel gives the lowest, so that many are taken."""
        if self.is_open and fd >= self._closes_at:
            self.is_open = False
            log.warning("no more local connections are taken", descriptors_up_to=fd)
            for path in self._paths:
                with suppress(OSError):
                    os.rename(path, path + HIDDEN_SUFFIX)

    def disconnected(self) -> None:
        """Connections have ended: there may be descriptors again."""
        if not self.is_open and _lowest_free() < self._opens_at:
            self.is_open = True
            log.info("local connections are taken again")
            for path in self._paths:
                _show(path)


def _show(path: str) -> None:
    with suppress(OSError):
        os.link(path + HIDDEN_SUFFIX, path)  # which, unlike a rename, replaces nobody else's
        os.unlink(path + HIDDEN_SUFFIX)


def _lowest_free() -> int:
    try:
        fd = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return sys.maxsize
    os.close(fd)
    return fd
