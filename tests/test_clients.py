"""Who is connected, whatever the order in which ZeroMQ's two queues are read: messages and events."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pool.front.clients import Clients

ROOM = 1000


BARRED = "alice"


def bar(address):
    return "not alice" if address == BARRED else ""


class Peer:
    """A connection, and what of it is still to be read."""

    def __init__(self, identity, fd, address):
        self.address = address
        self.identity = identity
        self.fd = fd
        self.is_open = True
        self.messages = 0
        self.client = None


class Way:
    """A line, as far as records care."""

    def send(self, _frames):
        return True


class Connecting(RuleBasedStateMachine):
    """ZeroMQ with a ROUTER, its monitor and the clients; and a front that reads them in any order."""

    @initialize(names=st.booleans())
    def start(self, names):
        self.clients = Clients(ROOM)
        self.has_names = names
        self.events = deque()
        self.peers = []  # those open, or with messages left
        self.made = 0
        self.lines = []

    @rule()
    def begin_a_line(self):
        self.lines.append(self.clients.came(Way(), "line"))

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def end_a_line(self, data):
        client = self.lines.pop(data.draw(st.integers(0, len(self.lines) - 1)))
        assert not client.is_gone
        self.clients.lose(client)

    @rule(
        name=st.sampled_from([b"\0four", b"name", b"\0", b"other"]),
        is_named=st.booleans(),
        address=st.sampled_from(["", BARRED]),
    )
    def connect(self, name, is_named, address):
        used = {peer.fd for peer in self.peers if peer.is_open}
        fd = min(set(range(7, 99)) - used)  # the kernel gives the lowest there is
        identity = name[:4]
        # ZeroMQ takes a name again only when nothing is left of the connection that had it.
        if not (self.has_names and is_named) or any(peer.identity == identity for peer in self.peers):
            self.made += 1
            identity = b"\0" + self.made.to_bytes(4, "big")
        self.peers.append(Peer(identity, fd, address))
        self.events.append((True, fd))

    @precondition(lambda self: any(peer.is_open for peer in self.peers))
    @rule(data=st.data(), count=st.integers(1, 3))
    def send(self, data, count):
        data.draw(st.sampled_from([peer for peer in self.peers if peer.is_open])).messages += count

    @precondition(lambda self: any(peer.is_open for peer in self.peers))
    @rule(data=st.data())
    def disconnect(self, data):
        peer = data.draw(st.sampled_from([peer for peer in self.peers if peer.is_open]))
        peer.is_open = False
        self.events.append((False, peer.fd))
        self._forget_spent()

    def _forget_spent(self):
        self.peers = [peer for peer in self.peers if peer.is_open or peer.messages]

    def _read_event(self):
        is_accepted, fd = self.events.popleft()
        (self.clients.accepted if is_accepted else self.clients.disconnected)(fd)

    @precondition(lambda self: self.events)
    @rule(count=st.integers(1, 4))
    def read_events(self, count):
        for _ in range(min(count, len(self.events))):
            self._read_event()

    @precondition(lambda self: any(peer.messages for peer in self.peers))
    @rule(data=st.data())
    def read_message(self, data):
        peer = data.draw(st.sampled_from([peer for peer in self.peers if peer.messages]))
        peer.messages -= 1
        client = self.clients.numbered.get(peer.identity)
        if client is None:
            while self.events:
                self._read_event()
            client = self.clients.meet(peer.identity, peer.fd, peer.address, bar)
        if client is not None:
            assert bool(client.barred) == (peer.address == BARRED), "taken for somebody else"
        if peer.is_open:
            assert client is not None, "a living client is taken for gone"
            assert peer.client in (None, client), "one connection, two records"
            assert client is not next((p.client for p in self.peers if p is not peer), None)
        peer.client = client
        self._forget_spent()

    @precondition(lambda self: any(peer.client is not None and not peer.is_open for peer in self.peers))
    @rule(data=st.data())
    def fail_to_send(self, data):
        gone = [peer for peer in self.peers if peer.client is not None and not peer.is_open]
        self.clients.lose(data.draw(st.sampled_from(gone)).client)

    @invariant()
    def the_living_are_there(self):
        for peer in self.peers:
            assert not (peer.is_open and peer.client is not None and peer.client.is_gone)

    @invariant()
    def the_barred_do_not_go_the_fast_way(self):
        assert not any(client.barred for client in self.clients.numbered.values())

    @invariant()
    def the_gone_are_told_once(self):
        gone = self.clients.take_gone()
        assert len(set(gone)) == len(gone)
        for client in gone:
            assert client.is_gone
            assert client.room_bytes == (0 if client.line is None else -1)

    def teardown(self):
        for peer in [peer for peer in self.peers if peer.is_open]:
            peer.is_open = False
            self.events.append((False, peer.fd))
        for peer in self.peers:
            while peer.messages:
                peer.messages -= 1
                if peer.identity not in self.clients.numbered:
                    while self.events:
                        self._read_event()
                    self.clients.meet(peer.identity, peer.fd, peer.address, bar)
        while self.events:
            self._read_event()
        assert len(self.clients) == 0
        assert not self.clients.numbered
        assert not self.clients._others
        assert all(peer.client is None or peer.client.is_gone for peer in self.peers)
        assert self.clients.lines == len(self.lines)
        assert not any(client.is_gone for client in self.lines)


Connecting.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
TestConnecting = Connecting.TestCase


@pytest.fixture
def clients():
    made = Clients(ROOM)
    made.accepted(7)
    return made


NUMBERED = b"\0\0\0\0\1"


def test_a_record_lasts_from_the_first_message_to_the_end_of_the_connection(clients):
    client = clients.meet(NUMBERED, 7)
    assert clients.numbered == {NUMBERED: client}
    assert client.room_bytes == ROOM
    clients.disconnected(7)
    assert client.is_gone
    assert clients.numbered == {}
    assert clients.take_gone() == [client]
    assert clients.take_gone() == []


def test_a_message_read_after_its_connection_ended_is_nobodys(clients):
    clients.disconnected(7)
    assert clients.meet(NUMBERED, 7) is None


def test_a_message_of_an_earlier_connection_with_that_descriptor_costs_the_present_one_nothing(clients):
    clients.disconnected(7)
    clients.accepted(7)
    late = clients.meet(NUMBERED, 7)
    present = clients.meet(b"\0\0\0\0\2", 7)
    assert not present.is_gone
    clients.disconnected(7)
    assert late.is_gone
    assert present.is_gone


def test_a_name_that_comes_back_by_another_connection_is_another_client(clients):
    before = clients.meet(b"name", 7)
    clients.accepted(8)
    after = clients.meet(b"name", 8)
    assert before.is_gone
    assert after is not before
    clients.disconnected(7)
    assert clients.meet(b"name", 8) is after


def test_connections_are_counted_from_their_beginning(clients):
    assert len(clients) == 1
    clients.accepted(8)
    assert len(clients) == 2
    clients.disconnected(7)
    assert len(clients) == 1


def test_accounts_without_rows_may_be_forgotten(clients):
    client = clients.meet(NUMBERED, 7)
    named = Clients(ROOM)
    idle, busy = client.account("old"), client.account("new")
    assert client.account("old") is idle
    assert not client.has_rows
    busy.rows = 3
    assert client.has_rows
    clients.forget_idle_accounts()
    assert client.accounts == {"new": busy}
    assert len(named) == 0


# -- lines ---------------------------------------------------------------------------------------------


def test_a_line_is_a_client_of_its_own_until_it_is_lost(clients):
    way, other = Way(), Way()
    client, second = clients.came(way, "line:1:-1:2"), clients.came(other, BARRED)
    assert (client.line, client.address, client.fd) == (way, "line:1:-1:2", -1)
    assert client.room_bytes < 0, "no reply takes the short way to the socket"
    assert client.identity != second.identity
    assert not second.barred, "who may not come in was not let in"
    assert (clients.lines, len(clients), clients.numbered) == (2, 1, {})
    clients.lose(client)
    assert client.is_gone
    assert client.room_bytes < 0
    assert (clients.lines, clients.take_gone()) == (1, [client])
    clients.lose(client)
    assert clients.take_gone() == []
    assert not second.is_gone


def test_a_line_and_a_socket_are_not_taken_for_each_other(clients):
    """Not even where a client names itself as a line is named."""
    client = clients.came(Way(), "line")
    named = clients.meet(client.identity, 7)
    assert named is not client
    assert named.line is None
    clients.disconnected(7)
    assert (named.is_gone, client.is_gone, clients.lines) == (True, False, 1)
    clients.accepted(8)
    named = clients.meet(client.identity, 8)
    clients.lose(client)
    assert (named.is_gone, client.is_gone, clients.lines) == (False, True, 0)


def test_descriptors_that_end_are_not_those_of_lines(clients):
    client = clients.came(Way(), "line")
    for fd in (-1, 7):
        clients.disconnected(fd)
        clients.accepted(fd)
        clients.disconnected(fd)
    assert not client.is_gone


def test_a_line_has_accounts_as_others_have(clients):
    client = clients.came(Way(), "line")
    idle, busy = client.account("old"), client.account("new")
    busy.rows = 3
    assert idle is not busy
    assert client.has_rows
    clients.forget_idle_accounts()
    assert client.accounts == {"new": busy}
    client.check_access()
