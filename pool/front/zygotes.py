"""The front's side of the zygote: start it, have it fork, hear how its children end.

Runs in the front, on its event loop. `pool.shm.control` is the protocol.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from pool.errors import ModelLoadError, Unavailable
from pool.shm import control

UNKNOWN_EXIT = -256  # the zygote died before it could tell how its child ended; no signal has this number


def describe_exit(code: int) -> str:
    """`exit code 3` or `killed by SIGSEGV`, for logs and errors."""
    if code == UNKNOWN_EXIT:
        return "ended, nobody saw how"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class Lifeline:
    """The pipe whose end of file tells every child that the front is gone. One for each front."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC)

    def close(self) -> None:
        """Let go: every process that still holds the other end exits."""
        os.close(self.read_fd)
        os.close(self._write_fd)


class Child:
    """A process forked by a zygote.

    Attributes:
        pid: Known once the zygote reported the fork.
        exit_code: As in `control.Exited`, once it was waited for.
        ended: Done when it is certain that the process runs no more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.refusal = ""
        self.ended: asyncio.Future[int] = loop.create_future()
        self._is_unwanted = False

    def kill(self) -> None:
        """Send SIGKILL, if it is still there; as soon as it is, if it is not yet."""
        self._is_unwanted = True
        if self.pid is not None and not self.ended.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def started(self, pid: int) -> None:
        """The zygote has forked it."""
        self.pid = pid
        if self._is_unwanted:
            self.kill()


class Zygote:
    """One zygote process of one backend.

    Args:
        backend: Name of the backend it preloads.
        lifeline: Handed to it and to each of its forks.
        on_lost: Called once if it dies unasked, after its children are accounted for.
    """

    def __init__(self, backend: str, lifeline: Lifeline, on_lost: Callable[[Zygote, str], None]) -> None:
        self.backend = backend
        self._lifeline = lifeline
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count(1)
        self._children: dict[int, Child] = {}
        self._preloaded: asyncio.Future[None] = self._loop.create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The process's id, once started."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process and wait until it can fork.

        Raises:
            ModelLoadError: it ended while importing the framework (its stderr says why).
        """
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setblocking(False)
        self._sock = mine
        arguments = ["-m", "pool.worker.zygote", str(its.fileno()), str(self._lifeline.read_fd), self.backend]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                pass_fds=(its.fileno(), self._lifeline.read_fd),
                stdin=subprocess.DEVNULL,
                env=zygote_environment(),
            )
        finally:
            its.close()
        self._loop.add_reader(mine.fileno(), self._read_reports)
        # A caller that gives up does not change whether the import is done: `stop` asks.
        await asyncio.shield(self._preloaded)

    def fork(self, role: str, fds: list[int]) -> Child:
        """Have a child forked; `fds` are duplicated into it (`pool.shm.control` lists them by role).

        Raises:
            Unavailable: the zygote is gone.
        """
        if self._sock is None:
            raise Unavailable(f"the {self.backend} zygote is gone; a new one is being started")
        token = next(self._tokens)
        try:
            control.send_fork(self._sock, control.Fork(token, role), fds)
        except OSError as e:
            raise Unavailable(f"the {self.backend} zygote takes no requests: {e.strerror}") from None
        child = self._children[token] = Child(self._loop)
        return child

    async def stop(self) -> None:
        """Close the control socket: the zygote kills what children it still has, and leaves."""
        self._disconnect()
        if self._process is not None:
            process = self._process
            if not self._preloaded.done():
                process.kill()  # it has no children yet, and does not listen until the import is done
            with suppress(subprocess.TimeoutExpired):
                # A zygote leaves in milliseconds; 5 s is for a machine that swaps.
                await self._loop.run_in_executor(None, process.wait, 5)
            if process.poll() is None:
                process.kill()
                await self._loop.run_in_executor(None, process.wait)

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _read_reports(self) -> None:
        assert self._sock is not None
        while self._sock is not None:
            try:
                report = control.receive_report(self._sock)
            except BlockingIOError:
                return
            if report is None:
                self._lost()
                return
            self._hear(report)

    def _hear(self, report: control.Report) -> None:
        match report:
            case control.Preloaded():
                self._preloaded.set_result(None)
            case control.Forked(token, pid):
                self._children[token].started(pid)
            case control.ForkFailed(token, reason):
                child = self._children.pop(token)
                child.refusal = f"cannot fork: {reason}"
                self._end(child, UNKNOWN_EXIT)
            case control.Exited(token, _, code):
                self._end(self._children.pop(token), code)

    @staticmethod
    def _end(child: Child, code: int) -> None:
        if not child.ended.done():
            child.exit_code = code
            child.ended.set_result(code)

    def _lost(self) -> None:
        self._disconnect()
        assert self._process is not None
        how = describe_exit(self._process.wait())
        if not self._preloaded.done():
            self._preloaded.set_exception(
                ModelLoadError(f"the {self.backend} zygote could not start ({how}); see its messages above")
            )
            return
        # Orphans go on serving. Nobody but init can wait for them now, but a pidfd still tells when one
        # is gone, and with it its claim on a slot.
        orphans, self._children = self._children, {}
        for child in orphans.values():
            self._watch_orphan(child)
        self._on_lost(self, how)

    def _watch_orphan(self, child: Child) -> None:
        try:
            pidfd = os.pidfd_open(child.pid) if child.pid is not None else None
        except ProcessLookupError:
            pidfd = None
        if pidfd is None:
            self._end(child, UNKNOWN_EXIT)
            return

        def gone() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            self._end(child, UNKNOWN_EXIT)

        self._loop.add_reader(pidfd, gone)


def zygote_environment() -> dict[str, str]:
    """The environment of a zygote: the front's, with thread pools that start on import kept to one."""
    environment = dict(os.environ)
    # numpy's OpenBLAS would start a thread for every core on import: useless here, and a fork with other
    # threads about is one that CPython 3.12 warns of.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    return environment
