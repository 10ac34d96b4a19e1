"""Who is connected: a record of each client from its first message to its connection's end. Pure; front.

ZeroMQ tells of messages by the client's identity, and of connections by their file descriptor, in two
queues of their own. What it holds to (libzmq 4.3.5, one I/O thread):

- A descriptor is accepted, disconnected, accepted again, …; each is told before what follows from it:
  "accepted" before any message of that connection, "disconnected" before the descriptor is used again.
- A message knows its connection's descriptor, not which of the connections that had it. It may be read
  after its connection has ended, and after another one got the descriptor.
- Identities that ZeroMQ makes up (5 bytes, the first 0) are not used again. One that a client chose
  itself may come back with its next connection, after the last message of the one before was read.

So whoever meets an identity first reads all events there are. If the descriptor is closed by then, so is
the message's connection. If it is open, the message belongs to the connection that has it now, or to one
that had it earlier: in any case the client is gone when that descriptor is next disconnected. A client
is thus never given up while it lives, and never kept for longer than its descriptor is in use.

A client that talks over a line (`pool.front.lines`) is one of its own. Its line tells when it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pool.errors import Forbidden
from pool.front.outbox import Outbox
from pool.front.slots import Account

_NUMBERED_BYTES = 5  # of the identities that ZeroMQ makes up


class Way(Protocol):
    """How messages go to a client past ZeroMQ (`pool.front.lines.Line`)."""

    def send(self, frames: Sequence[Any]) -> bool:
        """Send a message; False if it was dropped."""


class Client:
    """One client, as long as it is connected.

    Attributes:
        identity: Where its replies go, as ZeroMQ knows it; of a line, only a name for the log.
        line: Where they go past ZeroMQ; None if they do not.
        fd: Its connection's file descriptor; the number only, ZeroMQ's to use. -1 of a line.
        accounts: What it has in the slots, by generation.
        room_bytes: Of replies that may be sent before ZeroMQ is asked again what has left; below 0 of a line.
        outbox: What is known of the replies that ZeroMQ still has; None before the first such question.
        is_gone: Whether its connection has ended.
        address: Of its end, as ZeroMQ has it: on ipc, the user and the process.
        barred: Why it may not use the server; empty if it may.
    """

    __slots__ = ("accounts", "address", "barred", "fd", "identity", "is_gone", "line", "outbox", "room_bytes")

    def __init__(
        self, identity: bytes, fd: int, room_bytes: int, address: str = "", barred: str = ""
    ) -> None:
        self.identity = identity
        self.line: Way | None = None
        self.fd = fd
        self.accounts: dict[Any, Account] = {}
        self.room_bytes = room_bytes
        self.outbox: Outbox | None = None
        self.is_gone = False
        self.address = address
        self.barred = barred

    def check_access(self) -> None:
        """Make sure that it may use the server.

        Raises:
            Forbidden: it may not.
        """
        if self.barred:
            raise Forbidden(self.barred)

    def account(self, generation: Any) -> Account:
        """Its account with a generation, opened if it has none."""
        account = self.accounts.get(generation)
        if account is None:
            account = self.accounts[generation] = Account()
        return account

    @property
    def has_rows(self) -> bool:
        """Whether any of its rows lie in slots."""
        return any(account.rows for account in self.accounts.values())


class Clients:
    """The records.

    Args:
        room_bytes: What each starts with.

    Attributes:
        numbered: By identity, those whose identity ZeroMQ made up (it names one connection and no other)
            and who may use the server.
        gone: Those lost since the shell last took them from here.
    """

    def __init__(self, room_bytes: int) -> None:
        self.numbered: dict[bytes, Client] = {}
        self.gone: list[Client] = []
        self._room_bytes = room_bytes
        self._others: dict[bytes, Client] = {}
        self._open: dict[int, list[Client]] = {}  # by descriptor; without a message, an empty list
        self._of_lines: dict[bytes, Client] = {}
        self._line_numbers = itertools.count(1)

    def __len__(self) -> int:
        """How many connections there are, lines not counted: whoever has one is connected anyway."""
        return len(self._open)

    def accepted(self, fd: int) -> None:
        """Event: a connection has begun."""
        self.disconnected(fd)
        self._open[fd] = []

    def disconnected(self, fd: int) -> None:
        """Event: the connection with this descriptor has ended."""
        for client in self._open.pop(fd, ()):
            self._lose(client)

    def meet(
        self, identity: bytes, fd: int, address: str = "", bar: Callable[[str], str] = lambda _: ""
    ) -> Client | None:
        """A message of an identity that is not among `numbered`; all events there are have been told.

        Args:
            identity: Of the sender.
            fd: Its connection's descriptor.
            address: Of the connection's other end.
            bar: Asked about the address of one that is new: why it may not use the server; empty if it may.

        Returns:
            Whose message it is; None if its connection has ended.
        """
        claimants = self._open.get(fd)
        if claimants is None:
            return None
        client = self._others.get(identity)
        if client is not None:
            # Not by the name alone: whoever takes another one's name must not be taken for him.
            if client.fd == fd and client.address == address:
                return client
            self.lose(client)  # it comes back by another connection
        client = Client(identity, fd, self._room_bytes, address, bar(address))
        is_numbered = len(identity) == _NUMBERED_BYTES and identity[0] == 0
        records = self.numbered if is_numbered and not client.barred else self._others
        records[identity] = client
        claimants.append(client)
        return client

    def came(self, line: Way, address: str) -> Client:
        """Event: a line has begun. Gives its client, whose end is to be told by `lose`.

        Args:
            line: Where its replies go.
            address: Of its end, as ZeroMQ would have it.
        """
        client = Client(b"line%d" % next(self._line_numbers), -1, -1, address)
        client.line = line
        self._of_lines[client.identity] = client
        return client

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return len(self._of_lines)

    def lose(self, client: Client) -> None:
        """The client cannot be reached any more; nothing happens if that is known."""
        if not client.is_gone:
            if client.line is None:
                self._open[client.fd].remove(client)
            self._lose(client)

    def _lose(self, client: Client) -> None:
        client.is_gone = True
        client.room_bytes = min(client.room_bytes, 0)  # whoever still has a reply for it is made to look
        for records in (self.numbered, self._others, self._of_lines):
            if records.get(client.identity) is client:
                del records[client.identity]
        self.gone.append(client)

    def take_gone(self) -> list[Client]:
        """Those lost since the last call."""
        gone, self.gone = self.gone, []
        return gone

    def forget_idle_accounts(self) -> None:
        """Drop accounts without rows: they say nothing, and may be with generations that are no more."""
        for records in (self.numbered, self._others, self._of_lines):
            for client in records.values():
                client.accounts = {with_: a for with_, a in client.accounts.items() if a.rows}
