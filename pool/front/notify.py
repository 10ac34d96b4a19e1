"""Speaks to the service manager that started this process (sd_notify(3)). Runs in the front.

The protocol is lines of `KEY=VALUE` in one datagram to the Unix socket that `NOTIFY_SOCKET` names. Where
that is not set nobody listens, and everything here does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from pool.errors import ConfigError
from pool.front.logs import Log

log = Log("pool.notify")

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"


def reloading(now_ns: int) -> str:
    """What announces a reload; `READY` ends it, whether it went well or not.

    Args:
        now_ns: The monotonic clock in ns, by which the manager tells this reload from an earlier one.
    """
    return f"RELOADING=1\nMONOTONIC_USEC={now_ns // 1000}"


def status(sentence: str) -> str:
    """What shows one line in `systemctl status`."""
    return "STATUS=" + " ".join(sentence.split())


def extend_timeout(seconds: float) -> str:
    """What asks to be waited for, starting or stopping, for so long from now."""
    return f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}"


class Notifier:
    """The way to the service manager, if there is one.

    Args:
        address: `/PATH`, or `@NAME` in the abstract namespace; empty for nobody.
        watchdog_s: Longest the manager goes without `ALIVE`; None if it does not watch.

    Raises:
        ConfigError: the address is neither.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        if address and address[0] not in "/@":
            raise ConfigError(f"NOTIFY_SOCKET {address!r}; wanted /PATH or @NAME of a Unix socket")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._is_deaf = False
        self.watchdog_s = watchdog_s if address else None

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Notifier:
        """What the manager left in the environment, taken out of it: it is not for child processes.

        Raises:
            ConfigError: the manager asks for what is not spoken here.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        period_us = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", "")
        if not period_us or (watched and watched != str(os.getpid())):
            return cls(address)
        if not period_us.isascii() or not period_us.isdecimal() or int(period_us) == 0:
            raise ConfigError(f"WATCHDOG_USEC {period_us!r}; wanted microseconds")
        return cls(address, int(period_us) / 1e6)

    @property
    def is_heard(self) -> bool:
        """Whether there is a manager to speak to."""
        return bool(self._address)

    def send(self, *lines: str) -> bool:
        """Tell the manager; never waits and never raises.

        Returns:
            Whether it has been told, or never will be: False means that it is worth another try later.
        """
        if not self._address:
            return True
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as e:  # its queue is full, or it is being restarted
            if not self._is_deaf:
                log.warning("the service manager takes no notification", reason=e.strerror)
            self._is_deaf = True
            return False
        self._is_deaf = False
        return True

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
