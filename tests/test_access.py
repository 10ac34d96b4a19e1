"""Who may use a server: real handshakes with right, wrong and no keys, and real users on ipc."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from pool import AsyncClient, Client, ConfigError, Forbidden, Unavailable, wire
from pool.backends import drill
from pool.config import ServerConfig
from pool.front.access import Access
from pool.keys import write_pair
from pool.wire import Kind
from tests.raw import Raw, RawLine, await_that, drill_bundle
from tests.raw import drill as drill_request

MODEL = '[models.m]\nbackend = "drill"\npath = "{folder}/m"\nwarm_up = false\n'
NOBODY = 65534

X = np.arange(8, dtype=np.float32).reshape(2, 4)
INPUTS = {"x": X, "fault": np.zeros(2, np.int32), "argument": np.zeros(2, np.float32)}


def works(client, **keywords):
    np.testing.assert_array_equal(client.predict("m", INPUTS, **keywords)["y"], drill.answer(X, 1))
    return True


def free_tcp_endpoint():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def new_pair(folder, name):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    write_pair(str(folder), name, public, secret)
    return public, secret


def drill_folder(folder):
    (folder / "m").mkdir()
    (folder / "m" / "drill.toml").write_text("row_items = 4")
    return folder


class Site:
    """A server whose tcp endpoint is secured, beside one for everybody on ipc.

    Attributes:
        tcp, ipc: The endpoints.
        key: The server's public key.
    """

    def __init__(self, folder, server, key):
        self.folder = folder
        self.server = server
        self.ipc, self.tcp = server.endpoints
        self.key = key
        self.clients = folder / "clients"

    def authorize(self, name):
        """A new client key; gives its secret part."""
        public, secret = new_pair(self.folder / "private", name)
        (self.folder / "private" / f"{name}.pub").rename(self.clients / f"{name}.pub")
        assert public
        return secret

    def client(self, secret_key, **keywords):
        return Client(self.tcp, **{"server_key": self.key, "secret_key": secret_key} | keywords)

    def front(self):
        with Client(self.ipc) as client:
            return client.status()["front"]


@pytest.fixture(scope="module")
def site(start_server, tmp_path_factory):
    folder = drill_folder(tmp_path_factory.mktemp("access"))
    key, _ = new_pair(folder, "server")
    for name in ("clients", "private"):
        (folder / name).mkdir()
    endpoints = [f"ipc://{folder}/pool.sock", free_tcp_endpoint()]
    with start_server(
        folder,
        MODEL.format(folder=folder),
        server='curve_secret_key = "server.key"\nauthorized_keys = "clients"',
        endpoints=endpoints,
    ) as server:
        yield Site(folder, server, key)


# -- tcp with keys -----------------------------------------------------------------------------------


def test_a_client_with_its_key_is_served(site):
    secret = site.authorize("right")
    with site.client(secret) as client:
        assert works(client)
        assert client.status()["front"]["authorized_keys"].count("right") == 1
    files = site.folder / "server.pub", site.folder / "private" / "right.key"
    with site.client(files[1], server_key=str(files[0])) as client:
        assert works(client)

    async def ask():
        async with AsyncClient(site.tcp, server_key=files[0], secret_key=secret) as client:
            found = await asyncio.gather(*(client.predict("m", INPUTS) for _ in range(9)))
        return [outputs["y"].tolist() for outputs in found]

    assert asyncio.run(ask()) == [drill.answer(X, 1).tolist()] * 9


def test_ipc_beside_it_needs_no_keys(site):
    with Client(site.ipc) as client:
        assert works(client)
    secret = site.authorize("both")
    with Client([site.ipc, site.tcp], server_key=site.key, secret_key=secret) as client:
        assert works(client)


def test_a_key_nobody_knows_is_refused_at_once(site):
    _, secret = new_pair(site.folder / "private", "stranger")
    before = site.front()["refused_connections"]
    sentence = "was reached, but it does not know this client's key"
    with site.client(secret, connect_timeout=3600.0) as client:
        with pytest.raises(Unavailable, match=sentence):
            client.status()
        assert not client.live()

    async def ask():
        async with AsyncClient(
            site.tcp, server_key=site.key, secret_key=secret, connect_timeout=3600.0
        ) as client:
            await client.status()

    with pytest.raises(Unavailable, match=sentence):
        asyncio.run(ask())
    assert site.front()["refused_connections"] == before + 3


def test_no_key_is_refused_at_once(site):
    refused = pytest.raises(Unavailable, match=r"it wants keys \(server_key and secret_key\)")
    with Client(site.tcp, connect_timeout=3600.0) as client, refused:
        client.status()


def test_with_the_wrong_server_key_there_is_no_connection(site):
    secret = site.authorize("misled")
    other, _ = new_pair(site.folder / "private", "impostor")
    late = pytest.raises(Unavailable, match=r"within 0.5 s; .* server_key may not be its key")
    with site.client(secret, server_key=other, connect_timeout=0.5) as client, late:
        client.status()


def test_who_is_refused_gets_nothing_and_leaves_nothing(site):
    public, secret = zmq.curve_keypair()
    with Raw(site.tcp) as idle:  # without keys: not connected either
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = (
            site.key.encode(),
            public,
            secret,
        )
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED)
        dealer.connect(site.tcp)
        dealer.send(b"let me in")
        events = [recv_monitor_message(monitor)["event"] for _ in range(2)]
        assert events == [zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_DISCONNECTED]
        assert not dealer.poll(0)
        assert not idle.socket.poll(0)
        dealer.disable_monitor()
        dealer.close()
        monitor.close()
        context.term()
    await_that(lambda: site.front()["clients"] == 1)  # the one that asks


def test_keys_come_and_go_while_the_server_runs(site):
    secret = site.authorize("guest")
    with site.client(secret) as early, site.client(secret) as late:
        assert works(early)
        (site.clients / "guest.pub").unlink()
        with pytest.raises(Unavailable, match="does not know this client's key"):
            late.status()
        assert works(early)  # the connection it has stays
        assert "guest" not in site.front()["authorized_keys"]
    again = site.authorize("guest2")
    with site.client(again) as client:
        assert works(client)


def test_a_file_that_is_written_over_counts_after_a_reload(site):
    old = site.authorize("changed")
    public, new = new_pair(site.folder / "private", "new")
    with site.client(old) as client:
        assert works(client)
    os.utime(site.clients, (1e9, 1e9))  # as if nothing had changed for long
    with site.client(old) as client:
        assert works(client)
    (site.clients / "changed.pub").write_text(f'public_key = "{public}"')
    done = subprocess.run(
        [sys.executable, "-m", "pool", "reload", "--endpoint", site.ipc, "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"changes": []}
    with site.client(new) as client:
        assert works(client)
    with site.client(old) as client, pytest.raises(Unavailable, match="does not know"):
        client.status()


def test_a_broken_file_is_passed_over_and_told(site):
    (site.clients / "broken.pub").write_text("what is this")
    try:
        with site.client(site.authorize("whole")) as client:
            assert works(client)
        assert site.server.log.read_text().count("broken.pub: must hold public_key") == 1
        assert "broken" not in site.front()["authorized_keys"]
    finally:
        (site.clients / "broken.pub").unlink()


def test_without_the_directory_nobody_connects(site):
    secret = site.authorize("waiting")
    site.clients.rename(site.folder / "away")
    try:
        with site.client(secret) as client, pytest.raises(Unavailable, match="does not know"):
            client.status()
        assert "no key is authorized" in site.server.log.read_text()
    finally:
        (site.folder / "away").rename(site.clients)
    with site.client(secret) as client:
        assert works(client)


def test_the_commands_take_keys(site):
    secret = site.authorize("operator")
    assert secret
    own, server = site.folder / "private" / "operator.key", site.folder / "server.pub"
    base = [sys.executable, "-m", "pool"]

    def run(*arguments, **environment):
        return subprocess.run(
            [*base, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {name: str(value) for name, value in environment.items()},
        )

    status = "status", "--json", "--endpoint", site.tcp
    for done in (
        run(*status, "--server-key", server, "--key", own),
        run(*status, POOL_SERVER_KEY=site.key, POOL_KEY=own),
    ):
        assert done.returncode == 0, done.stderr
        assert "operator" in json.loads(done.stdout)["front"]["authorized_keys"]
    keys = "--server-key", server, "--key", own
    done = run("bench", "m", "--endpoint", site.tcp, *keys, "--requests", "50", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["errors"] == {}
    done = run(*status, "--timeout", "2")
    assert (done.returncode, done.stdout) == (1, "")
    # "wants", or "may want" where the server hung up before this end had read what it speaks.
    assert re.search(r"(wants|may want) keys \(server_key and secret_key\)", done.stderr), done.stderr
    done = run(*status, "--server-key", server)
    assert done.returncode == 2
    assert "server_key without secret_key" in done.stderr


# -- tcp without keys --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def barring(start_server):
    """A server for everybody on tcp, and for a user who is not here on ipc (and its own)."""
    with tempfile.TemporaryDirectory(prefix="pool-access-") as directory:
        folder = drill_folder(Path(directory))
        folder.chmod(0o755)
        endpoints = [free_tcp_endpoint(), f"ipc://{folder}/pool.sock"]
        with start_server(
            folder,
            MODEL.format(folder=folder),
            server='ipc_mode = "0666"\nipc_uids = [4711]',
            endpoints=endpoints,
        ) as server:
            yield server


def test_a_server_without_keys_is_told_apart(barring):
    _, secret = (key.decode() for key in zmq.curve_keypair())
    keys = {"server_key": secret, "secret_key": secret}
    refused = pytest.raises(Unavailable, match="but it has no keys")
    with Client(barring.endpoint, connect_timeout=3600.0, **keys) as client, refused:
        client.status()


@pytest.mark.parametrize("bound", ["tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://10.0.0.1:1"])
def test_an_endpoint_that_turns_out_to_be_open_is_refused(bound):
    async def check(config):
        Access(config).check_bound("tcp://localhost:1", bound)

    with pytest.raises(ConfigError, match=r"tcp://localhost:1: must be on loopback, or have keys .*, got"):
        asyncio.run(check(ServerConfig()))
    asyncio.run(check(ServerConfig(insecure=True)))


# -- users on ipc ------------------------------------------------------------------------------------


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextmanager
def another_user(uid=NOBODY):
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def set_uids(server, uids):
    text = server.config.read_text()
    start = text.index("ipc_uids")
    end = text.index("\n", start)
    server.config.write_text(text[:start] + f"ipc_uids = {uids}" + text[end:])
    with Client(server.endpoint) as client:
        before = client.status()["front"]["reload"]["count"]
        server.process.send_signal(signal.SIGHUP)
        await_that(lambda: client.status()["front"]["reload"]["count"] > before)
        assert client.status()["front"]["reload"]["error"] == ""


def forbidden():
    return pytest.raises(Forbidden, match=f"user {NOBODY} may not use this server")


@as_root
def test_a_user_who_is_not_listed_gets_one_error_for_everything(barring):
    with another_user(), Client(barring.endpoints[1]) as client:
        for ask in (client.status, client.models, client.live, client.ready, lambda: works(client)):
            with forbidden():
                ask()


@as_root
@pytest.mark.parametrize("options", [{}, {"routing_id": b"a name"}], ids=["numbered", "named"])
def test_every_message_of_such_a_user_is_answered_so(barring, options):
    def answers(raw, frames, count=1):
        raw.send(frames)
        return {id_: type(answer) for id_, answer in raw.collect(count).items()}

    with another_user(), Raw(barring.endpoints[1], **options) as raw:
        for kind in (Kind.LIVE, Kind.READY, Kind.MODELS, Kind.SIGNATURE, Kind.STATUS):
            for flags in (0, 0xFFFF):
                header = wire.encode_header(wire.Header(kind, 5, b"", flags=flags))
                assert answers(raw, [header]) == {5: Forbidden}
        assert list(answers(raw, drill_request("m")).values()) == [Forbidden]
        parts = [(6, 0, 1), (7, 0, 1)]
        assert answers(raw, drill_bundle("m", parts), 2) == {6: Forbidden, 7: Forbidden}
        raw.send_kind(Kind.CANCEL, 6)
        assert answers(raw, [wire.encode_header(wire.Header(Kind.LIVE, 8, b""))]) == {8: Forbidden}


@as_root
def test_nor_does_such_a_user_share_memory(barring):
    with another_user(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as region:
        region.connect(barring.endpoints[1].removeprefix("ipc://") + ".fd")
        with suppress(BrokenPipeError, ConnectionResetError):
            region.send(b"a region")
            assert region.recv(100) == b""


@as_root
def test_nor_does_such_a_user_have_a_line(barring):
    with another_user(), RawLine(barring.endpoints[1]) as line:
        assert line.greeting == b""
    with RawLine(barring.endpoints[1]) as line:
        assert line.question(Kind.LIVE) == {"live": True}


@as_root
def test_such_a_user_may_be_served_by_tcp(barring):
    with another_user(), Client(barring.endpoint) as client:
        assert works(client)


def test_the_servers_own_user_is_served(barring):
    with Client(barring.endpoints[1]) as client:
        assert works(client)


@as_root
def test_users_are_listed_anew_by_a_reload(barring):
    early, late = Client(barring.endpoints[1]), Client(barring.endpoints[1])
    with early, late:
        set_uids(barring, [NOBODY])
        with another_user():
            assert works(early)
        set_uids(barring, [4711])
        with another_user():
            assert works(early)  # the connection it has stays
            with forbidden():
                late.status()
    assert not Forbidden.retryable


@pytest.mark.parametrize(
    ("address", "is_barred"),
    [
        ("localhost:1000:7:7", False),
        (":1000:7:7", False),
        ("localhost:1001:1000:1000", True),
        (":1001:1000:1000", True),
        ("10.0.0.1", False),
        ("fe80::1000:1001:1002:1003%eth0", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_the_users_of_peer_addresses(address, is_barred):
    async def bar():
        return Access(ServerConfig(ipc_uids=(1000,))).bar(address)

    assert bool(asyncio.run(bar())) is is_barred
