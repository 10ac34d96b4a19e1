"""What a worker writes to its standard error: passed on, and its last lines kept. Runs in the front.

A worker that crashes says why there, if anywhere: the framework's fatal line, Python's traceback of the
moment (`faulthandler`). The log line about its end repeats them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from contextlib import suppress

_LINES_KEPT = 20
_READ_BYTES = 65_536  # a pipe's capacity


class LastWords:
    """A pipe for one process's standard error. Make it inside a running event loop.

    Attributes:
        write_fd: The process's end; closed here by `handed_over`.

    Raises:
        OSError: out of file descriptors.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self.write_fd, True)
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._partial = b""
        loop.add_reader(self._read_fd, self._read)

    def handed_over(self) -> None:
        """The process has the write end, or never will: only its death ends the pipe now."""
        os.close(self.write_fd)

    def _read(self) -> bool:
        """Take what is there; gives whether there may be more."""
        try:
            data = os.read(self._read_fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._read_fd)
            return False
        with suppress(OSError):  # whoever read the front's own standard error is gone
            os.write(sys.stderr.fileno(), data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        # A process that never ends its line must not grow the front.
        self._partial = self._partial[-_READ_BYTES:]
        self._lines.extend(line.decode("utf-8", "replace") for line in lines if line.strip())
        return True

    def close(self) -> list[str]:
        """The process is gone: gives its last lines."""
        while self._read():
            pass
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)
        rest = self._partial.decode("utf-8", "replace").strip()
        return [*self._lines, *([rest] if rest else [])]
