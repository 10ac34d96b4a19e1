"""The server's socket against hand-made frames: each message that is wrong gets one typed error, and the
socket goes on."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pool import Client, errors, packets, wire
from pool.signature import DTYPES
from pool.wire import Flag, Header, Kind, PredictMeta, SignatureMeta, TensorMeta
from tests import models
from tests.raw import Raw, RawLine, ids

CONFIG = """
[models.linear]
path = "{names}"
max_batch_size = 8
slots = 4
max_inflight_rows = 32

[models.any]
path = "{unknown_rank}"
slots = 4
max_rows_bytes = 65536

[models.text]
path = "{strings}"
slots = 2
max_rows_bytes = 4096

[models.whole]
path = "{fixed_rows}"
slots = 2

[models.root]
path = "{raising}"
slots = 2

[models.double]
path = "{unknown_dims}"
slots = 4
max_rows_bytes = 4194304
"""
NAMES = ("names", "unknown_rank", "strings", "fixed_rows", "raising", "unknown_dims")
MAX_MESSAGE_BYTES = 1 << 21


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    text = CONFIG.format(**{name: models.path(name) for name in NAMES})
    line = f"max_message_bytes = {MAX_MESSAGE_BYTES}"
    with start_server(tmp_path_factory.mktemp("endpoint"), text, server=line) as running:
        yield running


class AskingOn:
    """A connection that asks one thing at a time."""

    def ask(self, frames):
        """Send a message, and give the one answer that comes before that to a LIVE sent after it."""
        self.send_frames(frames)
        marker = self.send_kind(Kind.LIVE)
        answers = []
        while True:
            answer = self.receive_frames()
            answers.append(answer)
            if len(answers) > 1 and any(wire.decode_header(a[0]).id == marker for a in answers):
                break
        (answer,) = (a for a in answers if wire.decode_header(a[0]).id != marker)
        return answer

    def result(self, frames):
        """The header, the meta and the tensors that answer a message."""
        frame, *tensors = self.ask(frames)
        header = wire.decode_header(frame)
        if header.kind is Kind.ERROR:
            raise wire.decode_error(header)
        return header, wire.decode_meta(wire.ResultMeta, header.meta), tensors

    def refusal(self, frames):
        """The header and the error that answer a message."""
        (frame,) = self.ask(frames)
        header = wire.decode_header(frame)
        assert header.kind is Kind.ERROR
        return header, wire.decode_error(header)

    def settle(self):
        """Take what is still to come: noise may have asked for the status, which takes a while to answer."""
        marker = self.send_kind(Kind.STATUS)
        while wire.decode_header(self.receive_frames()[0]).id != marker:
            pass

    def works(self):
        """A good request, answered."""
        header, *tensors = self.ask(linear())
        assert wire.decode_header(header).kind is Kind.RESULT
        assert [np.frombuffer(tensor, np.float32)[-1] for tensor in tensors] == [0.0, 10.0, 2.0]


class Asking(AskingOn, Raw):
    """Through ZeroMQ."""


class AskingByLine(AskingOn, RawLine):
    """Over a line."""

    def send_frames(self, frames):
        size = sum(map(len, frames))
        if size > packets.REQUEST_MAX_BYTES - packets.TABLE_MAX_BYTES or len(frames) > 2 + wire.MAX_TENSORS:
            pytest.skip("no line takes such a request")
        super().send_frames(frames)


@pytest.fixture(scope="module", params=[Asking, AskingByLine], ids=["socket", "line"])
def connection(server, request):
    made = request.param(server.endpoint)
    yield made
    made.close()


@pytest.fixture
def raw(connection):
    yield connection
    connection.settle()
    connection.works()


def predict(meta, tensors, rows=1, **fields):
    header = Header(Kind.PREDICT, next(ids), wire.encode_meta(meta), rows=rows, **fields)
    return [wire.encode_header(header), *tensors]


LINEAR = tuple(TensorMeta(name, "float32", ()) for name in ("zeta", "b", "alpha"))


def linear(rows=3, inputs=LINEAR, tensors=None, model="linear", version=None, signature=None, **fields):
    """A request to the model of three vectors; outputs `a`, `x`, `y`."""
    if tensors is None:
        tensors = [np.full(rows, value, np.float32).tobytes() for value in (2, 1, 0)]
    return predict(PredictMeta(model, version, signature, inputs), tensors, rows, **fields)


def one(model, dtype, shape, payload, rows=1, name="x", **fields):
    return predict(
        PredictMeta(model, None, None, (TensorMeta(name, dtype, shape),)), [payload], rows, **fields
    )


def with_byte(frames, at, value):
    """The same message with a byte of its header changed."""
    header = bytearray(frames[0])
    header[at] = value
    return [bytes(header), *frames[1:]]


# -- good messages -----------------------------------------------------------------------------------


def test_a_good_request_is_answered_with_its_id(raw):
    frames = linear()
    header, *tensors = raw.ask(frames)
    decoded = wire.decode_header(header)
    assert decoded.id == wire.decode_header(frames[0]).id
    assert decoded.rows == 3
    meta = wire.decode_meta(wire.ResultMeta, decoded.meta)
    assert meta.version == 1
    got = {t.name: np.frombuffer(f, np.float32).tolist() for t, f in zip(meta.outputs, tensors, strict=True)}
    assert got == {"a": [0.0] * 3, "x": [10.0] * 3, "y": [2.0] * 3}


def test_inputs_may_come_in_any_order(raw):
    reordered = (LINEAR[2], LINEAR[0], LINEAR[1])
    tensors = [np.full(1, value, np.float32).tobytes() for value in (1, 7, 2)]
    _, *got = raw.ask(linear(1, reordered, tensors))
    assert [np.frombuffer(f, np.float32)[0] for f in got] == [1.0, 20.0, 6.0]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 32])
def test_any_number_of_rows_up_to_the_arenas(raw, rows):
    header, *tensors = raw.ask(linear(rows))
    assert wire.decode_header(header).rows == rows
    assert [len(tensor) for tensor in tensors] == [4 * rows] * 3


def test_nan_is_a_legal_payload(raw):
    _, tensor = raw.ask(one("any", "float32", (2,), struct.pack("<2f", float("nan"), 1.0)))
    assert np.isnan(np.frombuffer(tensor, np.float32)[0])


def test_answers_too_large_to_copy_arrive_whole_and_their_slot_is_used_again(raw):
    rows, length = 2, 100_000
    ids_ = np.arange(rows * length, dtype="<i4")
    inputs = tuple(TensorMeta(name, "int32", (length,)) for name in ("ids", "mask"))
    for i in range(12):  # of 4 slots
        sent = [ids_.tobytes(), np.full_like(ids_, i).tobytes()]
        _, meta, tensors = raw.result(predict(PredictMeta("double", None, None, inputs), sent, rows))
        position = [t.name for t in meta.outputs].index("product")
        np.testing.assert_array_equal(np.frombuffer(tensors[position], "<i4"), ids_ * i)


# -- messages that are wrong -------------------------------------------------------------------------

REFUSED = {
    "model": (linear(model="nope"), errors.ModelNotFound, "no model 'nope'; wanted one of 'linear'"),
    "version": (linear(version=9), errors.VersionNotFound, "model 'linear' has no version 9; wanted 1"),
    "signature": (linear(signature="s"), errors.SignatureNotFound, "no signature 's'.*'serving_default'"),
    "name": (
        linear(inputs=(*LINEAR[:2], TensorMeta("gamma", "float32", ()))),
        errors.InvalidInput,
        "no input 'gamma'; wanted 'alpha', 'b', 'zeta'",
    ),
    "missing input": (linear(inputs=LINEAR[:2]), errors.InvalidInput, r"inputs \['alpha'\] are missing"),
    "input twice": (linear(inputs=(LINEAR[0], LINEAR[0])), errors.WireError, "'zeta' appears twice"),
    "dtype": (one("any", "float64", (), b"\0" * 8), errors.InvalidInput, "has dtype float64; wanted float32"),
    "unknown dtype": (
        one("any", "float31", (), b"\0" * 8),
        errors.WireError,
        "dtype 'float31'; wanted one of bool",
    ),
    "shape": (
        one("whole", "float32", (1, 4), b"\0" * 16),
        errors.InvalidInput,
        r"has shape \[1, 4\]; wanted \[1, 3\]",
    ),
    "rank": (
        linear(inputs=(*LINEAR[:2], TensorMeta("alpha", "float32", (1,)))),
        errors.InvalidInput,
        r"'alpha' has rows of shape \[1\]; wanted \[\]",
    ),
    "negative axis": (one("any", "float32", (-1,), b""), errors.WireError, "wanted axes of 0 or more"),
    "too many rows": (
        linear(33),
        errors.TooLarge,
        "request of 33 rows; model 'linear' takes at most 32 of one client",
    ),
    "rows of an unbatched signature": (
        one("whole", "float32", (1, 3), b"\0" * 24, rows=2),
        errors.InvalidInput,
        "2 rows for signature 'serving_default', which is not batched",
    ),
    "a row larger than a slot": (
        one("any", "float32", (1 << 16,), b"\0" * (1 << 18)),
        errors.TooLarge,
        "one row needs .* raise max_rows_bytes",
    ),
    "a string larger than a slot": (
        one("text", "string", (), wire.encode_strings([b"x" * 5000]), name="text"),
        errors.TooLarge,
        "row 0 of the request has more string bytes than a slot holds",
    ),
    "string offsets": (
        one("text", "string", (), struct.pack("<2Q", 0, 9) + b"short", name="text"),
        errors.WireError,
        "offsets must rise from 0 to its heap's 5 bytes; got 0 to 9",
    ),
    "short frame": (one("any", "float32", (2,), b"\0" * 7), errors.WireError, "has 7 bytes; wanted 8"),
    "long frame": (one("any", "float32", (2,), b"\0" * 9), errors.WireError, "has 9 bytes; wanted 8"),
    "missing frame": (
        linear(tensors=[b"\0" * 12] * 2),
        errors.WireError,
        "2 tensor frames; the header names 3|fewer tensor frames than the 3",
    ),
    "extra frame": (
        linear(tensors=[b"\0" * 12] * 4),
        errors.WireError,
        "4 tensor frames; the header names 3|more tensor frames than the 3",
    ),
    "no frame": (linear(tensors=[]), errors.WireError, "0 tensor frames|fewer tensor frames"),
    "very many frames": (linear(tensors=[b""] * 5000), errors.WireError, "tensor frame"),
    "output": (
        predict(PredictMeta("linear", None, None, LINEAR, ("z",)), [b"\0" * 4] * 3),
        errors.InvalidInput,
        "no output 'z'; wanted 'a', 'x', 'y'",
    ),
    "no output": (
        predict(PredictMeta("linear", None, None, LINEAR, ()), [b"\0" * 4] * 3),
        errors.InvalidInput,
        "outputs is empty; wanted 'a', 'x', 'y'",
    ),
    "meta that is not msgpack": (
        [wire.encode_header(Header(Kind.PREDICT, 7, b"\xc1\xc1")), b""],
        errors.WireError,
        "PredictMeta is not valid",
    ),
    "truncated meta": (
        [linear()[0][:-5], b"", b"", b""],
        errors.WireError,
        "PredictMeta is not valid",
    ),
    "no meta": ([linear()[0][:24]], errors.WireError, "PredictMeta is not valid"),
    "protocol version": (
        with_byte(linear(), 2, 9),
        errors.ProtocolVersionError,
        "protocol version 9; wanted 1",
    ),
    "kind": (with_byte(linear(), 3, 0x55), errors.WireError, "message kind 0x55 is not known"),
    "priority": (with_byte(linear(), 4, 4), errors.WireError, "priority 4; wanted 0 to 3"),
    "reserved byte": (with_byte(linear(), 5, 1), errors.WireError, "reserved header byte is 1; wanted 0"),
    "a header too long": (
        [linear()[0] + b"\0" * 70_000],
        errors.WireError,
        "header frame has .* bytes; wanted at most 65536",
    ),
    "a question with tensors": (
        [wire.encode_header(Header(Kind.LIVE, 5, b"")), b"x"],
        errors.WireError,
        "LIVE with 1 tensor frames; wanted none",
    ),
    "a question about no model": (
        [wire.encode_header(Header(Kind.SIGNATURE, 5, wire.encode_meta(SignatureMeta("nope"))))],
        errors.ModelNotFound,
        "no model 'nope'",
    ),
    "a question without meta": (
        [wire.encode_header(Header(Kind.READY, 5, b""))],
        errors.WireError,
        "SignatureMeta",
    ),
    "RESULT": ([wire.encode_header(Header(Kind.RESULT, 5, b""))], errors.WireError, "RESULT is a reply"),
    "ERROR": ([wire.encode_header(Header(Kind.ERROR, 5, b""))], errors.WireError, "ERROR is a reply"),
    "INFO": ([wire.encode_header(Header(Kind.INFO, 5, b""))], errors.WireError, "INFO is a reply"),
    "a model that raises": (
        one("root", "float32", (), struct.pack("<f", -1)),
        errors.ModelError,
        "x must not be negative",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_gets_one_error_that_says_what(raw, case):
    frames, kind, sentence = REFUSED[case]
    for _ in range(2):  # the second time, what the server remembers of the first takes part
        header, error = raw.refusal(frames)
        assert header.id == struct.unpack_from("<Q", frames[0], 8)[0]
        assert type(error) is kind
        with pytest.raises(kind, match=sentence):
            raise error


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ([b""], "header frame has 0 bytes; wanted at least 24"),
        ([b"", b"", b""], "header frame has 0 bytes"),
        ([b"pl\1\1"], "header frame has 4 bytes; wanted at least 24"),
        ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], "header starts with b'GE'; wanted b'pl'"),
        ([b"\xff" * 1000, b"\0" * 1000], "header starts with"),
    ],
    ids=["empty", "empty frames", "truncated", "another protocol", "noise"],
)
def test_what_has_no_readable_id_is_answered_with_id_0(raw, frames, sentence):
    header, error = raw.refusal(frames)
    assert header.id == 0
    with pytest.raises(errors.WireError, match=sentence):
        raise error


def test_a_frame_above_max_message_bytes_is_refused(raw):
    items = MAX_MESSAGE_BYTES // 4 + 1
    header, error = raw.refusal(one("any", "float32", (items,), b"\0" * (4 * items)))
    assert isinstance(error, errors.TooLarge)
    assert (
        error.message == f"tensor frame 0 has {4 * items} bytes; the server takes at most {MAX_MESSAGE_BYTES}"
    )
    assert header.id != 0


def test_a_bundle_with_such_a_frame_is_refused_for_each_of_its_requests(raw):
    items = MAX_MESSAGE_BYTES // 8 + 1
    meta = wire.encode_meta(PredictMeta("any", None, None, (TensorMeta("x", "float32", (items,)),)))
    mine = [next(ids), next(ids)]
    table = b"".join(wire.PART.pack(id_, 0, 1) for id_ in mine)
    header = Header(Kind.PREDICT, 0, meta, rows=2, flags=int(Flag.BUNDLE))
    raw.send_frames([wire.encode_header(header), table, b"\0" * (8 * items)])
    found = raw.collect(2)
    assert list(found) == mine
    assert all(type(error) is errors.TooLarge for error in found.values())


def test_a_client_refuses_such_a_frame_before_a_byte_leaves(server):
    with Client(server.endpoint) as client:
        with pytest.raises(
            errors.TooLarge, match=f"'x' has {MAX_MESSAGE_BYTES + 4} bytes; the server takes at"
        ):
            client.predict("any", np.zeros((1, MAX_MESSAGE_BYTES // 4 + 1), np.float32))
        assert client.predict("any", np.ones((1, 2), np.float32))["y"].tolist() == [[2.0, 2.0]]


def test_a_frame_of_more_than_twice_that_ends_the_connection_and_the_next_one_works(server):
    raw = Asking(server.endpoint)
    raw.works()
    raw.socket.rcvtimeo = 0
    raw.socket.send_multipart([linear()[0], b"\0" * (2 * MAX_MESSAGE_BYTES + 1)])
    with contextlib.suppress(zmq.Again):  # there is nobody to tell: ZeroMQ hangs up
        assert raw.socket.recv() == b""
    raw.close()
    with Client(server.endpoint) as client:
        assert client.predict("any", np.ones((1, 2), np.float32))["y"].tolist() == [[2.0, 2.0]]


def test_a_client_that_leaves_without_its_answers_harms_nobody(server, raw):
    for _ in range(3):
        leaving = Asking(server.endpoint)
        for _ in range(3):
            leaving.socket.send_multipart(linear())
        leaving.close()
    raw.works()


def test_errors_are_counted_by_code(server, raw):
    with Client(server.endpoint) as client:
        before = client.status()["front"]["errors"].get("MODEL_NOT_FOUND", 0)
        raw.refusal(linear(model="nope"))
        assert client.status()["front"]["errors"]["MODEL_NOT_FOUND"] == before + 1


# -- bundles -----------------------------------------------------------------------------------------


def bundle(parts, tensors, meta=None, rows=None, table=None):
    """A bundle of (id, millis, rows)."""
    meta = wire.encode_meta(meta or PredictMeta("linear", None, None, LINEAR))
    total = sum(part[2] for part in parts) if rows is None else rows
    table = b"".join(wire.PART.pack(*part) for part in parts) if table is None else table
    return [
        wire.encode_header(Header(Kind.PREDICT, 99, meta, rows=total, flags=Flag.BUNDLE)),
        table,
        *tensors,
    ]


TEXT = PredictMeta("text", None, None, (TensorMeta("text", "string", ()),))


def columns(rows):
    return [np.arange(rows, dtype=np.float32).tobytes() for _ in range(3)]


def answers_by_id(raw, frames, count):
    """What comes back for each request of a bundle: its rows of `a`, or its error."""
    raw.send_frames(frames)
    return {
        id_: np.frombuffer(answer[0], np.float32).tolist() if isinstance(answer, list) else answer
        for id_, answer in raw.collect(count).items()
    }


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [3, 0, 5, 0], [8, 0, 0], [20, 1], [1] * 32])
def test_each_request_of_a_bundle_gets_its_rows(raw, sizes):
    parts = [(500 + i, 0, rows) for i, rows in enumerate(sizes)]
    found = answers_by_id(raw, bundle(parts, columns(sum(sizes))), len(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    for i in range(len(sizes)):
        assert found[500 + i] == list(map(float, range(ends[i], ends[i + 1])))


def test_a_request_of_a_bundle_that_finds_no_room_is_refused_alone(raw):
    parts = [(1, 0, 30), (2, 0, 30), (3, 0, 1)]
    found = answers_by_id(raw, bundle(parts, columns(61)), 3)
    assert found[1] == list(map(float, range(30)))
    assert type(found[2]) is errors.Overloaded


@pytest.mark.parametrize(
    ("tensors", "meta", "kind"),
    [
        (columns(2), PredictMeta("nope", None, None, LINEAR), errors.ModelNotFound),
        (columns(3), None, errors.WireError),
        (columns(2)[:2], None, errors.WireError),
        ([wire.encode_strings([b"a", b"b"])], TEXT, errors.InvalidInput),
    ],
    ids=["model", "size", "frames", "strings"],
)  # fmt: skip
def test_a_bundle_that_is_wrong_is_refused_for_each_request(raw, tensors, meta, kind):
    found = answers_by_id(raw, bundle([(11, 0, 1), (12, 0, 1)], tensors, meta), 2)
    assert {id_: type(error) for id_, error in found.items()} == {11: kind, 12: kind}


@pytest.mark.parametrize(
    ("table", "rows"), [(b"", 0), (b"short", 1), (wire.PART.pack(1, 0, 5), 4), (bytes(16 * 4097), 0)]
)
def test_a_table_that_is_none_is_refused_with_the_bundles_id(raw, table, rows):
    header, error = raw.refusal(bundle([], columns(rows), rows=rows, table=table))
    assert header.id == 99
    assert type(error) is errors.WireError


# -- noise -------------------------------------------------------------------------------------------

frames = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda kind, flags, id_, millis, rows, meta: (
            wire.FIXED.pack(b"pl", 1, kind, 0, 0, flags, id_, millis, rows) + meta
        ),
        st.sampled_from([*Kind, 0, 7, 0x80]),
        st.sampled_from([0, 0, 1, 2, 3, 0xFFFF]),
        st.integers(0, 50),
        st.integers(0, 2**32 - 1),
        st.sampled_from([0, 1, 3, 40, 2**32 - 1]),
        st.binary(max_size=20)
        | st.builds(
            lambda model, tensors: wire.encode_meta(PredictMeta(model, None, None, tuple(tensors))),
            st.sampled_from(["linear", "any", "text", "whole", "nope"]),
            st.lists(
                st.builds(
                    TensorMeta,
                    st.sampled_from(["x", "text", "alpha", "b", "zeta"]),
                    st.sampled_from(DTYPES),
                    st.lists(st.sampled_from([0, 1, 3, 2**40]), max_size=3).map(tuple),
                ),
                max_size=4,
            ),
        ),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(frames, min_size=1, max_size=5))
def test_noise_gets_answers_of_the_protocol_and_the_socket_goes_on(raw, message):
    marker = next(ids)
    raw.send_frames(message)
    raw.send_kind(Kind.LIVE, marker)
    while True:
        header, *_ = raw.receive_frames()
        decoded = wire.decode_header(header)
        assert decoded.kind in (Kind.RESULT, Kind.ERROR, Kind.INFO)
        if decoded.kind is Kind.ERROR:
            assert type(wire.decode_error(decoded)) is not errors.InternalError
        if decoded.id == marker:
            return
