"""Time lines: their stages add up, whatever the clocks say, and a real server's come with its answers."""

from __future__ import annotations

import asyncio
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import Answer, AsyncClient, Client, ModelError, Timeline, wire
from pool.__main__ import main
from pool.backends.drill import Fault, answer
from pool.cli.predict import draw
from pool.client.core import ClientCore
from pool.client.timeline import answer_with_timeline, assemble
from pool.wire import Flag, Header, Kind, ResultMeta, TensorMeta, TimelineMeta

NS = st.integers(0, 10**12)


def server_part(received_ns=0, receive_ns=10, queue_ns=20, run_ns=300, reply_ns=40):
    return TimelineMeta(received_ns, receive_ns, queue_ns, run_ns, reply_ns, 250, 64, 2)


@given(NS, NS, NS, NS, NS, NS, NS, NS)
def test_the_stages_add_up_to_the_time_it_took(began, sending, waiting, received, receive, queue, run, reply):
    handed = began + sending
    server = server_part(received, receive, queue, run, reply)
    ended = handed + waiting + receive + queue + run + reply
    line = assemble(began, handed, ended, server)
    assert line.total_ns == sum(line.stages.values()) == ended - began
    assert all(ns >= 0 for ns in line.stages.values())
    assert (line.receive_ns, line.queue_ns, line.run_ns, line.reply_ns) == (receive, queue, run, reply)


def test_on_one_machine_the_ways_are_told_apart():
    line = assemble(1000, 1100, 2000, server_part(received_ns=1300))
    assert line.is_one_clock
    assert list(line.stages.items()) == [
        ("send", 100), ("inbound", 200), ("receive", 10), ("queue", 20), ("run", 300), ("reply", 40),
        ("outbound", 330),
    ]  # fmt: skip
    assert (line.model_ns, line.batch_rows, line.worker) == (250, 64, 2)


@pytest.mark.parametrize("received_ns", [0, 1099, 1632, 10**15])
def test_by_another_clock_only_both_ways_together_are_known(received_ns):
    line = assemble(1000, 1100, 2001, server_part(received_ns))
    assert not line.is_one_clock
    assert (line.inbound_ns, line.outbound_ns) == (265, 266)


def test_an_answer_is_a_dict():
    outputs = {"y": np.zeros(3)}
    told = answer_with_timeline(outputs, 0, 1, 2, None)
    assert isinstance(told, dict)
    assert told == outputs
    assert told.timeline is None
    assert answer_with_timeline(outputs, 0, 1, 1000, server_part()).timeline.total_ns == 1000


def test_it_is_drawn_as_a_bar():
    line = assemble(0, 1_000_000, 10_000_000, server_part(2_000_000, 1_000_000, 1_000_000, 4_000_000, 0))
    first, *rows = draw(line)
    assert first == "10.000 ms: batch of 64 rows, worker 2, 0.000 ms of it the model"
    assert [row.split()[0] for row in rows] == list(line.stages)
    bars = [row[33:] for row in rows]
    assert bars[0] == "████"
    assert bars[1].strip("█ ") == bars[4].strip("█ ") == ""
    assert bars[5].strip() == "▏"  # it took no time
    # Each begins where the one before ended; the last ends at the end.
    starts = [len(bar) - len(bar.lstrip()) for bar in bars]
    assert starts == sorted(starts)
    assert max(map(len, bars)) == 48
    several = draw(assemble(0, 1, 1000, TimelineMeta(10**15, 1, 0, 5, 0, 0, 0, -1)))
    assert several[0].startswith("0.001 ms: several batches, several workers, ")
    assert several[-1] == "  inbound and outbound are halves of both: the server has another clock"


# -- on the wire ---------------------------------------------------------------------------------------


def core():
    known = ClientCore()
    known.learn("m", None, {
        "model": "m", "version": 7,
        "signatures": [{
            "name": "serving_default",
            "inputs": [{"name": "x", "dtype": "float32", "shape": [None, 3]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": [None]}],
        }],
    })  # fmt: skip
    return known


@pytest.mark.parametrize(("priority", "flags"), [(None, Flag.TIMELINE), (3, Flag.TIMELINE | Flag.PRIORITY)])
def test_a_request_asks_for_it(priority, flags):
    known = core()
    for _ in range(2):  # the second one takes the short way
        request = known.request("m", np.zeros((1, 3), np.float32), priority=priority, timeline=True)
        header = wire.decode_header(request.message()[0])
        assert (header.flags, header.priority) == (flags, priority or 0)


def test_those_that_ask_travel_alone():
    known = core()
    x = np.zeros((1, 3), np.float32)
    requests = [known.request("m", x, timeline=i in (2, 3)) for i in range(6)]
    assert [count for _, count in known.bundle(requests)] == [2, 1, 1, 2]


def test_a_reply_that_has_it_is_read():
    tensors = (TensorMeta("y", "float32", ()),)
    meta = wire.add_timeline(wire.encode_meta(ResultMeta(7, tensors)), server_part(5))
    header = wire.encode_header(Header(Kind.RESULT, 9, meta, rows=1, flags=Flag.TIMELINE))
    reply = ClientCore().receive([header, np.float32(6).tobytes()])
    assert reply.timeline == server_part(5)
    assert reply.outputs["y"].tolist() == [6.0]


@pytest.mark.parametrize("element", [b"", b"\xc0", b"\x90", b"\x98" + b"\xa0" * 8])
def test_a_time_line_that_is_none_is_an_error_of_that_reply(element):
    meta = b"\x93" + wire.encode_meta(ResultMeta(7, (TensorMeta("y", "float32", ()),)))[1:] + element
    header = wire.encode_header(Header(Kind.RESULT, 9, meta, rows=1, flags=Flag.TIMELINE))
    reply = ClientCore().receive([header, np.float32(6).tobytes()])
    assert reply.id == 9
    assert reply.error.code == "MALFORMED"


# -- a real server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("timeline")
    (folder / "drill.toml").write_text("batch_s = 0.01\n")
    text = f'[models.m]\nbackend = "drill"\npath = "{folder}"\nmax_batch_size = 8\nworkers = 2\n'
    with start_server(folder, text) as running:
        yield running


def inputs(rows, fault=Fault.NONE):
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    return {"x": x, "fault": np.full(rows, fault, np.int32), "argument": np.zeros(rows, np.float32)}


def check(told, rows, took_ns):
    assert isinstance(told, Answer)
    np.testing.assert_array_equal(told["y"], answer(inputs(rows)["x"], 1))
    line = told.timeline
    assert isinstance(line, Timeline)
    assert line.is_one_clock
    assert all(ns >= 0 for ns in line.stages.values())
    assert line.total_ns <= took_ns
    assert line.run_ns >= 10_000_000
    return line


@pytest.mark.parametrize("share_memory", [True, False], ids=["line", "socket"])
def test_a_prediction_with_its_time_line(server, share_memory):
    with Client(server.endpoint, share_memory=share_memory) as client:
        assert type(client.predict("m", inputs(3))) is dict  # and learns the signature
        shares = []
        for _ in range(10):
            began = time.monotonic_ns()
            told = client.predict("m", inputs(3), timeline=True)
            took = time.monotonic_ns() - began
            line = check(told, 3, took)
            assert line.batch_rows == 3
            assert line.worker in (0, 1)
            assert 10_000_000 <= line.model_ns <= line.run_ns
            shares.append(line.total_ns / took)
        assert max(shares) >= 0.99


def test_a_split_request_has_one_run(server):
    with Client(server.endpoint) as client:
        client.signature("m")
        began = time.monotonic_ns()
        told = client.predict("m", inputs(20), timeline=True)
        line = check(told, 20, time.monotonic_ns() - began)
        assert (line.batch_rows, line.worker, line.model_ns, line.queue_ns) == (0, -1, 0, 0)


def test_errors_have_none(server):
    with Client(server.endpoint) as client, pytest.raises(ModelError):
        client.predict("m", inputs(1, Fault.RAISE), timeline=True)


@pytest.mark.parametrize("share_memory", [True, False], ids=["line", "socket"])
def test_with_asyncio_among_others(server, share_memory):
    async def main():
        async with AsyncClient(server.endpoint, share_memory=share_memory) as client:
            await client.predict("m", inputs(1))
            began = time.monotonic_ns()
            answers = await asyncio.gather(
                *[client.predict("m", inputs(2), timeline=i % 2 == 1) for i in range(24)]
            )
            took = time.monotonic_ns() - began
        lines = [check(told, 2, took) for told in answers[1::2]]
        assert {type(told) for told in answers[::2]} == {dict}
        # More than there is room for at once: some wait, and batches are shared.
        assert max(line.queue_ns for line in lines) > 5_000_000
        assert max(line.batch_rows for line in lines) == 8

    asyncio.run(main())


def test_the_command_draws_it(server, capsys):
    given = ["--input", "x=[[0,0,0,0]]", "--input", "fault=[0]", "--input", "argument=[0]"]
    assert main(["predict", "m", *given, "--timeline", "--endpoint", server.endpoint]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-8].endswith(" of it the model")
    assert [line.split()[0] for line in out[-7:]] == [
        "send", "inbound", "receive", "queue", "run", "reply", "outbound",
    ]  # fmt: skip
    assert main(["predict", "m", *given, "--timeline", "--json", "--endpoint", server.endpoint]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["outputs"]["y"] == [[1.0] * 4]
    line = document["timeline"]
    stages = ("send", "inbound", "receive", "queue", "run", "reply", "outbound")
    assert math.isclose(sum(line[f"{stage}_ns"] for stage in stages), line["total_ns"])
