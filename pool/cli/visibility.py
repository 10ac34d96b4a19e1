"""What a service must see of the file system, what of it the unit hides, and the drop-in that shows it.

Used by `pool install-service`. The unit hides homes and temporary folders (ProtectHome=, PrivateTmp=), and
where the user `pool` may not enter a folder it does not see what is below. A checkout, a virtual environment
or its interpreter often lie there. The drop-in shows the service these alone, read-only.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pool.config import Config
from pool.errors import ConfigError

# What ProtectHome=yes hides, and what PrivateTmp=yes does.
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")

# The user that servers run as, and his group (`systemd/sysusers.d`).
_USER = "pool"

_ASK_TIMEOUT_S = 60.0


def installation_paths() -> list[str]:
    """What running this `pool` takes: files and folders of the interpreter, the packages, the checkout."""
    found = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    found += [str(Path(__file__).parents[2])]
    # Without the first entry where that is the folder of the script, or the one the command was given in.
    found += [path for path in sys.path[1:] if os.path.exists(path)]
    # Each link on the way to the interpreter itself. The environments of some tools chain several.
    executable = sys.executable
    while True:
        found.append(executable)
        if not os.path.islink(executable):
            break
        executable = os.path.join(os.path.dirname(executable), os.readlink(executable))
    return outermost([os.path.abspath(path) for path in found] + [os.path.realpath(path) for path in found])


def ask_installation(command: list[str]) -> list[str]:
    """The same of another `pool` command, which is run as systemd would: without this environment.

    Raises:
        ConfigError: it does not run so.
    """
    asked = [*command, "install-service", "--list-paths"]
    # The packages in the home of whoever calls are not there for the user `pool`.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHONNOUSERSITE": "1"}
    try:
        told = subprocess.run(
            asked,
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as e:
        last = (e.stderr.strip().splitlines() or [f"exit code {e.returncode}"])[-1]
        raise ConfigError(f"{command[0]}: the service cannot run it ({last})") from None
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ConfigError(f"{command[0]}: the service cannot run it ({e})") from None
    return told.stdout.splitlines()


def configuration_paths(config: Config, file: str) -> list[str]:
    """The files and folders that a configuration file names, and it itself if it is a link.

    Of a Python model also the folder of its file, which it may import from, unless that is a whole home.
    """
    folder = os.path.dirname(os.path.realpath(file))
    named = [model.file[0] for model in config.models.values()]
    named += [path for path in (config.server.curve_secret_key, config.server.authorized_keys) if path]
    found = [os.path.abspath(os.path.join(folder, path)) for path in named if not path.startswith("~")]
    for path, function in (model.file for model in config.models.values()):
        beside = os.path.dirname(os.path.realpath(os.path.join(folder, path)))
        if function and not path.startswith("~") and not _is_home(beside):
            found.append(beside)
    if os.path.islink(file):
        found.append(os.path.realpath(file))
    return outermost(found + [os.path.realpath(path) for path in found])


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths, sorted, without those that lie in another of them."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: Path(path).parts):
        if not kept or not _is_within(path, kept[-1]):
            kept.append(path)
    return kept


def is_hidden(path: str) -> bool:
    """Whether the unit hides it from the service."""
    return any(_is_within(path, folder) for folder in HOMES + TEMPORARY)


def _is_home(folder: str) -> bool:
    """Whether it is a home, or what homes and temporary files lie in: more than a model needs."""
    return folder in HOMES + TEMPORARY or os.path.dirname(folder) in ("/home", "/run/user")


def closed_folder(path: str) -> str | None:
    """The outermost folder above a path that the user `pool` may not enter; None if there is none."""
    return next((str(folder) for folder in reversed(Path(path).parents) if is_closed(folder)), None)


def is_closed(path: str | Path) -> bool:
    """Whether the user `pool` may not enter a folder, or not read a file, as far as owner and mode tell."""
    try:
        found = os.stat(path)
    except OSError:  # not there, or not for us to see
        return False
    with suppress(OSError):  # there are file systems without
        if "system.posix_acl_access" in os.listxattr(path):  # which may say anything
            return False
    wanted = stat.S_IXOTH if stat.S_ISDIR(found.st_mode) else stat.S_IROTH
    uid, gid = _user()
    if found.st_uid == uid:
        wanted <<= 6
    elif found.st_gid == gid:
        wanted <<= 3
    return not found.st_mode & wanted


def drop_in(reason: str, paths: list[str], closed: Iterable[str] = (), *, must_exist: bool) -> str:
    """What shows the service paths that are hidden from it, with empty folders in place of all beside them.

    Args:
        reason: A comment.
        paths: Hidden, absolute.
        closed: Folders above them that only others may enter: the service gets one of its own instead.
        must_exist: Whether systemd is not to start a service that lacks one; else the service tells.

    Returns:
        The drop-in; empty if there are no paths.

    Raises:
        ConfigError: a path has what a unit cannot hold.
    """
    if not paths:
        return ""
    paths = outermost(paths)
    lines = [reason, "[Service]"]
    if any(_is_within(path, home) for path in paths for home in HOMES):
        lines.append("ProtectHome=tmpfs")
    lines += [f"TemporaryFileSystem={_word(folder)}:ro" for folder in sorted(set(closed))]
    mark = "" if must_exist else "-"
    lines += [f"BindReadOnlyPaths={_word(path, mark)}" for path in paths]
    return "\n".join(lines) + "\n"


def _word(path: str, mark: str = "") -> str:
    if not path.isprintable() or any(char in path for char in ':"\\'):
        raise ConfigError(f'{path!r}: wanted a path without colons, ", \\ and control characters')
    word = mark + path.replace("%", "%%")
    return f'"{word}"' if " " in word else word


def _user() -> tuple[int | None, int | None]:
    """Number and group of the user `pool`; None before they are made."""
    uid = gid = None
    with suppress(KeyError):
        uid = pwd.getpwnam(_USER).pw_uid
    with suppress(KeyError):
        gid = grp.getgrnam(_USER).gr_gid
    return uid, gid


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
