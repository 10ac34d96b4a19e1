"""A client's keys: what is taken for one, and that the secret one stays secret."""

from __future__ import annotations

import pytest
import zmq

from pool import AsyncClient, Client, ConfigError
from pool.client.curve import keys_of
from pool.keys import write_pair

SERVER, _ = (key.decode() for key in zmq.curve_keypair())


def test_no_keys_are_none():
    assert keys_of(None, None) is None


def test_keys_and_files_of_keys_are_the_same(tmp_path):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    secret_file, _ = write_pair(str(tmp_path), "own", public, secret)
    _, server_file = write_pair(str(tmp_path), "server", SERVER, secret)
    keys = keys_of(SERVER, secret)
    assert keys == (SERVER.encode(), public.encode(), secret.encode())
    assert keys_of(server_file, secret_file) == keys
    assert keys_of(tmp_path / "server.pub", tmp_path / "own.key") == keys
    assert secret not in repr(keys)


def test_a_file_whose_name_looks_like_a_key_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    write_pair(".", "server", SERVER, secret)
    name = "~" + "a" * 39  # forty characters, and no key
    (tmp_path / "server.pub").rename(tmp_path / name)
    keys = keys_of(name, secret)
    assert keys is not None
    assert keys.server == SERVER.encode()
    assert keys.public == public.encode()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (("{key}", None), "server_key without secret_key; wanted both, or none"),
        ((None, "{key}"), "secret_key without server_key; wanted both, or none"),
        (("/no/such/file", "{key}"), "key file /no/such/file: must be readable"),
        (("~" * 40, "{key}"), "server_key: got 40 characters that are neither a key"),
        (("{key}", "~" * 40), "secret_key: got 40 characters that are neither a key"),
    ],
)
def test_keys_that_are_none_are_a_mistake_of_the_caller(keys, sentence):
    _, secret = zmq.curve_keypair()
    server, own = (key and key.replace("{key}", secret.decode()) for key in keys)
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match=sentence) as caught:
            kind("tcp://127.0.0.1:1", server_key=server, secret_key=own)
        assert secret.decode() not in caught.value.message
