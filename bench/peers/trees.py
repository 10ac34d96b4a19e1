"""A server's whole process tree: what it costs, and its end. Runs in the measuring process.

Who belongs to it is told by a word in the environment, which children inherit: a server may daemonise, start
sessions of its own or be killed in part, and nothing of it is overlooked or left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

_MARK = "POOL_BENCH_TREE"
_END_S, _LOOK_S = 10.0, 0.05


class Tree:
    """A started program and all that it starts.

    Args:
        command: To run.
        environment: More of it than this process has.
        folder: Working directory.
        output: Where it writes.

    Attributes:
        process: The one that was started.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], folder: Path, output: IO[str]
    ) -> None:
        mark = uuid.uuid4().hex
        self._entry = f"{_MARK}={mark}".encode()
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | {_MARK: mark},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def members(self) -> list[psutil.Process]:
        """Those that are there now."""
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with suppress(OSError, psutil.NoSuchProcess):
                if self._entry in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(name)))
        return found

    def cpu_s(self) -> dict[int, float]:
        """User and system seconds so far, by process."""
        seconds = {}
        for process in self.members():
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds[process.pid] = times.user + times.system
        return seconds

    def pss_bytes(self) -> int:
        """Memory of all, each page counted once."""
        total = 0
        for process in self.members():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def workers(self) -> list[int]:
        """Processes that have TensorFlow loaded and no child that has, busiest first: they run the model."""
        loaded: dict[int, float] = {}
        parents = set()
        for process in self.members():
            with suppress(OSError, psutil.Error):
                if "tensorflow" in Path(f"/proc/{process.pid}/maps").read_text():
                    times = process.cpu_times()
                    loaded[process.pid] = times.user + times.system
                    parents.add(process.ppid())
        leaves = [pid for pid in loaded if pid not in parents]
        return sorted(leaves, key=lambda pid: -loaded[pid])

    def end(self) -> None:
        """Ask it to end, then kill what is left of it."""
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and self._is_alive():
            time.sleep(_LOOK_S)
        while self._is_alive():
            for process in self.members():
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(_LOOK_S)
        self.process.wait()

    def _is_alive(self) -> bool:
        self.process.poll()  # reaps it
        return any(_runs(process) for process in self.members())


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def spent_us(before: dict[int, float], after: dict[int, float]) -> float:
    """CPU of a tree between two looks, in microseconds; what began meanwhile counts whole."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items()) * 1e6
