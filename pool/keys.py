"""CURVE key files: what is in them, who may read them. Used by front, clients and commands.

A pair is two small TOML files. NAME.key holds `secret_key`, and is its owner's alone; NAME.pub holds
`public_key`, and is for those who are to recognise the owner. A key is 40 characters of Z85 (32 bytes).
"""

from __future__ import annotations

import os
import re
import stat

import msgspec

from pool.errors import ConfigError

SECRET_SUFFIX, PUBLIC_SUFFIX = ".key", ".pub"

KEY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.@-]*")

_KEY_CHARS = 40
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"

# Only its owner may write a secret key. The group may read it: a server need not own its file.
_FORBIDDEN_MODE = 0o027

_FILE_BYTES = 65_536  # most that is read of a file that may be something else

_SECRET_TEXT = """\
# A secret key of pool. Whoever has this file is taken for its owner: keep it to one machine and one user.
# The public key that belongs to it is in {public}.
secret_key = "{key}"
"""

_PUBLIC_TEXT = """\
# A public key of pool; it need not be kept secret. The key of a client goes into the directory that
# `authorized_keys` of the server names; the key of a server goes to its clients (`server_key`).
public_key = "{key}"
"""


class _SecretFile(msgspec.Struct, forbid_unknown_fields=True):
    secret_key: str


class _PublicFile(msgspec.Struct, forbid_unknown_fields=True):
    public_key: str


def is_key(text: str) -> bool:
    """Whether a text is a key: 40 characters of Z85."""
    if len(text) != _KEY_CHARS or not all(char in _Z85 for char in text):
        return False
    groups = (text[at : at + 5] for at in range(0, _KEY_CHARS, 5))
    return all(_value(group) < 2**32 for group in groups)


def _value(group: str) -> int:
    value = 0
    for char in group:
        value = value * len(_Z85) + _Z85.index(char)
    return value


def read_secret_key(path: str | os.PathLike[str]) -> str:
    """The secret key of a file.

    Raises:
        ConfigError: it cannot be read, is open to others, or holds none. The sentence never has the key.
    """
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError as e:
        raise _unreadable(path, e) from None
    if mode & _FORBIDDEN_MODE:
        raise ConfigError(
            f"key file {os.fspath(path)}: must be open to its owner alone (mode 0600), got mode 0{mode:o}"
        )
    return _read(path, _SecretFile, "secret_key")


def read_public_key(path: str | os.PathLike[str]) -> str:
    """The public key of a file.

    Raises:
        ConfigError: it cannot be read or holds none.
    """
    return _read(path, _PublicFile, "public_key")


def _read(path: str | os.PathLike[str], kind: type[_SecretFile | _PublicFile], field: str) -> str:
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = file.read(_FILE_BYTES)
    except OSError as e:
        raise _unreadable(path, e) from None
    try:
        key: str = getattr(msgspec.toml.decode(content, type=kind), field)
    except (msgspec.DecodeError, UnicodeDecodeError):
        other = "secret_key" if field == "public_key" else "public_key"
        is_other = re.search(rb"^\s*" + other.encode() + rb"\s*=", content, re.MULTILINE) is not None
        got = f"a {other}" if is_other else "something else"
        raise ConfigError(f'key file {name}: must hold {field} = "…" and nothing else, got {got}') from None
    if not is_key(key):
        raise ConfigError(f"key file {name}: {field} must be {_KEY_CHARS} characters of Z85, got no such key")
    return key


def _unreadable(path: str | os.PathLike[str], e: OSError) -> ConfigError:
    return ConfigError(f"key file {os.fspath(path)}: must be readable, got {e.strerror}")


def write_pair(directory: str, name: str, public: str, secret: str) -> tuple[str, str]:
    """Write the two files of a pair.

    Args:
        directory: Made if it is missing.
        name: Of the pair.
        public: Its public key.
        secret: Its secret key.

    Returns:
        The paths of the secret and of the public file.

    Raises:
        ConfigError: the name cannot be used, or one of the files is there already; nothing was written.
        OSError: they cannot be written.
    """
    if KEY_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"key name {name!r}; wanted letters, digits, '_', '-', and after the first also '.', '@'"
        )
    os.makedirs(directory, exist_ok=True)
    secret_file = os.path.join(directory, name + SECRET_SUFFIX)
    public_file = os.path.join(directory, name + PUBLIC_SUFFIX)
    if os.path.lexists(public_file):
        raise ConfigError(f"{public_file} is there already; wanted another name")
    _write(secret_file, 0o600, _SECRET_TEXT.format(public=name + PUBLIC_SUFFIX, key=secret))
    try:
        _write(public_file, 0o644, _PUBLIC_TEXT.format(key=public))
    except BaseException:
        os.unlink(secret_file)
        raise
    return secret_file, public_file


def _write(path: str, mode: int, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; wanted another name") from None
    try:
        with open(fd, "w", encoding="ascii") as file:
            os.fchmod(fd, mode)  # whatever the umask
            file.write(text)
    except BaseException:  # such as a full disk
        os.unlink(path)
        raise
