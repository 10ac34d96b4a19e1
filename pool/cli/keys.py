"""`pool keys`: make a CURVE key pair for a server or a client, and show public keys."""

from __future__ import annotations

import argparse

import zmq

from pool.cli.output import print_json
from pool.errors import ConfigError
from pool.keys import SECRET_SUFFIX, read_public_key, read_secret_key, write_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = commands.add_parser(
        "new",
        help="make a key pair: NAME.key, which is to be kept secret, and NAME.pub",
        description="Make a key pair: NAME.key, which is to be kept secret, and NAME.pub.",
    )
    new.add_argument("--dir", metavar="DIR", default=".", help="where to (default: here)")
    new.add_argument("--name", metavar="NAME", default="pool", help="of the two files (default: pool)")
    new.add_argument("--json", action="store_true", help="print one JSON object")
    show = commands.add_parser(
        "show", help="print the public key of a key file", description="Print the public key of a key file."
    )
    show.add_argument("file", metavar="FILE", help="NAME.pub or NAME.key")


def run(args: argparse.Namespace) -> int:
    """Do the one or the other.

    Raises:
        ConfigError: the file is no key file; or the pair is there already, or its name cannot be used.
        OSError: the files cannot be written.
    """
    if not zmq.has("curve"):
        raise ConfigError(
            "this libzmq was built without CURVE; wanted a pyzmq wheel, or libzmq with libsodium"
        )
    if args.action == "show":
        print(_public_key(args.file))
        return 0
    public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
    secret_file, public_file = write_pair(args.dir, args.name, public, secret)
    if args.json:
        print_json({"secret_file": secret_file, "public_file": public_file, "public_key": public})
    else:
        print(f"{secret_file}  keep it secret\n{public_file}  {public}")
    return 0


def _public_key(path: str) -> str:
    if path.endswith(SECRET_SUFFIX):
        return zmq.curve_public(read_secret_key(path).encode("ascii")).decode("ascii")
    return read_public_key(path)
