"""Clients that do not read what they asked for: what is kept for them is bounded, and others are served."""

from __future__ import annotations

import numpy as np
import pytest

from pool import Client, wire
from pool.wire import Flag, Kind
from tests.raw import Raw, anonymous_bytes, await_that, drill_meta, drill_tensors, ids

MIB = 1 << 20
MAX_UNREAD_BYTES = 4 * MIB
KERNEL_BYTES = 2 * MIB  # what kernel and ZeroMQ hold in a connection besides; below 1 MiB here

# Rows of 64 KiB: replies of one row are copied, those of four and more may leave from the slot.
ROW_ITEMS = 16_384
ROW_BYTES = 4 * ROW_ITEMS
SLOTS = 6
BATCH = 8
CONFIG = """
[models.wide]
backend = "drill"
path = "{folder}"
max_batch_size = {BATCH}
slots = {SLOTS}
warm_up = false
"""


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outbound")
    (folder / "drill.toml").write_text(f"row_items = {ROW_ITEMS}")
    text = CONFIG.format(folder=folder, BATCH=BATCH, SLOTS=SLOTS)
    with start_server(folder, text, server=f"max_unread_bytes = {MAX_UNREAD_BYTES}") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.endpoint, share_memory=False) as made:
        yield made


@pytest.fixture
def deaf(server):
    """A client whose side takes in next to nothing until somebody reads."""
    with Raw(server.endpoint, rcvhwm=1, rcvbuf=4096, sndhwm=0) as made:
        yield made


def wide(requests, rows):
    """A message of so many requests of so many rows."""
    fields = {"id_": 0, "flags": Flag.BUNDLE} if requests > 1 else {"id_": next(ids), "flags": 0}
    meta = drill_meta("wide", ROW_ITEMS, ("y",))
    total = requests * rows
    header = wire.HEAD.pack(wire.head(Kind.PREDICT, fields["flags"]), fields["id_"], 0, total) + meta
    table = [b"".join(wire.PART.pack(next(ids), 0, rows) for _ in range(requests))] if requests > 1 else []
    return [header, *table, *drill_tensors(total, ROW_ITEMS, 1.0)]


def ask_for(client, deaf, bytes_, requests, rows):
    """Ask for so many bytes, a batch at a time; gives how many requests that took."""

    def rows_run():
        return client.status()["models"]["wide"]["rows"]

    before = rows_run()
    asked = 0
    while asked * rows * ROW_BYTES < bytes_:
        deaf.socket.send_multipart(wide(requests, rows))
        asked += requests
        if asked * rows % BATCH == 0:
            await_that(lambda wanted=before + asked * rows: rows_run() >= wanted)
    return asked


def is_served(client, rows):
    inputs = {
        "x": np.ones((rows, ROW_ITEMS), np.float32),
        "fault": np.zeros(rows, np.int32),
        "argument": np.zeros(rows, np.float32),
    }
    return client.predict("wide", inputs)["y"].shape == (rows, ROW_ITEMS)


def is_answered(client, deaf):
    """Whether a request is, rather than its reply dropped."""
    dropped = client.status()["front"]["dropped_replies"]
    deaf.socket.send_multipart(wide(1, 1))
    await_that(lambda: deaf.socket.poll(0) or client.status()["front"]["dropped_replies"] > dropped)
    return bool(deaf.socket.poll(0)) and [*map(type, deaf.collect(1).values())] == [list]


@pytest.mark.parametrize(
    ("requests", "rows"),
    [(1, 1), (1, 8), (8, 1), (4, 1), (1, 40)],
    ids=["copied", "lent", "bundled", "some", "joined"],
)
def test_what_is_kept_for_a_client_that_does_not_read_is_bounded(server, client, deaf, requests, rows):
    assert is_served(client, BATCH)
    dropped = client.status()["front"]["dropped_replies"]
    memory = anonymous_bytes(server.process.pid)
    asked = ask_for(client, deaf, 8 * MAX_UNREAD_BYTES, requests, rows)
    front = client.status()["front"]
    kept = asked - (front["dropped_replies"] - dropped)
    reply_bytes = rows * ROW_BYTES
    assert kept * reply_bytes > MAX_UNREAD_BYTES // 2
    assert kept * reply_bytes < MAX_UNREAD_BYTES + KERNEL_BYTES + requests * reply_bytes
    # What is received, split and joined takes room too.
    assert (
        anonymous_bytes(server.process.pid) - memory
        < 2 * MAX_UNREAD_BYTES + KERNEL_BYTES + 4 * requests * reply_bytes
    )

    # Half of the arena, at least, is there for those who read.
    assert is_served(client, BATCH * SLOTS // 2)

    # Once it has read, of which the front hears from a thread of ZeroMQ, it is answered again.
    assert all(isinstance(answer, list) for answer in deaf.collect(kept).values())
    for _ in range(3):
        await_that(lambda: is_answered(client, deaf))
    assert is_served(client, BATCH * (SLOTS - 1))


def test_small_replies_count_with_what_they_cost(server, client, deaf):
    asked = 2 * MAX_UNREAD_BYTES // 256
    memory = anonymous_bytes(server.process.pid)
    for _ in range(2):
        dropped = client.status()["front"]["dropped_replies"]
        for _ in range(asked):
            deaf.send_kind(Kind.LIVE)
        wanted = dropped + asked // 4
        await_that(lambda wanted=wanted: client.status()["front"]["dropped_replies"] > wanted)
    assert anonymous_bytes(server.process.pid) - memory < 2 * MAX_UNREAD_BYTES
