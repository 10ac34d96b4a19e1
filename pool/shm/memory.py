"""Reserving shared memory, so that a lack of it is an error then and not a SIGBUS later. Any process.

Asking the kernel for more memory than there is does not fail: it kills processes until it can give it.
So what is there is looked up first.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def reserve(fd: int, size: int) -> None:
    """Give an empty memfd `size` bytes, every page of them allocated.

    Raises:
        MemoryError: they are not there; the memfd is left empty.
    """
    available = available_bytes()
    if size > available:
        raise MemoryError(f"{size:,} bytes of shared memory wanted; {available:,} are available")
    if size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as e:
            os.ftruncate(fd, 0)
            raise MemoryError(f"{size:,} bytes of shared memory wanted: {e.strerror}") from None


def available_bytes() -> int:
    """Memory this process could still be given: by the machine, and by its cgroup and those above it."""
    available = _meminfo_bytes("MemAvailable") + _meminfo_bytes("SwapFree")
    group = Path("/proc/self/cgroup").read_text().partition("0::/")[2].partition("\n")[0]
    return max(min(available, cgroup_available_bytes(Path("/sys/fs/cgroup"), group)), 0)


def cgroup_available_bytes(root: Path, group: str) -> int:
    """What a control group (of version 2) and those above it leave of their memory limits.

    Args:
        root: Where the hierarchy is mounted.
        group: Path of the group below it.

    Returns:
        Bytes; `sys.maxsize` where nothing sets a limit.
    """
    available = sys.maxsize
    folder = root / group
    try:
        while folder != root and root in folder.parents:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                # File pages nobody used lately count as used, and are given up on demand.
                cached = re.search(
                    r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE
                )
                available = min(available, int(limit) - used + int(cached[1] if cached else 0))
            folder = folder.parent
    except (OSError, ValueError):
        pass  # no cgroup version 2 here, or one without the memory controller
    return available


def _meminfo_bytes(name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
