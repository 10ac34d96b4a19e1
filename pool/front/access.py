"""Who may use the server: clients with known keys on tcp, known users on ipc. Front, on its event loop.

A ROUTER hands its security options to each endpoint that it binds, as they are at that moment. So one
socket has both kinds, provided that what needs no keys is bound first: ZeroMQ's domain for keys (ZAP domain)
can be set, but not unset.

In the handshake of a secured endpoint ZeroMQ asks, on a socket inside the process, whether the client's key
is known (ZAP, https://rfc.zeromq.org/spec/27/); the connection is not made until that is answered. On ipc
it asks nothing, but tells the user at the other end with each message.
"""

from __future__ import annotations

import asyncio
import os
from ipaddress import ip_address

import zmq
from zmq.utils import z85

from pool.config import ServerConfig
from pool.config_rules import SECURED
from pool.endpoints import is_loopback
from pool.errors import ConfigError
from pool.front.authorized_keys import AuthorizedKeys
from pool.front.logs import Log
from pool.keys import read_secret_key

log = Log("pool.access")

_DOMAIN = b"pool"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
_NOBLOCK = int(zmq.NOBLOCK)


class Access:
    """Secures the endpoints of a ROUTER, and decides who may use them.

    Args:
        config: The `[server]` table.

    Attributes:
        refused: Connections refused for their key or their user.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._keys: AuthorizedKeys | None = None
        self._zap: zmq.Socket[bytes] | None = None
        self._fd = -1
        self.refused = 0

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Be ready to be asked; before anything is bound.

        Raises:
            ConfigError: there are keys, which this libzmq cannot use.
        """
        if self._config.authorized_keys is None:
            return
        check_curve()
        self._keys = AuthorizedKeys(self._config.authorized_keys)
        if not self._keys.names:
            log.warning("no key is authorized yet: nobody can connect by tcp")
        self._zap = context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(_ZAP_ADDRESS)
        self._fd = int(self._zap.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._answer)
        self._loop.call_soon(self._answer)

    def close(self) -> None:
        """Answer no more; the ROUTER is closed already."""
        if self._zap is not None:
            self._loop.remove_reader(self._fd)
            self._zap.close()

    def apply(self, config: ServerConfig) -> None:
        """Take over what of a new configuration concerns connections made from now on; read all keys anew."""
        self._config = config
        if self._keys is not None and config.authorized_keys is not None:
            self._keys = AuthorizedKeys(config.authorized_keys)

    @property
    def authorized(self) -> list[str] | None:
        """The names of the keys that are authorized now; None if there is no need of keys."""
        return None if self._keys is None else self._keys.names

    # -- tcp ------------------------------------------------------------------------------------------

    def secure(self, router: zmq.Socket[bytes], endpoint: str) -> None:
        """Set the options for an endpoint that is bound next. Those of `ipc://` come first.

        Raises:
            ConfigError: the secret key cannot be read.
        """
        if endpoint.startswith("ipc://") or self._config.curve_secret_key is None:
            return
        secret_key = read_secret_key(self._config.curve_secret_key)
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, secret_key.encode("ascii"))
        # Without it ZeroMQ lets everybody in if it finds nobody to ask.
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        router.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)

    def check_bound(self, endpoint: str, bound: str) -> None:
        """Look where an endpoint turned out to be: a name, or a socket handed over, may be anywhere.

        Args:
            endpoint: As it was asked for.
            bound: What ZeroMQ made of it.

        Raises:
            ConfigError: others can reach it, and it has no keys.
        """
        if self._config.insecure or self._config.curve_secret_key is not None or is_loopback(bound):
            return
        if not endpoint.startswith("ipc://"):
            raise ConfigError(f"endpoint {endpoint}: must be on loopback, {SECURED}, got {bound}")

    def _answer(self) -> None:
        """Answer what ZeroMQ asks: the descriptor tells of changes only, so until there is nothing."""
        zap = self._zap
        if zap is None or zap.closed:
            return
        while True:
            try:
                request = zap.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            try:
                answer = self._judge(request)
            except Exception:
                log.defect("cannot judge a key")
                answer = (b"500", b"internal error", b"")
            zap.send_multipart([_ZAP_VERSION, request[1], *answer, b""])

    def _judge(self, request: list[bytes]) -> tuple[bytes, bytes, bytes]:
        """Status code, text and user id. Code 400 tells the client that it is refused, and hangs up."""
        version, _, domain, address, _, mechanism, *credentials = request
        assert (version, domain, mechanism) == (_ZAP_VERSION, _DOMAIN, b"CURVE"), "what was asked for"
        assert self._keys is not None, "there are keys"
        key = z85.encode(credentials[0]).decode("ascii")
        name = self._keys.name_of(key)
        if name is None:
            log.warning("refused a client: not authorized", address=address.decode(), key=key)
            self.refused += 1
            return b"400", b"not authorized", b""
        log.debug("let a client in", address=address.decode(), name=name)
        return b"200", b"", name.encode()

    # -- ipc ------------------------------------------------------------------------------------------

    def bar(self, address: str) -> str:
        """Why a client may not use the server; empty if it may.

        Args:
            address: Of its end of the connection, as ZeroMQ has it (`Peer-Address`).
        """
        if self._config.ipc_uids is None:
            return ""
        uid = _uid(address)
        if uid is None or self.is_allowed(uid):
            return ""
        return f"user {uid} may not use this server"

    def is_allowed(self, uid: int) -> bool:
        """Whether a user at the other end of a Unix socket may use the server; who may not is counted."""
        allowed = self._config.ipc_uids
        # The server's own user has it in hand anyway, and reloads it by asking it.
        if allowed is None or uid in allowed or uid == os.geteuid():
            return True
        log.warning("refused a client: not in ipc_uids", uid=uid)
        self.refused += 1
        return False


def check_curve() -> None:
    """Make sure that keys can be used.

    Raises:
        ConfigError: this libzmq was built without CURVE.
    """
    if not zmq.has("curve"):
        raise ConfigError(
            "server.curve_secret_key: needs a libzmq with CURVE (pyzmq's wheels have it), got one without"
        )


def _uid(address: str) -> int | None:
    """The user of a peer address `NAME:UID:GID:PID`; None for the IP address of a tcp peer."""
    try:
        ip_address(address)
    except ValueError:
        return int(address.split(":")[-3])
    return None
