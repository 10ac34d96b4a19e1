"""Key files: what is written, what is read, and who may read it; and the command that makes them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from pool import ConfigError, keys

ABSENT = "is there already; wanted another name"


@pytest.fixture
def pair():
    return tuple(key.decode() for key in zmq.curve_keypair())


@given(st.binary(min_size=32, max_size=32))
def test_what_zeromq_encodes_is_a_key(raw):
    assert keys.is_key(z85.encode(raw).decode())


@pytest.mark.parametrize(
    "text",
    ["", "a" * 39, "a" * 41, "a" * 39 + "é", "a" * 39 + "~", "a" * 39 + '"', "#" * 40],
    ids=["empty", "short", "long", "not ASCII", "not Z85", "a quote", "above 2^32"],
)
def test_what_is_not_a_key(text):
    assert not keys.is_key(text)


def test_a_pair_is_read_as_it_was_written(tmp_path, pair):
    public, secret = pair
    old = os.umask(0)
    try:
        secret_file, public_file = keys.write_pair(str(tmp_path / "new"), "alice@host", public, secret)
    finally:
        os.umask(old)
    assert [os.path.basename(path) for path in (secret_file, public_file)] == [
        "alice@host.key",
        "alice@host.pub",
    ]
    assert stat.S_IMODE(os.stat(secret_file).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(public_file).st_mode) == 0o644
    assert (keys.read_public_key(public_file), keys.read_secret_key(secret_file)) == pair
    with open(public_file) as file:
        assert secret not in file.read()


@pytest.mark.parametrize("left", ["a.key", "a.pub"])
def test_nothing_is_overwritten(tmp_path, pair, left):
    (tmp_path / left).symlink_to("nowhere")
    with pytest.raises(ConfigError, match=ABSENT):
        keys.write_pair(str(tmp_path), "a", *pair)
    assert os.listdir(tmp_path) == [left]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä"])
def test_a_name_that_is_none(tmp_path, pair, name):
    with pytest.raises(ConfigError, match="wanted letters, digits"):
        keys.write_pair(str(tmp_path), name, *pair)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o601, 0o620, 0o666])
def test_a_secret_key_that_is_open_to_others_is_refused(tmp_path, pair, mode):
    path, _ = keys.write_pair(str(tmp_path), "a", *pair)
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match=rf"open to its owner alone \(mode 0600\), got mode 0{mode:o}"):
        keys.read_secret_key(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_secret_key_may_be_read_by_a_group(tmp_path, pair, mode):
    path, _ = keys.write_pair(str(tmp_path), "a", *pair)
    os.chmod(path, mode)
    assert keys.read_secret_key(path) == pair[1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must hold public_key"),
        ("public_key = 3", "got something else"),
        ('public_key = "{key}"\nother = 1', "got something else"),
        ('secret_key = "{key}"', "got a secret_key"),
        ("public_key = {key}", "got something else"),
        ('public_key = "short"', "40 characters of Z85"),
        ("\xff", "got something else"),
    ],
    ids=["empty", "number", "more", "secret", "no TOML", "short", "not UTF-8"],
)
def test_a_file_that_holds_no_public_key(tmp_path, pair, text, sentence):
    path = tmp_path / "a.pub"
    path.write_bytes(text.replace("{key}", pair[1]).encode("latin-1"))
    with pytest.raises(ConfigError, match=sentence) as caught:
        keys.read_public_key(path)
    assert pair[1] not in caught.value.message


def test_a_file_that_is_not_there(tmp_path):
    for read in (keys.read_public_key, keys.read_secret_key):
        with pytest.raises(ConfigError, match="absent: must be readable, got No such file"):
            read(tmp_path / "absent")


# -- the command -------------------------------------------------------------------------------------


def pool(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "pool", "keys", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_makes_a_pair_and_shows_its_public_key(tmp_path):
    code, out, err = pool("new", "--dir", "keys", "--name", "alice", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["secret_file"] == "keys/alice.key"
    secret = keys.read_secret_key(tmp_path / "keys" / "alice.key")
    assert zmq.curve_public(secret.encode()).decode() == made["public_key"]
    assert secret not in out
    for file in (made["secret_file"], made["public_file"]):
        assert pool("show", file, cwd=tmp_path) == (0, made["public_key"] + "\n", "")
    code, out, err = pool("new", "--dir", "keys", "--name", "alice", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert ABSENT in err
    assert keys.read_secret_key(tmp_path / "keys" / "alice.key") == secret


def test_the_command_names_its_files(tmp_path):
    code, out, _ = pool("new", cwd=tmp_path)
    assert code == 0
    assert out.splitlines()[0] == "./pool.key  keep it secret"
    assert sorted(os.listdir(tmp_path)) == ["pool.key", "pool.pub"]
