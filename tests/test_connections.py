"""Connections to a real server: many, short ones, with names of their own, and more than it has room for."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from pool import Client, InternalError, errors, wire
from pool.wire import Kind
from tests.raw import Raw, anonymous_bytes, await_room, await_that, drill

CONFIG = """
[models.m]
backend = "drill"
path = "{folder}"
max_batch_size = 4
slots = 4
max_inflight_rows = 16
warm_up = false
"""
ROWS = 16  # of the arena
INPUTS = {
    "x": np.ones((1, 4), np.float32),
    "fault": np.zeros(1, np.int32),
    "argument": np.zeros(1, np.float32),
}


@pytest.fixture(scope="module")
def port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory, port):
    folder = tmp_path_factory.mktemp("connections")
    (folder / "drill.toml").write_text("row_items = 4")
    endpoints = [f"ipc://{folder}/pool.sock", f"tcp://127.0.0.1:{port}"]
    with start_server(folder, CONFIG.format(folder=folder), endpoints=endpoints) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.endpoint) as made:
        yield made


def clients(client):
    return client.status()["front"]["clients"]


def come_and_go(server, number):
    """So many connections, each of which has a request answered."""
    request = drill("m")
    with zmq.Context() as context:
        for _ in range(number):
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.rcvtimeo = 20_000
                dealer.connect(server.endpoint)
                dealer.send_multipart(request)
                assert wire.decode_header(dealer.recv_multipart()[0]).kind is Kind.RESULT


def test_clients_that_come_and_go_leave_nothing(server, client):
    before = clients(client)
    sizes = []
    for _ in range(7):
        come_and_go(server, 1000)
        sizes.append(anonymous_bytes(server.process.pid))
    # The allocator takes more now and then; what is kept of each client would do so every time.
    assert min(np.diff(sizes)) < 1000 * 100
    await_that(lambda: clients(client) == before)


def test_requests_whose_client_left_at_once_take_no_room(server, client):
    before = clients(client)
    for _ in range(200):
        with Raw(server.endpoint, linger=1000) as raw:
            raw.send(drill("m"))
            raw.send(drill("m", ROWS))
    await_that(lambda: clients(client) == before)
    assert client.status()["models"]["m"]["queue_rows"] == 0
    with Raw(server.endpoint) as raw:
        await_room(raw, "m", ROWS)


def test_a_client_that_names_itself_is_another_one_when_it_comes_back(server, client):
    before = clients(client)
    (worker,) = client.status()["models"]["m"]["workers"]
    with Raw(server.endpoint, identity=b"the same") as raw:
        await_room(raw, "m", ROWS)
        os.kill(worker["pid"], signal.SIGSTOP)
        try:
            running = raw.send(drill("m", 4))
            waiting = [raw.send(drill("m", 4)) for _ in range(3)]
            raw.question(Kind.LIVE)
            raw.close()
            await_that(lambda: client.status()["models"]["m"]["queue_rows"] == 0)
            await_that(lambda: clients(client) == before)
            with Raw(server.endpoint, identity=b"the same") as again:
                for id_ in (running, *waiting):  # not its own any more
                    again.send_kind(Kind.CANCEL, id_)
                mine = again.send(drill("m", 12))
                again.send(drill("m", 4))
                assert [type(answer) for answer in again.collect(1).values()] == [errors.Overloaded]
                again.send_kind(Kind.CANCEL, mine)
                assert {id_: type(a) for id_, a in again.collect(1).items()} == {mine: errors.Cancelled}
                os.kill(worker["pid"], signal.SIGCONT)
                await_room(again, "m", ROWS)  # and no answer to another's request
        finally:
            os.kill(worker["pid"], signal.SIGCONT)


def timers(port):
    """What the kernel's timers of the server's connections are for: 02, keep-alive (proc_net_tcp.rst)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [line[5][:2] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "01"]


def test_the_kernel_is_asked_to_notice_that_a_clients_machine_is_gone(server, port):
    with Raw(server.endpoints[1]) as raw:
        raw.question(Kind.LIVE)
        await_that(lambda: timers(port) == ["02"])  # once the reply is acknowledged


def alive(raws):
    """How many of these have the question they asked answered: within a second after the last that has."""
    poller = zmq.Poller()
    for raw in raws:
        poller.register(raw.socket, zmq.POLLIN)
    heard = 0
    while found := poller.poll(1000):
        for answered, _ in found:
            poller.unregister(answered)
            heard += 1
    return heard


def is_told(client):
    try:
        client.status()
    except InternalError:
        return False
    return True


@contextmanager
def asking(endpoint, number):
    with ExitStack() as stack:
        raws = [stack.enter_context(Raw(endpoint)) for _ in range(number)]
        for raw in raws:
            raw.send_kind(Kind.LIVE)
        yield raws


def test_more_local_connections_than_descriptors_harm_only_those_beyond(start_server, tmp_path):
    (tmp_path / "drill.toml").write_text("row_items = 4")
    text = CONFIG.format(folder=tmp_path)
    with start_server(tmp_path, text, descriptors=400) as server, Client(server.endpoint) as client:
        client.predict("m", INPUTS)
        for _ in range(2):
            with asking(server.endpoint, 450) as raws:
                assert 100 < alive(raws) < 400
                assert client.predict("m", INPUTS)["y"].shape == (1, 4)
                assert client.status()["front"]["clients"] < 400
                assert not Path(server.endpoint.removeprefix("ipc://")).exists()
            # They have left: there is room for others.
            with Client(server.endpoint, connect_timeout=20) as another:
                assert another.predict("m", INPUTS)["y"].shape == (1, 4)
        assert "no more local connections are taken" in server.log.read_text()
        # It stops while its socket has the other name.
        with asking(server.endpoint, 450) as raws:
            alive(raws)
            server.stop()
            assert not list(Path(tmp_path).glob("pool.sock*"))


def test_no_descriptors_at_all_are_told_and_got_over(start_server, tmp_path, port):
    (tmp_path / "drill.toml").write_text("row_items = 4")
    text = CONFIG.format(folder=tmp_path)
    endpoint = f"tcp://127.0.0.1:{port + 1}"
    with (
        start_server(tmp_path, text, descriptors=150, endpoints=[endpoint]) as server,
        Client(endpoint) as client,
    ):
        assert client.predict("m", INPUTS)["y"].shape == (1, 4)
        with asking(endpoint, 200) as raws:
            assert 50 < alive(raws) < 150
            assert client.predict("m", INPUTS)["y"].shape == (1, 4)
            with pytest.raises(InternalError, match=r"the status cannot be read: .*Too many open files"):
                client.status()
            assert client.live()
        await_that(lambda: is_told(client))
        with Client(endpoint) as another:
            assert another.predict("m", INPUTS)["y"].shape == (1, 4)
        assert server.process.poll() is None
