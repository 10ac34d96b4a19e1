"""The zygote: imports a framework once, runs nothing with it, and forks loaders and workers on request.

A process that has *run* a framework cannot be forked safely (its thread pools do not survive, their
locks do); one that has only imported it can, and a fork of it is ready hundreds of times faster than a
fresh interpreter and shares every page of the import. So this process stays single-purpose: it waits
for requests on its control socket (`pool.shm.control`), forks, waits for its children and reports how
they ended. It leaves when the front's end of the control socket closes, and takes its children along.

Started by the front as `python -m pool.worker.zygote CONTROL_FD LIFELINE_FD BACKEND`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import re
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pool.backends import find_backend
from pool.shm import control

# Not first in the fork: all forks share the imported pages, and run the code that the zygote was started
# with even if another version is installed meanwhile.
from pool.shm.lifeline import die_with_front
from pool.worker.loader import run_loader
from pool.worker.loop import run_worker

_MADV_DONTNEED = 4
_PR_SET_NAME = 15

# In thousandths of the memory there is: parent and child both map the arena and the weights, and the kernel
# counts these in each. 300 is more than what can make the parent look the larger of the two.
_OOM_STEP = 300
_OOM_MOST = 1000


def main(control_fd: int, lifeline_fd: int, backend_name: str) -> None:
    """Preload, then fork on request until the front is gone."""
    # Ctrl-C, and a SIGTERM to the whole group, are for the front: it finishes what is admitted, which
    # takes its workers, and then closes the lifeline.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=control_fd)
    name_process("pool-zygote")
    volunteer()
    die_with_front(lifeline_fd)
    with _stderr_held_back():
        find_backend(backend_name).preload()
    gc.collect()
    # Pages that the collector never writes to again stay shared with every fork, and a full collection
    # in a worker no longer walks the framework's 300,000 objects (0.16 s of stop).
    gc.freeze()
    release_clean_pages()
    with suppress(BrokenPipeError, ConnectionResetError):  # the front is gone: so are we
        control.send_report(sock, control.Preloaded())
        _serve(sock)


@contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Keep what a framework says while it is imported, and say it only if the import fails.

    TensorFlow greets whoever loads it with lines that no setting of its own turns off.
    """
    kept = os.memfd_create("pool-stderr", os.MFD_CLOEXEC)
    stderr = os.dup(2)
    os.dup2(kept, 2)
    try:
        yield
    except BaseException:
        os.write(stderr, os.pread(kept, os.fstat(kept).st_size, 0))
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(kept)


def _serve(sock: socket.socket) -> None:
    children: dict[int, tuple[int, int]] = {}  # pidfd -> (token, pid)
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == sock.fileno():
                    request = control.receive_fork(sock)
                    if request is None:
                        for pidfd in children:
                            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                        return
                    fork, fds = request
                    try:
                        pid = os.fork()
                    except OSError as e:
                        control.send_report(sock, control.ForkFailed(fork.token, str(e.strerror)))
                    else:
                        if pid == 0:
                            selector.close()
                            sock.close()
                            for pidfd in children:
                                os.close(pidfd)
                            _play(fork.role, fds)
                        pidfd = os.pidfd_open(pid)
                        children[pidfd] = (fork.token, pid)
                        selector.register(pidfd, selectors.EVENT_READ)
                        control.send_report(sock, control.Forked(fork.token, pid))
                    for fd in fds:
                        os.close(fd)
                else:
                    token, pid = children.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(pid, 0)
                    code = os.waitstatus_to_exitcode(status)
                    control.send_report(sock, control.Exited(token, pid, code))


def _play(role: str, fds: list[int]) -> None:
    """In the child: run the role and leave without the zygote's exit handlers. Never returns."""
    code = 1
    try:
        order_fd, lifeline_fd, *rest = fds
        volunteer()
        die_with_front(lifeline_fd)
        if role == "loader":
            _print_as_errors()
            run_loader(control.read_order(order_fd, control.LoaderOrder), *rest)
            code = 0
        else:
            stderr_fd, *rest = rest
            os.dup2(stderr_fd, 2)
            os.close(stderr_fd)
            _print_as_errors()
            _tell_where_it_dies()
            order = control.read_order(order_fd, control.WorkerOrder)
            name_process(f"pool-{order.index}-{order.model}")
            code = run_worker(order, *rest)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skips atexit: frameworks hang in theirs after a fork


def _print_as_errors() -> None:
    """What a model prints goes with its messages: the standard output is for what a command was asked."""
    os.dup2(2, 1)


def _tell_where_it_dies() -> None:
    """Write every thread's Python stack to standard error on a fatal signal, and when the front asks.

    The handlers are C code that takes no lock: they answer from inside an endless loop or native code too.
    """
    faulthandler.enable()
    faulthandler.register(control.TRACEBACK_SIGNAL)


def volunteer() -> None:
    """Offer to be killed before this process's parent when memory runs out (proc(5), oom_score_adj).

    The front is worth most and the zygote next; a worker's batch runs again elsewhere. To go further up than
    the parent, whatever that was given, needs no privilege.
    """
    with (
        suppress(OSError),
        open("/proc/self/oom_score_adj", "r+") as f,
    ):  # /proc may be anything in a container
        score = int(f.read())
        f.seek(0)
        f.write(str(min(score + _OOM_STEP, _OOM_MOST)))


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show (15 bytes; prctl(2) PR_SET_NAME)."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def release_clean_pages() -> int:
    """Unmap the clean file pages that importing a framework has touched; gives the bytes asked for.

    They are the libraries' code, mapped in by start-up alone and in nobody's way again: some 280 MB.
    Any that is needed later is mapped back from the page cache. Only regions without a single private
    (written) page are touched, so nothing can be lost: madvise(2) MADV_DONTNEED on a private file
    mapping repopulates from the file.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    released = 0
    region: tuple[int, int] | None = None
    header = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r[-w]([-x])p \S+ \S+ [1-9]\d* +/")
    with open("/proc/self/smaps") as f:
        lines = f.readlines()
    for line in lines:
        if line[0] in "0123456789abcdef":
            match = header.match(line)
            region = (int(match[1], 16), int(match[2], 16)) if match else None
        elif region is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                start, end = region
                if madvise(start, end - start, _MADV_DONTNEED) == 0:
                    released += end - start
            region = None
    return released


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
