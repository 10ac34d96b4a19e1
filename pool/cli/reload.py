"""`pool reload`: have a running server read its configuration file again, or tell what that would change."""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Any

import msgspec

from pool.cli.arguments import add_endpoint, connect
from pool.cli.output import console, print_json
from pool.config import Config, load_config
from pool.errors import ConfigError, InternalError, ModelLoadError
from pool.front.changes import compare
from pool.front.versions import newer_versions

_LOOK_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_endpoint(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="only tell what would change, and what that costs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Reload and wait for the outcome.

    Raises:
        ConfigError: the new file is wrong, or changes what needs a restart; nothing was changed.
        ModelLoadError: a model of it cannot be served; nothing was changed.
        Unavailable: no server answers there.
    """
    with connect(args) as client:
        front = client.status()["front"]
        if "reload" not in front:
            raise ConfigError(
                f"process {front['pid']} is an application that embeds its pool; only it can reload that"
            )
        path = front["reload"]["file"]
        if not os.path.exists(f"/proc/{front['pid']}"):
            raise ConfigError(f"the server is process {front['pid']} of another machine; reload it there")
        mistake: ConfigError | None = None
        try:
            new = load_config(path)
            if args.dry_run:
                _show([str(change) for change in _compare(client.status(), new)], args.json)
                return 0
        except ConfigError as e:
            if args.dry_run:
                raise
            mistake = e  # the server is asked all the same: it decides, and its log has the reason
        own = front["reload"]["begun"] + 1  # the first that reads the file from now on
        try:
            os.kill(front["pid"], signal.SIGHUP)
        except PermissionError:
            raise ConfigError(f"process {front['pid']} belongs to another user, who may reload it") from None
        while (outcome := _outcome(client.status()["front"]["reload"], own)) is None:
            time.sleep(_LOOK_S)
    if outcome["error"]:
        raise mistake or ModelLoadError(outcome["error"])
    _show(outcome["changes"], args.json)
    return 0


def _outcome(reloads: dict[str, Any], number: int) -> dict[str, Any] | None:
    """How the reload of that number went, or the first after it that is remembered; None while it goes."""
    return next((outcome for outcome in reloads["outcomes"] if outcome["number"] >= number), None)


def _compare(status: dict[str, Any], new: Config) -> list[Any]:
    try:
        now = msgspec.convert(status["front"]["config"], Config)
    except msgspec.ValidationError as e:
        raise InternalError(f"the server's configuration is not one of this version: {e}") from None
    models = {name: model for name, model in status["models"].items() if "slots" in model}
    slots = {name: model["slots"] for name, model in models.items()}
    versions = {name: model["version"] for name, model in models.items()}
    failed = {name for name, model in status["models"].items() if model["state"] == "failed"}
    return compare(now, new, slots, newer_versions(now, versions), failed)


def _show(changes: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"changes": changes})
        return
    out = console()
    for change in changes:
        out.print(change, markup=False, highlight=False)
    if not changes:
        out.print("nothing changes")
