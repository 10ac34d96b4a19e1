"""Dying with the front, whatever this process is doing. Runs in zygotes, their forks, and other fronts.

The lifeline is a pipe whose only write end the front holds; nothing is ever written to it. When the front is
gone, however it went, the kernel closes that end, and sends whoever asked for it a signal: here SIGKILL. It
reaches a process that is stopped, or stuck in native code with the interpreter's lock held, where a thread
that reads the pipe would wait for ever.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal


def die_with_front(lifeline_fd: int) -> None:
    """Have this process killed when the front is gone; exits at once if it is already.

    Args:
        lifeline_fd: The read end, as inherited; closed here.
    """
    # Whom to signal belongs to the open file, which a fork shares with its parent: open it anew (proc(5)).
    mine = os.open(f"/proc/self/fd/{lifeline_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(lifeline_fd)
    fcntl.fcntl(mine, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(mine, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(mine, fcntl.F_SETFL, fcntl.fcntl(mine, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(mine, select.POLLIN)
    if poll.poll(0):  # it was gone before the kernel was asked to tell
        os._exit(0)
