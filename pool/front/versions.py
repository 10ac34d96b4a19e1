"""Whether a model's folder holds a newer version than is served. Used by the front and by `pool reload`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pool.config import Config


def newer_versions(config: Config, served: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """By model that is to serve the highest version: the one it serves and the highest, where they differ.

    Args:
        config: Of the server.
        served: By model: the version it serves.
    """
    found = {}
    for name, model in config.models.items():
        if name in served and model.version is None:
            highest = highest_version(model.path)
            if highest is not None and highest != served[name]:
                found[name] = (served[name], highest)
    return found


def highest_version(path: str) -> int | None:
    """The highest numbered folder in a model's path; None where versions are no folders."""
    try:
        with os.scandir(path) as entries:
            return max((int(e.name) for e in entries if e.name.isdecimal() and e.is_dir()), default=None)
    except OSError:
        return None
