"""Keeps a process on the cores of its placement, whatever the backend. Runs in the zygote's forks only."""

from __future__ import annotations

import os

from pool.config import Placement
from pool.errors import ModelLoadError


def pin(placement: Placement) -> None:
    """Pin this process, and all threads it starts from now on, to the placement's cores, if it names any.

    Raises:
        ModelLoadError: a core is not there.
    """
    if placement.cores:
        try:
            os.sched_setaffinity(0, placement.cores)
        except OSError:
            there = sorted(os.sched_getaffinity(0))
            raise ModelLoadError(f"cores {list(placement.cores)} are not all there; got {there}") from None
