"""The front's side of the zygote: start it, have it fork, hear how its children end.

Runs in the front, on its event loop. `pool.shm.control` is the protocol.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from pool.errors import ModelLoadError, Unavailable
from pool.front.logs import Log
from pool.shm import control

log = Log("pool.zygotes")

UNKNOWN_EXIT = -256  # the zygote died before it could tell how its child ended; no signal has this number

# A zygote reports the end of a child, and forks, within milliseconds. One that does neither for so long is
# hung or stopped; its workers are worth more than its life.
_REPORT_GRACE_S = 1.0
_FORK_GRACE_S = 5.0


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
        self._loop = loop
        self._pidfd: int | None = None
        self.on_gone: Callable[[], None] = lambda: None
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.refusal = ""
        self.ended: asyncio.Future[int] = loop.create_future()
        self._is_unwanted = False

    def kill(self) -> None:
        """Send SIGKILL, if it is still there; as soon as it is, if it is not yet."""
        self._is_unwanted = True
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        if self.pid is not None and not self.ended.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def started(self, pid: int) -> None:
        """The zygote has forked it: `on_gone` is called when the process is gone, reported or not."""
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # and the report of that is on its way
            return
        except OSError as e:  # out of descriptors: a child that cannot be watched is not kept
            self.refusal = f"cannot be watched: {e.strerror}"
            self.kill()
            return
        self._loop.add_reader(self._pidfd, self._gone)
        if self._is_unwanted:
            self.kill()

    def _gone(self) -> None:
        self._unwatch()
        self.on_gone()

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    @property
    def is_watched(self) -> bool:
        """Whether `on_gone` is still to come."""
        return self._pidfd is not None

    def end(self, code: int) -> None:
        """It is certain that it is gone."""
        self._unwatch()
        if not self.ended.done():
            self.exit_code = code
            self.ended.set_result(code)


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
        child.on_gone = lambda: self._await_report(child)
        self._loop.call_later(_FORK_GRACE_S, self._check_forked, child)
        return child

    def _await_report(self, child: Child) -> None:
        """A child is gone; the zygote, which waits for it, says how it ended in a moment."""
        self._loop.call_later(_REPORT_GRACE_S, self._check_reported, child)

    def _check_reported(self, child: Child) -> None:
        if not child.ended.done():
            self._give_up(f"no word of the end of process {child.pid}")

    def _check_forked(self, child: Child) -> None:
        if child.pid is None and not child.ended.done():
            self._give_up("a fork it was asked for has not come")

    def _give_up(self, reason: str) -> None:
        """The process is hung or stopped: another takes its place."""
        if self._sock is not None and self._process is not None:
            log.error("zygote hangs", backend=self.backend, pid=self._process.pid, reason=reason)
            self._process.kill()

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
                child.end(UNKNOWN_EXIT)
            case control.Exited(token, _, code):
                self._children.pop(token).end(code)

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
            child.on_gone = functools.partial(child.end, UNKNOWN_EXIT)
            if not child.is_watched:  # it is gone, or never was
                child.end(UNKNOWN_EXIT)
        self._on_lost(self, how)


def zygote_environment() -> dict[str, str]:
    """The environment of a zygote: the front's, with thread pools that start on import kept to one."""
    environment = dict(os.environ)
    # numpy's OpenBLAS would start a thread for every core on import: useless here, and a fork with other
    # threads about is one that CPython 3.12 warns of.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    return environment
