"""Finding a server: which of a client's endpoints to use. Client process.

Endpoints are dialled all at once, and the first in the caller's order that answers is used. One whose server
was `Unavailable` is avoided for a while: used only if no other answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import zmq

from pool.client.connection import Connection
from pool.client.curve import Keys
from pool.endpoints import check_endpoint, default_endpoint
from pool.errors import ConfigError, DeadlineExceeded, PoolError, Unavailable

# Seconds. A server that stops is gone, or one that starts is ready, after some such time; and where all are
# unavailable, this is how often a client goes from one to the next.
_AVOID_S = 5.0

# Seconds that an endpoint to be avoided waits for the others to answer: far longer than one that is there
# takes, whatever its models do.
_GRACE_S = 0.5


def endpoints_of(endpoint: str | Sequence[str] | None) -> tuple[str, ...]:
    """A client's `endpoint` argument as the endpoints to try.

    Raises:
        ConfigError: one is not well formed, or there is none.
    """
    if endpoint is None:
        endpoint = default_endpoint()
    endpoints = (endpoint,) if isinstance(endpoint, str) else tuple(endpoint)
    if not endpoints:
        raise ConfigError("endpoint is an empty list; wanted at least one endpoint")
    for each in endpoints:
        check_endpoint(each)
    return endpoints


def not_connected(dial: Dial, connect_timeout: float, timeout: float) -> PoolError:
    """The error of a call that met no server: turned away, or whichever of its two limits was the shorter."""
    endpoints = ", ".join(connection.endpoint for connection in dial.connections)
    obstacles = [
        f"{connection.endpoint} was reached, but {connection.obstacle}"
        for connection in dial.connections
        if connection.obstacle
    ]
    if dial.is_refused:
        return Unavailable("; ".join(obstacles))
    nobody = f"no pool server answered at {endpoints} within {min(connect_timeout, timeout):g} s"
    sentence = "; ".join([nobody, *obstacles])
    return DeadlineExceeded(sentence) if timeout < connect_timeout else Unavailable(sentence)


class Preference:
    """Which endpoints to use, and which only if there is no other. Pure; times are in seconds.

    Args:
        endpoints: In the caller's order.

    Threads may share one: each step is a single dict operation.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self.endpoints = tuple(endpoints)
        self._avoided_until: dict[str, float] = {}

    def avoid(self, endpoint: str, now: float) -> None:
        """Use the endpoint only if there is no other, for a while: it was unavailable."""
        self._avoided_until[endpoint] = now + _AVOID_S

    def is_avoided(self, endpoint: str, now: float) -> bool:
        """Whether the endpoint was unavailable a short while ago."""
        return now < self._avoided_until.get(endpoint, -math.inf)

    def has_better(self, endpoint: str, now: float) -> bool:
        """Whether the endpoint is avoided and another is not."""
        return self.is_avoided(endpoint, now) and not all(
            self.is_avoided(each, now) for each in self.endpoints
        )


class Dial:
    """Connections being made to all endpoints, of which one is to be used.

    Args:
        context: Of the sockets.
        preference: The endpoints.
        keys: For those that are secured; None for none.
        now: The present instant, in seconds.
        is_local: As of `Connection`.

    Raises:
        Unavailable: no socket could be made (file descriptors used up).

    Attributes:
        connections: Those that are the dial's. Ask `take` when the monitor of one is readable.
        decides_at: When to ask `take` although no monitor had anything to tell; infinity for never.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        preference: Preference,
        keys: Keys | None,
        now: float,
        is_local: bool = True,
    ) -> None:
        self._preference = preference
        self.connections: list[Connection] = []
        self.decides_at = now + _GRACE_S if len(preference.endpoints) > 1 else math.inf
        try:
            for endpoint in preference.endpoints:
                self.connections.append(Connection(context, endpoint, keys, is_local))
        except BaseException:
            self.close()
            raise

    def take(self, now: float) -> Connection | None:
        """The connection to use, which is the caller's from then on; None if that is not known yet."""
        preference = self._preference
        last_resort: Connection | None = None
        waits = False
        for connection in self.connections:
            is_connected = connection.is_connected()
            if not preference.has_better(connection.endpoint, now):
                if is_connected:
                    self.connections.remove(connection)
                    return connection
                waits = True
            elif is_connected and last_resort is None:
                last_resort = connection
        if last_resort is None or (waits and now < self.decides_at):
            return None
        self.connections.remove(last_resort)
        for connection in self.connections:  # they were no better, so need not be tried soon
            preference.avoid(connection.endpoint, now)
        return last_resort

    @property
    def is_refused(self) -> bool:
        """Whether every server has turned this client away, so that there is nothing to wait for."""
        return all(connection.is_refused for connection in self.connections)

    def close(self) -> None:
        """Close what was not taken."""
        for connection in self.connections:
            connection.close()
        self.connections.clear()
