"""When socket files are hidden and found again."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from pool.front.gate import Gate

LIMIT = 800  # of which a quarter is kept


@pytest.fixture
def path(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "pool.sock"))
        listening.listen()
        yield tmp_path / "pool.sock"


@pytest.fixture
def gate(path):
    made = Gate(LIMIT)
    made.add(str(path))
    return made


def test_it_closes_at_a_quarter_of_the_limit_and_opens_when_there_are_enough_again(gate, path, caplog):
    gate.accepted(599)
    assert path.exists()
    gate.accepted(600)
    assert not gate.is_open
    assert not path.exists()
    gate.accepted(601)
    gate.disconnected()  # this process has few files open
    assert gate.is_open
    with socket.socket(socket.AF_UNIX) as found:
        found.connect(str(path))
    assert "no more local connections" in caplog.text
    gate.disconnected()
    gate.remove()
    assert os.listdir(path.parent) == []


def test_it_stays_closed_while_descriptors_are_in_use(gate, path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gate.accepted(600)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # below those that are open
    try:
        gate.disconnected()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not gate.is_open
    gate.remove()
    assert os.listdir(path.parent) == []


def test_it_replaces_nobody_elses_socket(gate, path):
    gate.accepted(600)
    path.write_text("another server's")
    gate.disconnected()
    assert path.read_text() == "another server's"


@pytest.mark.parametrize("is_lent", [False, True])
def test_what_a_killed_server_left_is_removed(path, is_lent):
    path.with_name("pool.sock.full").write_text("")
    Gate(LIMIT).add(str(path), is_lent)
    assert os.listdir(path.parent) == ["pool.sock"]


# -- sockets of the service manager ------------------------------------------------------------------


def test_what_is_lent_is_hidden_and_given_back(path):
    file = path.stat().st_ino
    gate = Gate(LIMIT)
    gate.add(str(path), is_lent=True)
    gate.remove()
    assert os.listdir(path.parent) == ["pool.sock"]
    gate.accepted(600)
    assert os.listdir(path.parent) == ["pool.sock.full"]
    gate.remove()
    assert os.listdir(path.parent) == ["pool.sock"]
    assert path.stat().st_ino == file


def test_what_a_killed_server_hid_is_found_again(path):
    file = path.stat().st_ino
    path.rename(path.with_name("pool.sock.full"))
    Gate(LIMIT).add(str(path), is_lent=True)
    assert os.listdir(path.parent) == ["pool.sock"]
    assert path.stat().st_ino == file
