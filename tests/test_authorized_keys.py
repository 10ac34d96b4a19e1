"""The directory of authorized keys: what of it counts, and when it is read again."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import zmq

from pool.front.authorized_keys import AuthorizedKeys
from pool.keys import write_pair


def add(directory, name):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    _, file = write_pair(str(directory / "private"), name, public, secret)
    os.rename(file, directory / "clients" / f"{name}.pub")
    return public


@pytest.fixture
def clients(tmp_path):
    for name in ("private", "clients"):
        (tmp_path / name).mkdir()
    return tmp_path / "clients"


def test_every_change_counts_however_soon_it_comes(tmp_path, clients):
    keys = AuthorizedKeys(str(clients))
    assert keys.names == []
    added = {}
    for i in range(50):
        added[f"client{i}"] = key = add(tmp_path, f"client{i}")
        assert keys.name_of(key) == f"client{i}"
    assert keys.names == sorted(added)
    for name, key in added.items():
        (clients / f"{name}.pub").unlink()
        assert keys.name_of(key) is None
    assert keys.names == []


def test_a_change_within_one_tick_of_the_clock_counts(tmp_path, clients):
    add(tmp_path, "alice")
    now = time.time_ns()
    os.utime(clients, ns=(now, now))
    keys = AuthorizedKeys(str(clients))
    key = add(tmp_path, "bob")
    os.utime(clients, ns=(now, now))  # as kernels with coarse stamps have it
    assert keys.name_of(key) == "bob"


def test_a_directory_that_has_not_changed_is_not_read_again(tmp_path, clients):
    key = add(tmp_path, "alice")
    file = clients / "alice.pub"
    os.utime(clients, (1e9, 1e9))
    keys = AuthorizedKeys(str(clients))
    file.write_text("")  # which the directory does not tell
    assert keys.name_of(key) == "alice"
    assert AuthorizedKeys(str(clients)).name_of(key) is None
    os.utime(clients, (2e9, 2e9))
    assert keys.name_of(key) is None


def test_another_directory_in_its_place_is_read(tmp_path, clients):
    key = add(tmp_path, "alice")
    (tmp_path / "other").mkdir()
    shutil.copy(clients / "alice.pub", tmp_path / "other" / "bob.pub")
    link = tmp_path / "link"
    link.symlink_to("clients")
    for directory in (clients, tmp_path / "other"):
        os.utime(directory, (1e9, 1e9))
    keys = AuthorizedKeys(str(link))
    assert keys.name_of(key) == "alice"
    (tmp_path / "new").symlink_to("other")
    (tmp_path / "new").rename(link)
    assert keys.name_of(key) == "bob"


def test_what_holds_no_key_is_told_once(tmp_path, clients, caplog):
    key = add(tmp_path, "alice")
    (clients / "bad.pub").write_text("")
    (clients / "README").write_text("not looked at")
    keys = AuthorizedKeys(str(clients))
    for _ in range(3):
        assert keys.name_of(key) == "alice"
    (record,) = caplog.records
    assert "bad.pub: must hold public_key" in record.fields["reason"]


def test_without_the_directory_no_key_is_authorized(tmp_path, clients, caplog):
    key = add(tmp_path, "alice")
    keys = AuthorizedKeys(str(clients))
    clients.rename(tmp_path / "away")
    for _ in range(3):
        assert keys.name_of(key) is None
    (record,) = caplog.records
    assert record.fields["reason"].endswith("clients: No such file or directory; no key is authorized")
    (tmp_path / "away").rename(clients)
    assert keys.name_of(key) == "alice"
