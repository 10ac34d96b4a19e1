"""What processes and GPUs cost: CPU seconds and memory. Runs in the front; the looking, in a thread.

To read a process's memory map takes the kernel milliseconds, so nothing here belongs on the event loop.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil

Usage = dict[str, Any]

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits")
_NVIDIA_SMI_S = 5.0  # it takes 0.1 s; a driver that hangs must not take the thread for ever


class Member(NamedTuple):
    """A process of the server.

    Attributes:
        pid: Its id.
        role: `front`, `zygote`, or `worker`, with what it does beside serving: `quarantine`, ….
        model: Of a worker; empty for others.
        place: Of a worker within its model, or the backend of a zygote; empty for the front.
    """

    pid: int
    role: str
    model: str = ""
    place: str = ""


class GpuMemory(NamedTuple):
    """Memory of one GPU, in bytes."""

    number: str
    used_bytes: int
    total_bytes: int


def measure_processes(pids: Iterable[int]) -> dict[int, Usage]:
    """CPU seconds and memory of processes; zeros for one that is gone."""
    usage = {}
    for pid in pids:
        usage[pid] = no_usage(pid)
        try:
            process = psutil.Process(pid)
            times = process.cpu_times()
            memory = process.memory_full_info()
        except psutil.Error:
            continue  # it ended between the list and the look
        usage[pid] |= {"cpu_s": times.user + times.system, "uss_bytes": memory.uss, "pss_bytes": memory.pss}
    return usage


def no_usage(pid: int | None) -> Usage:
    """The usage of a process that is not there."""
    return {"pid": pid, "cpu_s": 0.0, "uss_bytes": 0, "pss_bytes": 0}


def measure_gpus() -> list[GpuMemory]:
    """Memory of each GPU, as `nvidia-smi` tells; empty where there is none."""
    program = shutil.which(_NVIDIA_SMI[0])
    if program is None:
        return []
    try:
        found = subprocess.run(
            [program, *_NVIDIA_SMI[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_NVIDIA_SMI_S,
            env=dict(os.environ, LC_ALL="C"),
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_gpus(found.stdout.decode("ascii", "replace"))


def read_gpus(text: str) -> list[GpuMemory]:
    """The lines of `nvidia-smi`: index, MiB used, MiB in all; others (`[N/A]`) are passed over."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and all(field.isdecimal() for field in fields):
            gpus.append(GpuMemory(fields[0], int(fields[1]) << 20, int(fields[2]) << 20))
    return gpus
