"""`pool COMMAND ...`: find the command, run it, turn how it ended into an exit code.

0    done
1    it failed while running; `pool: CODE: message` on the error output
2    wrong arguments, or a mistake in the configuration file
130  interrupted by Ctrl-C
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from pool import __version__
from pool.errors import ConfigError, PoolError

COMMANDS = {
    "serve": "serve the models of a configuration file",
    "check": "load every model of a configuration file once, tell what was found, serve nothing",
    "predict": "send one request and show its answer",
    "reload": "have a running server read its configuration file again",
    "status": "show what a server is doing",
    "keys": "make the keys that secure tcp endpoints",
    "top": "watch a server live: rates, times by stage, workers, last errors",
    "bench": "measure a server under load",
    "chaos": "kill, stop, crash and hang a server's processes under checked load, and tell what that cost",
    "install-service": "write the files that have systemd run servers",
    "demo": "train, serve and check a model that reads handwritten digits",
}

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130


class Command(Protocol):
    """What a module of `pool.cli` that is a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it.

        Returns:
            The exit code.

        Raises:
            ConfigError: a mistake of the caller (exit code 2).
            PoolError: anything else that went wrong (exit code 1).
        """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; never raises for what a user can cause."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command, args = _parse(argv)
        code = command.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except ConfigError as e:
        print(e.message, file=sys.stderr)
        return WRONG_USE
    except PoolError as e:
        print(f"pool: {e.code}: {e.message}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Whoever read the output has seen enough. What is still buffered must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as e:
        print(f"pool: {e.filename or 'system'}: {e.strerror or e}", file=sys.stderr)
        return FAILED
    return code


def _parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Parse with only the module of the command called imported, so that `pool --help` is quick."""
    parser = argparse.ArgumentParser(
        prog="pool", description="Serve TensorFlow models from one machine.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pool {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    command: Command | None = None
    for name, sentence in COMMANDS.items():
        sub = commands.add_parser(name, help=sentence, description=f"{sentence[0].upper()}{sentence[1:]}.")
        if name == called:
            module = name.replace("-", "_")
            command = cast(Command, importlib.import_module(f"pool.cli.{module}"))
            command.add_arguments(sub)
    args = parser.parse_args(argv)
    if command is None:
        parser.error(f"wanted a command: {', '.join(COMMANDS)}")
    return command, args


if __name__ == "__main__":
    sys.exit(main())
