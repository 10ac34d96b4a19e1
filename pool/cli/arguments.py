"""Arguments that several commands take: the server to talk to, counts and durations."""

from __future__ import annotations

import argparse
import os

from pool.client.sync import Client
from pool.endpoints import check_endpoint, default_endpoint
from pool.errors import ConfigError

ANSWER_TIMEOUT_S = 10.0  # unless told otherwise
CONNECT_TIMEOUT_S = 3.0  # a server that is there is met within milliseconds


def add_endpoint(parser: argparse.ArgumentParser, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Declare `--endpoint`, its keys, and `--timeout`, which is `timeout_s` unless given."""
    parser.add_argument(
        "--endpoint",
        metavar="E",
        type=_endpoint,
        help="where the server is (default: " + default_endpoint().replace("%", "%%") + ")",
    )
    parser.add_argument(
        "--server-key",
        metavar="KEY",
        default=os.environ.get("POOL_SERVER_KEY") or None,
        help="the server's public key or its file, for tcp endpoints with keys (default: $POOL_SERVER_KEY)",
    )
    parser.add_argument(
        "--key",
        metavar="FILE",
        default=os.environ.get("POOL_KEY") or None,
        help="file of the secret key to connect with (default: $POOL_KEY)",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds,
        default=timeout_s,
        help=f"seconds to wait for an answer (default: {timeout_s:g})",
    )


def connect(args: argparse.Namespace) -> Client:
    """A client for the endpoint that was given, with that timeout."""
    timeout: float = args.timeout
    return Client(
        args.endpoint or default_endpoint(),
        timeout=timeout,
        connect_timeout=min(timeout, CONNECT_TIMEOUT_S),
        server_key=args.server_key,
        secret_key=args.key,
    )


def seconds(text: str) -> float:
    """A duration argument: a number above 0."""
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"wanted seconds from above 0 to 86400, got {text}")
    return value


def count(text: str) -> int:
    """A counting argument: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer of 1 or more, got {text}")
    return value


def _endpoint(text: str) -> str:
    try:
        check_endpoint(text)
    except ConfigError as e:
        raise argparse.ArgumentTypeError(e.message) from None
    return text
