"""Taking no more local connections while file descriptors are short. Runs in the front.

libzmq 4.3.5 ends the process when it cannot accept a connection on an `ipc://` endpoint for want of a
descriptor (`ipc_listener.cpp`; `tcp://` only waits). It has no limit of its own to set. But a socket
whose file bears another name is found by nobody new, and those who are connected do not notice.
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

_HIDDEN = ".full"


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

    def add(self, path: str) -> None:
        """A socket listens there."""
        with suppress(FileNotFoundError):
            os.unlink(path + _HIDDEN)  # of a server that was killed
        self._paths.append(path)

    def remove(self) -> None:
        """Nothing listens any more."""
        for path in self._paths:
            for name in (path, path + _HIDDEN):
                with suppress(FileNotFoundError):
                    os.unlink(name)

    def accepted(self, fd: int) -> None:
        """A connection has this descriptor: the kernel gives the lowest, so that many are taken."""
        if self.is_open and fd >= self._closes_at:
            self.is_open = False
            log.warning("no more local connections are taken", descriptors_up_to=fd)
            for path in self._paths:
                with suppress(OSError):
                    os.rename(path, path + _HIDDEN)

    def disconnected(self) -> None:
        """Connections have ended: there may be descriptors again."""
        if not self.is_open and _lowest_free() < self._opens_at:
            self.is_open = True
            log.info("local connections are taken again")
            for path in self._paths:
                with suppress(OSError):
                    os.link(path + _HIDDEN, path)  # which, unlike a rename, replaces nobody else's
                    os.unlink(path + _HIDDEN)


def _lowest_free() -> int:
    try:
        fd = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return sys.maxsize
    os.close(fd)
    return fd
