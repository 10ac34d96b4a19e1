"""Endpoint strings: the default, and the rules."""

from __future__ import annotations

import os

import pytest

from pool.endpoints import check_endpoint, default_endpoint, is_loopback
from pool.errors import ConfigError


@pytest.mark.parametrize(
    ("runtime", "session", "endpoint"),
    [
        ("/run/pool", "/run/user/1000", "ipc:///run/pool/pool.sock"),
        ("/run/pool:/run/other", "", "ipc:///run/pool/pool.sock"),
        ("", "/run/user/1000", "ipc:///run/user/1000/pool/pool.sock"),
        ("", "", f"ipc:///tmp/pool-{os.getuid()}/pool.sock"),
    ],
)
def test_default_endpoint(monkeypatch, runtime, session, endpoint):
    monkeypatch.setenv("RUNTIME_DIRECTORY", runtime)
    monkeypatch.setenv("XDG_RUNTIME_DIR", session)
    assert default_endpoint() == endpoint
    check_endpoint(endpoint)
    check_endpoint(endpoint, bind=True)


@pytest.mark.parametrize(
    "endpoint",
    [
        "ipc:///a",
        "ipc:///" + "x" * 106,
        "tcp://localhost:1",
        "tcp://127.0.0.1:65535",
        "tcp://[::1]:5600",
        "tcp://[fe80::1%eth0]:5600",
    ],
)
@pytest.mark.parametrize("bind", [False, True])
def test_good_endpoints(endpoint, bind):
    check_endpoint(endpoint, bind=bind)


@pytest.mark.parametrize("endpoint", ["tcp://*:5600", "tcp://127.0.0.1:*", "tcp://*:*"])
def test_wildcards_only_to_listen(endpoint):
    check_endpoint(endpoint, bind=True)
    with pytest.raises(ConfigError, match=r"got (host|port) '\*'; wanted the (host|port) to connect to"):
        check_endpoint(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("", "wanted ipc:///absolute/path or tcp://host:port"),
        ("/run/pool.sock", "wanted ipc:///absolute/path or tcp://host:port"),
        ("udp://a:1", "wanted ipc:///absolute/path or tcp://host:port"),
        ("ipc://relative", "got path 'relative'; wanted an absolute path"),
        ("ipc://@abstract", "wanted an absolute path"),
        ("ipc://", "wanted an absolute path"),
        ("ipc:///directory/", "wanted an absolute path"),
        ("ipc:///a\0b", "wanted an absolute path"),
        ("ipc:///" + "x" * 107, "path has 108 bytes; wanted at most 107"),
        ("ipc:///" + "é" * 54, "path has 109 bytes; wanted at most 107"),
        ("tcp://localhost", "wanted tcp://host:port"),
        ("tcp://:5600", "wanted tcp://host:port"),
        ("tcp://::1:5600", "wanted tcp://host:port"),
        ("tcp://a b:5600", "wanted tcp://host:port"),
        ("tcp://a:port", "wanted tcp://host:port"),
        ("tcp://a:0", "got port 0; wanted 1 to 65535"),
        ("tcp://a:65536", "got port 65536; wanted 1 to 65535"),
    ],
)
def test_bad_endpoints(endpoint, message):
    with pytest.raises(ConfigError) as caught:
        check_endpoint(endpoint)
    assert message in caught.value.message
    assert repr(endpoint) in caught.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost", "LocalHost"])
def test_what_only_this_machine_reaches(host):
    assert is_loopback(f"tcp://{host}:5600")


@pytest.mark.parametrize(
    "host",
    ["*", "0.0.0.0", "[::]", "10.0.0.1", "128.0.0.1", "[fe80::1%lo]", "localhost.example", "lo"],
)
def test_what_others_may_reach(host):
    assert not is_loopback(f"tcp://{host}:5600")


def test_an_address_without_its_scheme_will_do():
    assert is_loopback("127.0.0.1:9464")
    assert not is_loopback("*:9464")
