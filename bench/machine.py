"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil


def describe() -> dict[str, str]:
    """Kind of machine, versions, commit and date."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0))
    versions = {name: _version(name) for name in ("tensorflow-cpu", "tensorflow", "pyzmq", "numpy", "uvloop")}
    return {
        "machine": f"{model}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU used",
        "system": f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# What measurements write themselves.
_WRITTEN = (":!README.md", ":!bench/results*.json", ":!docs/peers-*.png")


def _commit() -> str:
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
    return f"{head}-dirty" if changed else head or "unknown"


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
