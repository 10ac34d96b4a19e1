"""The lines that a service manager hears, on real sockets."""

from __future__ import annotations

import os
import socket

import pytest

from pool.errors import ConfigError
from pool.front import notify
from pool.front.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """(socket of a manager, its address as the environment has it)."""
    name = f"@pool-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(5)
        yield sock, name


@pytest.fixture
def notifier(manager):
    made = Notifier(manager[1])
    yield made
    made.close()


def test_lines_travel_in_one_datagram(manager, notifier):
    assert notifier.is_heard
    assert notifier.send(notify.READY, notify.status("2 models\nready"), notify.extend_timeout(1.5))
    assert manager[0].recv(1000) == b"READY=1\nSTATUS=2 models ready\nEXTEND_TIMEOUT_USEC=1500000"
    assert notifier.send(notify.ALIVE)
    assert manager[0].recv(1000) == b"WATCHDOG=1"


def test_a_reload_carries_the_instant_it_began():
    assert notify.reloading(12_345_678) == "RELOADING=1\nMONOTONIC_USEC=12345"


def test_without_a_manager_nothing_is_sent():
    notifier = Notifier.from_environment({})
    assert not notifier.is_heard
    assert notifier.watchdog_s is None
    assert notifier.send(notify.READY)


def test_what_the_manager_left_is_taken_out_of_the_environment(manager):
    pid = str(os.getpid())
    environment = {
        "NOTIFY_SOCKET": manager[1],
        "WATCHDOG_USEC": "2500000",
        "WATCHDOG_PID": pid,
        "PATH": "/bin",
    }
    notifier = Notifier.from_environment(environment)
    assert environment == {"PATH": "/bin"}
    assert notifier.is_heard
    assert notifier.watchdog_s == 2.5


def test_a_watchdog_for_another_process_is_not_ours(manager):
    environment = {"NOTIFY_SOCKET": manager[1], "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environment).watchdog_s is None


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "0"},
    ],
)
def test_what_is_not_spoken_here_is_told(environment):
    with pytest.raises(ConfigError, match="wanted"):
        Notifier.from_environment(environment)


def test_a_manager_that_is_gone_or_full_costs_nothing_but_the_line(tmp_path, caplog):
    path = str(tmp_path / "notify")
    notifier = Notifier(path)
    assert not notifier.send(notify.READY)  # nobody there
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        while notifier.send(notify.ALIVE):  # until its queue is full
            pass
        assert not notifier.send(notify.ALIVE)
        sock.recv(100)
        assert notifier.send(notify.ALIVE)
    notifier.close()
    told = [record.message for record in caplog.records]
    assert len(told) == 2, "once for each time that it went deaf"
