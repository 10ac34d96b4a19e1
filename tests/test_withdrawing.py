"""Requests that nobody waits for any more: cancelled ones, and those of clients that are gone.

A worker that got SIGSTOP stands for one that is slow: it holds its batch until SIGCONT.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

from pool import Client, errors
from pool.wire import Kind
from tests.raw import Raw, RawLine, await_room, await_that, drill, drill_bundle, ids

CONFIG = """
[models.m]
backend = "drill"
path = "{folder}"
max_batch_size = 4
slots = 5
max_inflight_rows = 20
warm_up = false

[models.one]
backend = "drill"
path = "{folder}"
max_batch_size = 1
slots = 8
priority = 2
priority_ageing_ms = 3600000
warm_up = false
"""
ROWS = 20  # of the arena of m


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("withdrawing")
    (folder / "drill.toml").write_text("row_items = 4")
    with start_server(folder, CONFIG.format(folder=folder)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.endpoint) as made:
        yield made


@pytest.fixture(params=[Raw, RawLine], ids=["socket", "line"])
def raw(request, server):
    with request.param(server.endpoint) as made:
        await_room(made, "m", ROWS)
        yield made
        made.question(Kind.LIVE)  # and nothing else is left to come


@contextmanager
def stopped_worker(client, model="m"):
    """The model's worker holds its batch and takes no other."""
    (worker,) = client.status()["models"][model]["workers"]
    os.kill(worker["pid"], signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker["pid"], signal.SIGCONT)


def queue_rows(client, model="m"):
    return client.status()["models"][model]["queue_rows"]


def kinds(found):
    return {id_: type(answer) for id_, answer in found.items()}


def test_a_waiting_request_that_is_cancelled_is_answered_so_and_its_rows_are_free(client, raw):
    with stopped_worker(client):
        running, *waiting = [raw.send(drill("m", 4)) for _ in range(5)]
        raw.send(drill("m"))
        assert errors.Overloaded in kinds(raw.collect(1)).values()
        for id_ in waiting[:3]:
            raw.send_kind(Kind.CANCEL, id_)
        assert kinds(raw.collect(3)) == dict.fromkeys(waiting[:3], errors.Cancelled)
        assert queue_rows(client) == 4
        again = [raw.send(drill("m", 4)) for _ in range(3)]
    assert kinds(raw.collect(5)) == dict.fromkeys([running, waiting[3], *again], list)


def test_a_running_request_that_is_cancelled_is_answered_at_once_and_once(client, raw):
    with stopped_worker(client):
        id_ = raw.send(drill("m"))
        raw.send_kind(Kind.CANCEL, id_)
        assert kinds(raw.collect(1)) == {id_: errors.Cancelled}
    await_room(raw, "m", ROWS)  # and there is no second answer


def test_a_request_of_several_batches_is_cancelled_whole(client, raw):
    with stopped_worker(client):
        id_ = raw.send(drill("m", 15))
        raw.send_kind(Kind.CANCEL, id_)
        assert kinds(raw.collect(1)) == {id_: errors.Cancelled}
        assert queue_rows(client) == 0
        other = raw.send(drill("m", 16))
    assert kinds(raw.collect(1)) == {other: list}


def test_requests_of_a_bundle_are_cancelled_one_by_one(client, raw):
    with stopped_worker(client):
        running = raw.send(drill("m"))
        mine = [next(ids) for _ in range(6)]
        raw.send(drill_bundle("m", [(id_, 0, 1) for id_ in mine]))
        for id_ in mine[1:3]:
            raw.send_kind(Kind.CANCEL, id_)
        assert kinds(raw.collect(2)) == dict.fromkeys(mine[1:3], errors.Cancelled)
    assert kinds(raw.collect(5)) == dict.fromkeys([running, mine[0], *mine[3:]], list)


def test_a_request_of_a_bundle_that_runs_is_cancelled_alone(client, raw):
    with stopped_worker(client):
        mine = [next(ids) for _ in range(4)]
        raw.send(drill_bundle("m", [(id_, 0, 1) for id_ in mine]))
        raw.send_kind(Kind.CANCEL, mine[2])
        assert kinds(raw.collect(1)) == {mine[2]: errors.Cancelled}
    assert kinds(raw.collect(3)) == dict.fromkeys([*mine[:2], mine[3]], list)


def test_requests_of_a_bundle_expire_each_at_its_own_time(client, raw):
    with stopped_worker(client):
        mine = [next(ids) for _ in range(6)]
        millis = [0, 40, 40, 0, 40, 0]  # over two slots
        raw.send(drill_bundle("m", [(id_, each, 1) for id_, each in zip(mine, millis, strict=True)]))
        late = [id_ for id_, each in zip(mine, millis, strict=True) if each]
        assert kinds(raw.collect(3)) == dict.fromkeys(late, errors.DeadlineExceeded)
        assert queue_rows(client) <= 2
    assert kinds(raw.collect(3)) == dict.fromkeys(set(mine).difference(late), list)


def test_only_its_own_client_cancels_a_request(server, client, raw):
    with stopped_worker(client), Raw(server.endpoint) as other:
        mine, others = [raw.send(drill("m")) for _ in range(2)], other.send(drill("m"))
        for id_ in mine:
            other.send_kind(Kind.CANCEL, id_)
        other.send_kind(Kind.CANCEL, others)
        assert kinds(other.collect(1)) == {others: errors.Cancelled}
        assert other.question(Kind.LIVE) == {"live": True}
    assert kinds(raw.collect(2)) == dict.fromkeys(mine, list)


def test_cancels_of_nothing_are_passed_over(raw):
    answered = raw.send(drill("m"))
    raw.collect(1)
    for id_ in (answered, 0, 2**64 - 1, next(ids)):
        raw.send_kind(Kind.CANCEL, id_)
    assert raw.question(Kind.LIVE) == {"live": True}


def test_a_storm_of_cancels_answers_each_request_once(client, raw):
    with stopped_worker(client):
        mine = [raw.send(drill("m", 4)), *(raw.send(drill("m")) for _ in range(ROWS - 4))]
        raw.question(Kind.LIVE)
        for i in range(10_000):
            raw.send_kind(Kind.CANCEL, mine[i % len(mine)] if i % 2 else next(ids))
        assert kinds(raw.collect(len(mine))) == dict.fromkeys(mine, errors.Cancelled)
        assert raw.question(Kind.LIVE) == {"live": True}
    await_room(raw, "m", ROWS)


def test_requests_run_by_their_priority_alone_and_in_bundles(client, raw):
    with stopped_worker(client, "one"):
        first = raw.send(drill("one"))  # runs
        last = raw.send(drill("one", priority=3))
        unsaid = raw.send(drill("one"))  # 2: the model's own
        bundled = next(ids)
        raw.send(drill_bundle("one", [(bundled, 0, 1)], priority=1))
        rows = raw.send(drill("one", rows=2, priority=1))  # split, the slow way
        urgent = raw.send(drill("one", priority=0))
        raw.question(Kind.LIVE)  # is answered as soon as it is read,
        client.live()  # and this when the batches, too, are where they belong
    assert list(raw.collect(6)) == [first, urgent, bundled, rows, unsaid, last]


def test_the_waiting_rows_of_a_client_that_was_killed_are_freed(server, client):
    code = textwrap.dedent(f"""
        import sys
        from tests.raw import *
        raw = Raw({server.endpoint!r})
        for _ in range(5):
            raw.send(drill("m", 4))
        raw.question(Kind.LIVE)
        print("sent", flush=True)
        sys.stdin.read()
    """)

    def given_up():
        return client.status()["models"]["m"]["answers"].get("CANCELLED", 0)

    before, before_given_up = client.status()["front"]["clients"], given_up()
    with stopped_worker(client), Raw(server.endpoint) as raw:
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"sent\n"
            raw.send(drill("m"))
            assert errors.Overloaded in kinds(raw.collect(1)).values()
            assert client.status()["front"]["clients"] == before + 2
            child.kill()
        await_that(lambda: queue_rows(client) == 0)
        await_that(lambda: client.status()["front"]["clients"] == before + 1)
        assert given_up() == before_given_up + 5, "counted, also the one that runs"
        mine = [raw.send(drill("m", 4)) for _ in range(4)]  # all but the slot that runs
    with Raw(server.endpoint) as raw:
        await_room(raw, "m", ROWS)
    assert len(mine) == 4
