"""`pool serve CONFIG`: become the front process of a configuration file."""

from __future__ import annotations

import argparse

from pool.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="the configuration file (TOML)")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop.

    Raises:
        ConfigError: a mistake in the file.
        PoolError: a model cannot be loaded, or an endpoint cannot be bound.
    """
    config = load_config(args.config)
    from pool.front.server import (
        serve,
    )  # after the check: a mistake is told before sockets and loop are imported

    return serve(config, args.config)
