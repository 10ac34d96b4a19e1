"""`pool install-service`: write the files of `systemd/` where systemd reads them, paths filled in.

Nothing is written unless everything can be. A file that somebody changed is not overwritten: each carries a
hash of its content, which tells an older version of ours from an edited one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

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

# Folders that the unit hides from the service (ProtectHome=, PrivateTmp=).
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")

_NEXT = """\
next: systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload
      write /etc/pool/NAME.toml, then: systemctl enable --now pool@NAME.socket pool@NAME.service"""


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
    parser.add_argument("--force", action="store_true", help="overwrite files that were changed")


def run(args: argparse.Namespace) -> int:
    """Write the files and say which.

    Raises:
        ConfigError: the command cannot be run by the service, or a file there is somebody else's.
        OSError: it cannot be written there.
    """
    command = quote_command([args.executable]) if args.executable else installed_command()
    folder = args.root / args.prefix.lstrip("/")
    files = FILES | GPU_FILES if args.gpu else FILES
    texts = {folder / place: sealed(_template(name), command) for name, place in files.items()}
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
    if stale:
        print(_NEXT)
    return 0


def installed_command() -> str:
    """The `pool` command of the interpreter that runs this, as a unit writes it.

    Raises:
        ConfigError: it is where the service does not see it.
    """
    script = Path(sys.executable).with_name("pool")
    words = [str(script)] if script.exists() else [sys.executable, "-m", "pool"]
    for path in (words[0], os.path.realpath(sys.executable)):
        hidden = next((folder for folder in _HIDDEN if path.startswith(f"{folder}/")), None)
        if hidden is not None:
            raise ConfigError(
                f"{path}: the service, which does not see {hidden}, cannot run it; install pool elsewhere "
                "(python3 -m venv /opt/pool), or name the command it is to run with --executable"
            )
    return quote_command(words)


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


def sealed(template: str, command: str) -> str:
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
