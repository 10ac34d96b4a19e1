"""`pool serve CONFIG`: become the front process of a configuration file."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from pool.config import load_config
from pool.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="the configuration file (TOML)")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop.

    Raises:
        ConfigError: a mistake in the file.
        PoolError: a model cannot be loaded, or an endpoint cannot be bound.
    """
    manager = os.environ.get("NOTIFY_SOCKET", "")  # which serving takes out of the environment
    try:
        config = load_config(args.config)
        # After the check: a mistake is told before sockets and loop are imported.
        from pool.front.server import serve

        return serve(config, args.config)
    except ConfigError as e:
        if _tell_manager(e, manager):
            return 2
        raise


def _tell_manager(error: ConfigError, manager: str) -> bool:
    """Tell a service manager why there is no server: its status line, and its journal as an error.

    Args:
        error: The reason.
        manager: The socket it listens at, or "".

    Returns:
        Whether the journal has it, so that nothing else need be said.
    """
    from pool.front import logs
    from pool.front.notify import Notifier, status

    with contextlib.suppress(ConfigError):
        Notifier(manager).send(status(error.message))
    if not logs.is_journal(os.environ, sys.stderr):
        return False
    logs.start(os.environ)
    logs.Log("pool").error("cannot serve", code=error.code, reason=error.message)
    return True
