"""Whether a model's folder or file holds another version than is served. Front, and `pool reload`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pool.config import Config, ModelConfig
from pool.python import source_version, split_path


def newer_versions(config: Config, served: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """By model that is to serve the newest version: the one it serves and the newest, where they differ.

    Args:
        config: Of the server.
        served: By model: the version it serves.
    """
    found = {}
    for name, model in config.models.items():
        if name in served and model.version is None:
            newest = newest_version(model)
            if newest is not None and newest != served[name]:
                found[name] = (served[name], newest)
    return found


def newest_version(model: ModelConfig) -> int | None:
    """The highest numbered folder in a model's path, or what its Python file is now; None for neither."""
    try:
        if model.backend == "python":
            split = split_path(model.path)
            return None if split is None else source_version(Path(split[0]).read_bytes())
        with os.scandir(model.path) as entries:
            return max((int(e.name) for e in entries if e.name.isdecimal() and e.is_dir()), default=None)
    except OSError:
        return None
