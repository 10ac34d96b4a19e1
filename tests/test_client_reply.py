"""Replies: frames to arrays, errors and documents."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import wire
from pool.client.reply import Reply, ReplyDecoder, read_flag, read_models
from pool.client.route import COPY_BYTES
from pool.errors import Overloaded, ProtocolVersionError, WireError
from pool.wire import Flag, Header, Kind, ResultMeta, TensorMeta
from tests.scripted_server import rows
from tests.test_wire import documented_messages


def result(id_, *tensors, rows, flags=0, version=7):
    """A RESULT of (name, dtype, row shape, payload)."""
    metas = tuple(TensorMeta(name, dtype, shape) for name, dtype, shape, _ in tensors)
    meta = wire.encode_meta(ResultMeta(version, metas))
    header = wire.encode_header(Header(Kind.RESULT, id_, meta, rows=rows, flags=flags))
    return [header, *(payload for *_, payload in tensors)]


@pytest.mark.parametrize("count", [0, 1, 7, COPY_BYTES])
def test_outputs_are_the_caller_s_own(count):
    decoder = ReplyDecoder()
    array = rows(count)
    frames = result(5, ("y", "float32", (3,), array.tobytes()), rows=count)
    for _ in range(2):  # decoded, then from the plan
        reply = decoder.receive(frames)
        assert reply.id == 5
        got = reply.take_outputs()["y"]
        np.testing.assert_array_equal(got, array)
        assert got.dtype == np.float32
        assert got.flags.writeable
        assert got.flags.aligned
        got[...] = -1
    np.testing.assert_array_equal(decoder.receive(frames).take_outputs()["y"], array)


def test_large_writable_payloads_are_not_copied():
    payload = memoryview(bytearray(rows(COPY_BYTES).tobytes()))
    frames = result(5, ("y", "float32", (3,), payload), rows=COPY_BYTES)
    got = ReplyDecoder().receive(frames).take_outputs()["y"]
    assert np.shares_memory(got, np.frombuffer(payload, np.float32))


def test_several_outputs_of_several_dtypes():
    decoder = ReplyDecoder()
    half = np.array([1, 2], ml_dtypes.bfloat16)
    strings = wire.encode_strings([b"a", b""])
    frames = result(1, ("s", "string", (), strings), ("h", "bfloat16", (1,), half.tobytes()), rows=2)
    for _ in range(2):
        outputs = decoder.receive(frames).take_outputs()
        assert list(outputs) == ["s", "h"]
        assert outputs["s"].tolist() == [b"a", b""]
        assert outputs["h"].dtype == half.dtype
        assert outputs["h"].tolist() == [[1], [2]]


def test_the_same_meta_with_other_rows_and_flags_is_another_reply():
    decoder = ReplyDecoder()
    for count in (1, 2, 1):
        got = decoder.receive(result(1, ("y", "int8", (2,), bytes(2 * count)), rows=count)).take_outputs()
        assert got["y"].shape == (count, 2)
    whole = decoder.receive(result(1, ("y", "int8", (2,), bytes(2)), rows=1, flags=Flag.WHOLE)).take_outputs()
    assert whole["y"].shape == (2,)


def test_errors_and_documents():
    decoder = ReplyDecoder()
    reply = decoder.receive([wire.encode_error(3, Overloaded("full", retry_after_ms=7))])
    assert reply.id == 3
    with pytest.raises(Overloaded, match="full") as caught:
        reply.take_outputs()
    assert caught.value.retry_after_ms == 7
    with pytest.raises(Overloaded):
        reply.take_document()
    reply = decoder.receive([wire.encode_header(Header(Kind.INFO, 4, wire.encode_info({"live": True})))])
    assert (reply.id, reply.take_document()) == (4, {"live": True})
    with pytest.raises(WireError, match="answered PREDICT with INFO"):
        reply.take_outputs()
    reply = decoder.receive(result(1, ("y", "int8", (), b""), rows=0))
    with pytest.raises(WireError, match="answered a question with RESULT"):
        reply.take_document()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (result(1, ("y", "int8", (), b""), rows=2), r"output 'y', int8 \[2\], has 0 bytes; wanted 2"),
        (result(1, ("y", "int8", (), b"abc"), rows=2), r"output 'y', int8 \[2\], has 3 bytes; wanted 2"),
        ([*result(1, ("y", "int8", (), b"ab"), rows=2), b""], "RESULT has 2 tensor frames; wanted 1"),
        (result(1, ("y", "int8", (), b"ab"), rows=2)[:1], "RESULT has 0 tensor frames; wanted 1"),
        (result(1, ("y", "int8", (0, 2**46), b""), rows=2**32 - 1), "output 'y'"),
        (result(1, ("y", "string", (), b""), rows=1), "string tensor has 0 bytes"),
        (result(1, ("y", "float8", (), b""), rows=1), "unknown|has dtype 'float8'"),
        ([wire.encode_header(Header(Kind.RESULT, 1, b"junk"))], "ResultMeta is not valid"),
        ([wire.encode_header(Header(Kind.ERROR, 1, b"junk"))], "ErrorMeta is not valid"),
        ([wire.encode_header(Header(Kind.INFO, 1, b"\xc1"))], "INFO is not valid"),
        ([wire.encode_header(Header(Kind.INFO, 1, b"\x80")), b""], "INFO has 1 tensor frames; wanted none"),
    ],
)
def test_a_bad_body_is_the_error_of_its_request(frames, message):
    decoder = ReplyDecoder()
    for _ in range(2):
        reply = decoder.receive(frames)
        assert reply.id == 1
        with pytest.raises(WireError, match=message):
            reply.take_outputs()


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        (b"", WireError, "0 bytes"),
        (b"HTTP/1.1 400 Bad Request", WireError, "starts with"),
        (b"pl\x02\x81" + bytes(20), ProtocolVersionError, "protocol version 2; wanted 1"),
        (b"pl\x01\x01" + bytes(20), WireError, "the server sent a PREDICT, which is a request"),
    ],
)
def test_a_bad_header_is_nobody_s(header, error, message):
    with pytest.raises(error, match=message):
        ReplyDecoder().receive([header])


@given(st.binary(max_size=60), st.lists(st.binary(max_size=9), max_size=2), st.booleans())
def test_any_bytes_are_a_reply_or_a_wire_error(header, tensors, genuine):
    if genuine:
        header = b"pl\x01\x81" + header
    with contextlib.suppress(WireError):
        assert isinstance(ReplyDecoder().receive([header, *tensors]), Reply)
    bundle = wire.head(Kind.RESULT, Flag.BUNDLE) + header[8:]
    with contextlib.suppress(WireError):
        assert all(isinstance(reply, Reply) for reply in ReplyDecoder().receive_all([bundle, *tensors]))


def test_flags_and_models():
    assert read_flag({"ready": False}, "ready") is False
    with pytest.raises(WireError, match="'ready' is 1; wanted true or false"):
        read_flag({"ready": 1}, "ready")
    assert read_models({"models": {}}) == {}
    with pytest.raises(WireError, match="'models' is None; wanted a map"):
        read_models({})


def test_plans_are_bounded():
    decoder = ReplyDecoder()
    for width in range(5_000):
        decoder.receive(result(1, ("y", "int8", (width,), bytes(width)), rows=1))
    assert len(decoder._plans) <= 4_096


# -- bundles ---------------------------------------------------------------------------------------


def test_replies_of_a_bundle_come_apart():
    decoder = ReplyDecoder()
    for _ in range(2):  # decoded, then from the plan
        first, second = decoder.receive_all(documented_messages()["RESULT bundle"])
        assert (first.id, second.id) == (3, 4)
        np.testing.assert_array_equal(first.take_outputs()["y"], np.float32([6]))
        np.testing.assert_array_equal(second.take_outputs()["y"], np.float32([15, 24]))
        first.take_outputs()["y"][...] = 0
        assert second.take_outputs()["y"].tolist() == [15, 24]
    (alone,) = decoder.receive_all(documented_messages()["RESULT"])
    assert alone.id == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6) | st.integers(0, 3).map(lambda each: [each] * 4))
def test_each_reply_of_a_bundle_has_its_own_rows(counts):
    total = sum(counts)
    table = b"".join(wire.PART.pack(id_, 0, count) for id_, count in enumerate(counts, 1))
    y = np.arange(total * 2, dtype=np.int64).reshape(total, 2)
    z = np.arange(total, dtype=np.float32)
    meta = wire.encode_meta(ResultMeta(1, (TensorMeta("y", "int64", (2,)), TensorMeta("z", "float32", ()))))
    header = wire.encode_header(Header(Kind.RESULT, 0, meta, rows=total, flags=Flag.BUNDLE))
    replies = ReplyDecoder().receive_all([header, table, y.tobytes(), z.tobytes()])
    start = 0
    for id_, (count, reply) in enumerate(zip(counts, replies, strict=True), 1):
        assert reply.id == id_
        outputs = reply.take_outputs()
        assert list(outputs) == ["y", "z"]
        for name, whole in (("y", y), ("z", z)):
            np.testing.assert_array_equal(outputs[name], whole[start : start + count], strict=True)
            assert outputs[name].flags.writeable
        start += count


def test_requests_refused_together_have_an_error_each():
    first, second = ReplyDecoder().receive_all(documented_messages()["ERROR bundle"])
    assert (first.id, second.id) == (3, 4)
    for reply in (first, second):
        with pytest.raises(Overloaded, match="no room") as caught:
            reply.take_outputs()
        assert caught.value.retry_after_ms == 20
    assert first.error is not second.error


@pytest.mark.parametrize("table", [b"", bytes(15), wire.PART.pack(1, 0, 1)])
def test_errors_whose_table_says_nothing_end_the_connection(table):
    header, _ = documented_messages()["ERROR bundle"]
    with pytest.raises(WireError, match="bundle"):
        ReplyDecoder().receive_all([header, table])


def test_large_replies_of_a_bundle_do_not_keep_each_other():
    count, width = 3, 30_000
    meta = wire.encode_meta(ResultMeta(1, (TensorMeta("y", "uint8", (width,)),)))
    header = wire.encode_header(Header(Kind.RESULT, 0, meta, rows=count, flags=Flag.BUNDLE))
    table = b"".join(wire.PART.pack(i, 0, 1) for i in range(count))
    for reply in ReplyDecoder().receive_all([header, table, bytes(count * width)]):
        assert reply.take_outputs()["y"].nbytes == width
        assert reply.take_outputs()["y"].base is None


@pytest.mark.parametrize("table", [b"", bytes(15), bytes(16), bytes(16 * 4097)])
def test_a_bundle_with_a_wrong_table_is_of_no_use(table):
    header = documented_messages()["RESULT bundle"][0]
    with pytest.raises(WireError, match="bundle"):
        ReplyDecoder().receive_all([header, table, bytes(12)])


def test_a_bundle_with_wrong_tensors_answers_each_request_with_that():
    header, table, _ = documented_messages()["RESULT bundle"]
    for frames in ([header, table], [header, table, bytes(11)]):
        replies = ReplyDecoder().receive_all(frames)
        assert [reply.id for reply in replies] == [3, 4]
        for reply in replies:
            with pytest.raises(WireError):
                reply.take_outputs()
