"""The keys of a client: what it proves itself with to `tcp://` endpoints that are secured. Client process."""

from __future__ import annotations

import os
from typing import NamedTuple

import zmq

from pool.errors import ConfigError
from pool.keys import is_key, read_public_key, read_secret_key

Key = str | os.PathLike[str]  # a key itself, or its file

_KEY_CHARS = 40


class Keys(NamedTuple):
    """What a handshake needs, as Z85.

    Attributes:
        server: The server's public key.
        public: The client's own.
        secret: And the secret one that belongs to it.
    """

    server: bytes
    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Keys(server={self.server!r}, public={self.public!r})"

    def put_on(self, socket: zmq.Socket[bytes]) -> None:
        """Secure what the socket connects to next."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


def keys_of(server_key: Key | None, secret_key: Key | None) -> Keys | None:
    """A client's key arguments as its keys; None for none.

    Raises:
        ConfigError: one is given without the other, or is neither a key nor the file of one; or this
            libzmq has no CURVE.
    """
    if server_key is None and secret_key is None:
        return None
    if server_key is None or secret_key is None:
        given, wanted = ("secret_key", "server_key") if server_key is None else ("server_key", "secret_key")
        raise ConfigError(f"{given} without {wanted}; wanted both, or none of them")
    if not zmq.has("curve"):
        raise ConfigError("keys need a libzmq with CURVE (pyzmq's wheels have it); got one without")
    server = server_key if _is_key(server_key) else read_public_key(_file("server_key", server_key))
    secret = secret_key if _is_key(secret_key) else read_secret_key(_file("secret_key", secret_key))
    own = str(secret).encode("ascii")
    return Keys(str(server).encode("ascii"), zmq.curve_public(own), own)


def _is_key(value: Key) -> bool:
    return isinstance(value, str) and is_key(value)


def _file(name: str, value: Key) -> Key:
    """The file of a key; what may be a key with a slip in it is not shown in an error."""
    if isinstance(value, str) and len(value) == _KEY_CHARS and not os.path.exists(value):
        raise ConfigError(f"{name}: got {_KEY_CHARS} characters that are neither a key (Z85) nor a file")
    return value
