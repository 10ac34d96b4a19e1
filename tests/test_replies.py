"""Replies: what no message holds is refused; what was split is answered once, whatever fails."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from pool import AsyncClient, Pool, wire
from pool.errors import InternalError, TooLarge
from pool.front.replies import Reply
from pool.shm.arena import Arena, OutputPlace, decode_outputs
from pool.signature import Signature, TensorSpec
from pool.wire import Flag, Header, Kind, TimelineMeta
from tests.rig import Rig, generation, identity

PATIENCE_S = 20.0

MODEL = """
import numpy as np
from pool.python import model

NAMES = [f"{i:03d}" + "n" * 500 for i in range(140)]

@model(inputs={"x": "int8 [any]"}, outputs={name: "int8 [any]" for name in NAMES})
def long(x):
    return dict.fromkeys(NAMES, x)
"""

TOML = """
[models.long]
backend = "python"
path = "{folder}/long.py:long"
workers = 1
max_queue_delay_ms = 50

[pipelines.line]
steps = [{{ model = "long", inputs = {{ x = "request.x" }} }}]
"""


def make(count, letters):
    """The reply of a model with so many outputs, whose names have so many letters."""
    names = [f"{i:03d}".ljust(letters, "n") for i in range(count)]
    outputs = tuple(TensorSpec(name, "int8", (None,)) for name in names)
    places = [OutputPlace("int8", (1,), 0, 1)] * count
    signature = Signature("s", (TensorSpec("x", "int8", (None,)),), outputs)
    return Reply(1, signature, places, tuple(range(count)))


def test_outputs_that_no_message_holds_are_too_large():
    with pytest.raises(TooLarge, match=r"257 outputs.* at most 256, .*: ask for fewer"):
        make(257, 3)
    with pytest.raises(TooLarge, match=r"140 outputs, whose names and shapes take 7.... bytes; an answer"):
        make(140, 500)


def test_what_is_not_too_large_fits_a_header_with_any_time_line():
    most = 2**64 - 1
    timeline = TimelineMeta(most, most, most, most, most, most, most, most)
    fitting = []
    for letters in range(425, 435):  # of 150 names in about 64 KiB
        try:
            fitting.append(make(150, letters))
        except TooLarge:
            continue
    assert 0 < len(fitting) < 10
    reply = fitting[-1]
    meta = wire.add_timeline(reply.meta, timeline)
    frame = wire.encode_header(Header(Kind.RESULT, 1, meta, rows=1, flags=int(Flag.TIMELINE)))
    assert wire.decode_header(frame).meta == meta
    assert len(frame) > wire.MAX_HEADER_BYTES - 150


def test_a_client_hears_that_an_answer_is_too_large_and_is_served_on(start_server, tmp_path):
    (tmp_path / "long.py").write_text(MODEL)
    x = np.array([1, 2], np.int8)
    first = f"000{'n' * 500}"

    async def ask(endpoint):
        async with AsyncClient(endpoint) as client:
            large, small = await asyncio.gather(  # of one batch
                client.predict("long", {"x": x}),
                client.predict("long", {"x": x}, outputs=[first]),
                return_exceptions=True,
            )
            assert isinstance(large, TooLarge)
            assert "140 outputs" in large.message
            assert (small[first] == x).all()
            with pytest.raises(TooLarge, match="step 'long' of pipeline 'line': 140 outputs"):
                await client.predict("line", {"x": x})
            answer = await client.predict("long", {"x": x}, outputs=[first])
            assert (answer[first] == x).all()

    with start_server(tmp_path, TOML.format(folder=tmp_path)) as server:
        asyncio.run(ask(server.endpoint))


def test_strings_that_a_worker_has_spoilt_are_an_error_and_the_slot_is_given_back(tmp_path, monkeypatch):
    (tmp_path / "shout.py").write_text(
        "from pool.python import model\n"
        '@model(inputs={"t": "string [any]"}, outputs={"u": "string [any]"})\n'
        "def shout(t):\n"
        "    return [each.upper() for each in t]\n"
    )
    file = tmp_path / "pool.toml"
    file.write_text(
        f'[models.shout]\nbackend = "python"\npath = "{tmp_path}/shout.py:shout"\nworkers = 1\nslots = 1\n'
    )
    read = Arena.read_run_record

    def spoil(arena, slot):
        """As a worker that wrote where it must not."""
        record = read(arena, slot)
        (place,) = decode_outputs(record[-1])
        arena.slots[slot].data[place.offset : place.offset + 8] = b"\xff" * 8
        return record

    async def main():
        async with Pool.from_file(file) as pool:
            for _ in range(2):
                monkeypatch.setattr(Arena, "read_run_record", spoil)
                with pytest.raises(InternalError, match="cannot be read"):
                    await pool.predict("shout", {"t": [b"a", b"b"]}, timeout=PATIENCE_S)
                monkeypatch.undo()
            answer = await pool.predict("shout", {"t": [b"a", b"b"]})
            assert answer["u"].tolist() == [b"A", b"B"]

    asyncio.run(main())


@pytest.mark.parametrize("where", ["join", "send_frames"])
def test_an_answer_that_cannot_be_joined_or_sent_is_one_error(monkeypatch, caplog, where):
    def fail(*_):
        raise ZeroDivisionError

    with Rig(generation(identity(("x", "int8", (None,))), max_batch_size=2)) as rig:
        monkeypatch.setattr(*((Reply, "join") if where == "join" else (rig.sink, "send_frames")), fail)
        ticket = rig.place(1, {"x": np.arange(3, dtype=np.int8)})
        rig.run_all()
        (error,) = rig.sink.answers.values()
        assert isinstance(error, InternalError)
        assert error.message == "ZeroDivisionError while joining the answer"
        assert ticket.is_settled
        assert not rig.account.rows
        caplog.clear()  # its traceback has views of a slot
