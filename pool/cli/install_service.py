"""`pool install-service`: write the files of `systemd/` where systemd reads them, paths filled in.

Nothing is written unless everything can be. A file that somebody changed is not overwritten: each carries a
hash of its content, which tells an older version of ours from an edited one.

Where the unit hides what runs the service, or the models of a configuration, drop-ins show it these
(`pool.cli.visibility`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

from pool.cli import visibility
from pool.config import read_config
from pool.errors import ConfigError

# What is installed, and where below the prefix.
FILES = {
    "pool@.service": "systemd/system/pool@.service",
    "pool@.socket": "systemd/system/pool@.socket",
    "sysusers.d/pool.conf": "sysusers.d/pool.conf",
    "tmpfiles.d/pool.conf": "tmpfiles.d/pool.conf",
}
GPU_FILES = {"gpu.conf": "systemd/system/pool@.service.d/50-gpu.conf"}

_PLACE = "@POOL@"
_HEAD = "# Written by `pool install-service`; to change something, make a drop-in. sha256 "

# What shows a service its installation, and one service what its configuration names.
_SHOWN = "systemd/system/pool@.service.d/40-installation.conf"
_SHOWN_TO_ONE = "systemd/system/pool@{}.service.d/40-configuration.conf"

_NEXT = """\
next: systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload
      write /etc/pool/NAME.toml, then: systemctl enable --now pool@NAME.socket pool@NAME.service
      (after the file names models in a home or a temporary folder: pool install-service once more)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--root", metavar="DIR", type=Path, default=Path("/"), help="the system to write to (default: /)"
    )
    parser.add_argument(
        "--prefix",
        metavar="DIR",
        default="/etc",
        help="folder below it of systemd/system and the others (default: /etc; packages: /usr/lib)",
    )
    parser.add_argument(
        "--executable",
        metavar="PATH",
        help="the pool command that the service runs (default: that of this installation)",
    )
    parser.add_argument("--gpu", action="store_true", help="let the services use NVIDIA GPUs")
    parser.add_argument(
        "--list-paths",
        action="store_true",
        help="write nothing; tell which files and folders the service must see to run this installation",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that were changed")


def run(args: argparse.Namespace) -> int:
    """Write the files and say which.

    Raises:
        ConfigError: the command cannot be run by the service, or a file there is somebody else's.
        OSError: it cannot be written there.
    """
    if args.list_paths:
        print("\n".join(visibility.installation_paths()))
        return 0
    words = [args.executable] if args.executable else installed_command()
    command = quote_command(words)
    folder = args.root / args.prefix.lstrip("/")
    files = FILES | GPU_FILES if args.gpu else FILES
    texts = {folder / place: sealed(_template(name), command) for name, place in files.items()}
    shown: dict[Path, str | None] = {folder / _SHOWN: installation_drop_in(words)}
    for file in sorted((args.root / "etc/pool").glob("*.toml")):
        seen_as = f"/{file.relative_to(args.root)}"
        shown[folder / _SHOWN_TO_ONE.format(file.stem)] = configuration_drop_in(file, seen_as)
    texts |= {path: sealed(text) for path, text in shown.items() if text}
    # What was shown once and need not be any more.
    dead = [folder / _SHOWN, *folder.glob(_SHOWN_TO_ONE.format("*"))]
    dead = [path for path in dead if shown.get(path, "") == "" and path.exists() and is_ours(_content(path))]
    stale = [path for path, text in texts.items() if _content(path) != text]
    changed = [str(path) for path in stale if not is_ours(_content(path))]
    if changed and not args.force:
        raise ConfigError(
            f"{', '.join(changed)}: not as `pool install-service` wrote it; move the changes to a drop-in "
            "(systemctl edit), or overwrite it with --force"
        )
    for path, text in texts.items():
        if path in stale:
            _write(path, text)
        print(f"{'wrote' if path in stale else 'unchanged'} {path}")
        for line in (shown.get(path) or "").splitlines():
            if not line.startswith(("#", "[")):
                print(f"    {line}")
    for path in dead:
        path.unlink()
        print(f"removed {path}")
    if stale or dead:
        print(_NEXT)
    return 0


def installed_command() -> list[str]:
    """The `pool` command of the interpreter that runs this."""
    script = Path(sys.executable).with_name("pool")
    return [str(script)] if script.exists() else [sys.executable, "-m", "pool"]


def installation_drop_in(words: list[str]) -> str:
    """What shows the service the installation it runs; empty if it sees that anyhow.

    Raises:
        ConfigError: it cannot be shown.
    """
    if not os.path.exists(words[0]):  # it is to be installed yet, or in another system than this one
        if visibility.is_hidden(words[0]):
            raise ConfigError(
                f"{words[0]}: the service does not see it there, and what it needs is not known"
            )
        return ""
    paths = visibility.ask_installation(words)
    for path in filter(visibility.is_closed, paths):
        raise ConfigError(
            f"{path}: the user that servers run as may not read it; install pool elsewhere "
            "(python3 -m venv /opt/pool), or let all read it"
        )
    closed = {path: visibility.closed_folder(path) for path in paths if not visibility.is_hidden(path)}
    folders = {folder for folder in closed.values() if folder is not None}
    return visibility.drop_in(
        "# What runs the service lies where the unit hides it, or under a folder closed to its user.",
        [path for path in paths if visibility.is_hidden(path) or closed[path] is not None],
        folders,
        must_exist=True,
    )


def configuration_drop_in(file: Path, seen_as: str) -> str | None:
    """What shows one service the models and keys of its configuration file; empty if it sees them anyhow.

    A file with mistakes is passed over, and said so: it may be half written. None then: what the service was
    shown before, it may need again.

    Args:
        file: Where it is now.
        seen_as: Where it is for the service.
    """
    try:
        config = read_config(file)
    except ConfigError as e:
        print(f"passed over {e.message.splitlines()[0]}")
        return None
    paths = [path for path in visibility.configuration_paths(config, seen_as) if visibility.is_hidden(path)]
    for path in filter(visibility.is_closed, paths):
        print(f"warning: {path}: the user that servers run as may not read it")
    return visibility.drop_in(
        "# The unit hides what the configuration file names. Written again: pool install-service.",
        paths,
        must_exist=False,
    )


def quote_command(words: list[str]) -> str:
    """A command line as ExecStart= takes it.

    Raises:
        ConfigError: the command is not an absolute path, or a word has what a unit cannot hold.
    """
    if not words[0].startswith("/"):
        raise ConfigError(f"--executable {words[0]!r}; wanted an absolute path")
    quoted = []
    for word in words:
        if not word.isprintable() or "$" in word:
            raise ConfigError(f"{word!r}: wanted a path without $ and control characters")
        word = word.replace("%", "%%")
        if re.fullmatch(r"[\w%+,./:@=-]+", word) is None:
            word = '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
        quoted.append(word)
    return " ".join(quoted)


def sealed(template: str, command: str = "") -> str:
    """A file's text: the template with the command filled in, below the line that tells whose it is."""
    body = template.replace(_PLACE, command)
    return f"{_HEAD}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def is_ours(text: str | None) -> bool:
    """Whether a file is as `pool install-service` wrote it once, or not there."""
    if text is None:
        return True
    head, _, body = text.partition("\n")
    return head == _HEAD + hashlib.sha256(body.encode()).hexdigest()


def _template(name: str) -> str:
    """A file of `systemd/`, as installed with the package, or in the checkout that it is run from."""
    installed = Path(__file__).with_name("systemd")
    folder = installed if installed.exists() else Path(__file__).parents[2] / "systemd"
    return (folder / name).read_text()


def _content(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Put a file in its place at once, readable by everybody whatever the umask is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.new")
    made.write_text(text)
    made.chmod(0o644)
    made.replace(path)
