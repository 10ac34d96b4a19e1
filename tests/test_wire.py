"""The wire: the bytes of docs/wire.md, round trips, and what becomes of bytes that are no message."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pool import errors, packets, wire
from pool.errors import Overloaded, PoolError, ProtocolVersionError, WireError
from pool.signature import DTYPES, numpy_dtype
from pool.wire import (
    ErrorMeta,
    Flag,
    Header,
    Kind,
    PredictMeta,
    ResultMeta,
    SignatureMeta,
    TensorMeta,
    TimedResultMeta,
    TimelineMeta,
)

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "wire.md").read_text()


# -- the examples of docs/wire.md ------------------------------------------------------------------


def documented_messages() -> dict[str, list[bytes]]:
    """The boxes of docs/wire.md: name to frames."""
    found = {}
    for name, body in re.findall(r"```hex (.+)\n((?:.*\n)*?)```", DOCUMENT):
        frames = re.split(r"frame \d+\n", body)[1:]
        found[name] = [bytes.fromhex(re.sub(r";.*", "", frame)) for frame in frames]
    return found


def parts_table(*parts):
    """A bundle's table, as if it were a tensor of bytes."""
    return np.frombuffer(b"".join(wire.PART.pack(*part) for part in parts), np.uint8)


DEFAULT_X = PredictMeta("m", None, "serving_default", (TensorMeta("x", "float32", (3,)),))
PARSE_S = PredictMeta("m", 7, "parse", (TensorMeta("s", "string", ()),), ("y",))
Y = ResultMeta(7, (TensorMeta("y", "float32", ()),))
WHOLE_Y = ResultMeta(7, (TensorMeta("y", "int64", (2,)),))

TIMED_Y = TimedResultMeta(
    7,
    (TensorMeta("y", "float32", ()),),
    TimelineMeta(
        received_ns=10**12,
        receive_ns=10_000,
        queue_ns=1_000,
        run_ns=200_000,
        reply_ns=30_000,
        model_ns=100_000,
        batch_rows=64,
        worker=0,
    ),
)

TOKEN = bytes(range(wire.TOKEN_BYTES))
ROOM_TOKEN = bytes(range(wire.TOKEN_BYTES, 2 * wire.TOKEN_BYTES))


def reference(token, offset, size):
    """A reference, as if it were a tensor of bytes."""
    return np.frombuffer(wire.REFERENCE.pack(token, offset, size), np.uint8), "uint8"


# Name of the box: header without meta, what the meta says, and the arrays with their dtypes.
GOLDEN = {
    "PREDICT": (
        Header(Kind.PREDICT, 1, b"", millis=60_000, rows=2),
        DEFAULT_X,
        [(np.array([[1, 2, 3], [4, 5, 6]], np.float32), "float32")],
    ),
    "PREDICT strings": (
        Header(Kind.PREDICT, 2, b"", rows=2),
        PARSE_S,
        [(np.array([b"a", b"bc"], object), "string")],
    ),
    "SIGNATURE": (Header(Kind.SIGNATURE, 3, b""), SignatureMeta("m"), []),
    "MODELS": (Header(Kind.MODELS, 4, b""), None, []),
    "STATUS": (Header(Kind.STATUS, 5, b""), None, []),
    "LIVE": (Header(Kind.LIVE, 6, b""), None, []),
    "READY": (Header(Kind.READY, 7, b""), SignatureMeta(""), []),
    "CANCEL": (Header(Kind.CANCEL, 1, b""), None, []),
    "PREDICT priority": (
        Header(Kind.PREDICT, 9, b"", rows=1, priority=3, flags=Flag.PRIORITY),
        DEFAULT_X,
        [(np.array([[1, 2, 3]], np.float32), "float32")],
    ),
    "PREDICT timeline": (
        Header(Kind.PREDICT, 10, b"", rows=1, flags=Flag.TIMELINE),
        DEFAULT_X,
        [(np.array([[1, 2, 3]], np.float32), "float32")],
    ),
    "RESULT timeline": (
        Header(Kind.RESULT, 10, b"", rows=1, flags=Flag.TIMELINE),
        TIMED_Y,
        [(np.array([6], np.float32), "float32")],
    ),
    "PREDICT region": (
        Header(Kind.PREDICT, 1, b"", millis=60_000, rows=2, flags=Flag.REGION),
        DEFAULT_X,
        [reference(TOKEN, 4096, 24)],
    ),
    "PREDICT region and room": (
        Header(Kind.PREDICT, 1, b"", millis=60_000, rows=2, flags=Flag.REGION | Flag.ROOM),
        DEFAULT_X,
        [reference(TOKEN, 4096, 24), reference(ROOM_TOKEN, 64, 64)],
    ),
    "RESULT room": (
        Header(Kind.RESULT, 1, b"", rows=2, flags=Flag.REGION),
        Y,
        [reference(ROOM_TOKEN, 64, 8)],
    ),
    "RESULT": (Header(Kind.RESULT, 1, b"", rows=2), Y, [(np.array([6, 15], np.float32), "float32")]),
    "RESULT whole": (
        Header(Kind.RESULT, 8, b"", rows=1, flags=Flag.WHOLE),
        WHOLE_Y,
        [(np.array([-1, 1], np.int64), "int64")],
    ),
    "ERROR": (
        Header(Kind.ERROR, 1, b"", millis=20),
        ErrorMeta("OVERLOADED", "every row of model 'm' is taken"),
        [],
    ),
    "INFO": (Header(Kind.INFO, 6, b""), {"live": True}, []),
    "PREDICT bundle": (
        Header(Kind.PREDICT, 0, b"", rows=3, flags=Flag.BUNDLE),
        DEFAULT_X,
        [
            (parts_table((3, 60_000, 1), (4, 0, 2)), "uint8"),
            (np.arange(1, 10, dtype=np.float32).reshape(3, 3), "float32"),
        ],
    ),
    "RESULT bundle": (
        Header(Kind.RESULT, 0, b"", rows=3, flags=Flag.BUNDLE),
        Y,
        [(parts_table((3, 0, 1), (4, 0, 2)), "uint8"), (np.array([6, 15, 24], np.float32), "float32")],
    ),
    "ERROR bundle": (
        Header(Kind.ERROR, 0, b"", millis=20, flags=Flag.BUNDLE),
        ErrorMeta("OVERLOADED", "no room"),
        [(parts_table((3, 0, 0), (4, 0, 0)), "uint8")],
    ),
}


def with_meta(header, meta):
    if meta is None:
        data = b""
    elif isinstance(meta, dict):
        data = wire.encode_info(meta)
    else:
        data = wire.encode_meta(meta)
    return Header(header.kind, header.id, data, header.millis, header.rows, header.priority, header.flags)


def test_every_kind_has_a_documented_message_and_every_box_is_checked():
    assert documented_messages().keys() == GOLDEN.keys()
    assert {header.kind for header, _, _ in GOLDEN.values()} == set(Kind)


@pytest.mark.parametrize("name", GOLDEN)
def test_documented_bytes_are_what_is_sent(name):
    header, meta, tensors = GOLDEN[name]
    sent = [wire.encode_header(with_meta(header, meta))]
    sent += [bytes(wire.encode_tensor(array, dtype)) for array, dtype in tensors]
    assert sent == documented_messages()[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_documented_bytes_are_understood(name):
    header, meta, tensors = GOLDEN[name]
    first, *payloads = documented_messages()[name]
    decoded = wire.decode_header(first)
    assert decoded == with_meta(header, meta)
    if isinstance(meta, dict):
        assert wire.decode_info(decoded.meta) == meta
    elif meta is not None:
        assert wire.decode_meta(type(meta), decoded.meta) == meta
    for payload, (array, dtype) in zip(payloads, tensors, strict=True):
        got = wire.decode_tensor(payload, dtype, array.shape)
        assert got.dtype == array.dtype
        assert got.tolist() == array.tolist()


def test_a_time_line_is_added_behind_what_is_there():
    plain = wire.encode_meta(Y)
    timed = wire.add_timeline(plain, TIMED_Y.timeline)
    assert timed == documented_messages()["RESULT timeline"][0][wire.FIXED_BYTES :]
    # Whoever does not know of it reads the rest.
    assert wire.decode_meta(ResultMeta, timed) == Y


def test_documented_packets():
    boxes = re.findall(r"```packet (.+)\n((?:.*\n)*?)```", DOCUMENT)
    found = {name: bytes.fromhex(re.sub(r";.*", "", body)) for name, body in boxes}
    (live,) = documented_messages()["LIVE"]
    assert found == {
        "offer": wire.REGION_OFFER.pack(wire.REGION_MAGIC, wire.REGION_VERSION, 1 << 20),
        "offer of a room": wire.REGION_OFFER.pack(wire.ROOM_MAGIC, wire.REGION_VERSION, 1 << 20),
        "grant": wire.REGION_GRANT.pack(wire.REGION_MAGIC, wire.REGION_VERSION, TOKEN, 1 << 30),
        "hello": packets.HELLO.pack(packets.LINE_MAGIC, packets.LINE_VERSION),
        "welcome": packets.WELCOME.pack(packets.LINE_MAGIC, packets.LINE_VERSION, packets.REQUEST_MAX_BYTES),
        "line LIVE": packets.make_table([live]) + live,
    }


def test_documented_error_codes():
    rows = re.findall(r"^\| `([A-Z_]+)` \| .* \| (yes|no) \|$", DOCUMENT, re.MULTILINE)
    documented = {code: retryable == "yes" for code, retryable in rows}
    kinds = [errors.error_from_code(code, "") for code in errors.CODES - {"CONFIG"}]  # never on the wire
    assert documented == {error.code: error.retryable for error in kinds}


def test_documented_dtypes():
    (table,) = re.findall(r"### 4\.1 Numeric\n\n((?:\|.*\n)+)", DOCUMENT)
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert [*named, "string"] == sorted([*DTYPES], key=[*named, "string"].index)


def test_documented_limits():
    for limit in (wire.MAX_HEADER_BYTES, wire.MAX_INFO_BYTES, wire.MAX_TENSORS, wire.MAX_RANK):
        assert f" {limit:,} " in DOCUMENT
    assert f"{wire.MAX_MESSAGE_CHARS:,} characters" in DOCUMENT


# -- headers ---------------------------------------------------------------------------------------

u32 = st.integers(0, 2**32 - 1)
headers = st.builds(
    lambda priority, flags, **fields: Header(
        priority=priority if flags & Flag.PRIORITY else 0, flags=flags, **fields
    ),
    kind=st.sampled_from(Kind),
    id=st.integers(0, 2**64 - 1),
    meta=st.binary(max_size=64),
    millis=u32,
    rows=u32,
    priority=st.integers(0, wire.MAX_PRIORITY),
    flags=st.integers(0, 2**16 - 1),
)


@given(headers)
def test_header_round_trip(header):
    frame = wire.encode_header(header)
    assert wire.decode_header(frame) == header
    assert wire.peek_id(frame) == header.id


@given(st.sampled_from(Kind), st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), u32, u32)
def test_prebuilt_head_gives_the_same_bytes(kind, flags, id_, millis, rows):
    fast = wire.HEAD.pack(wire.head(kind, flags), id_, millis, rows)
    assert fast == wire.encode_header(Header(kind, id_, b"", millis, rows, flags=flags))


@given(st.binary(max_size=80))
@example(b"pl\x01\x01" + bytes(20))
@example(b"pl\x02\x01" + bytes(20))
def test_any_bytes_are_a_header_or_a_wire_error(data):
    peeked = wire.peek_id(data)
    try:
        header = wire.decode_header(data)
    except WireError:
        return
    assert wire.encode_header(header) == data
    assert peeked == header.id


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "header frame has 0 bytes; wanted at least 24"),
        (b"pl\x01\x01" + bytes(19), "header frame has 23 bytes; wanted at least 24"),
        (b"xx\x01\x01" + bytes(20), "header starts with b'xx'; wanted b'pl'"),
        (b"pl\x01\x7f" + bytes(20), "message kind 0x7f is not known"),
        (b"pl\x01\x01\x04" + bytes(19), "priority 4; wanted 0 to 3"),
        (b"pl\x01\x01\x03" + bytes(19), "priority 3 without the flag PRIORITY; wanted 0"),
        (b"pl\x01\x01\x03\x00\x02" + bytes(17), "priority 3 without the flag PRIORITY; wanted 0"),
        (b"pl\x01\x01\x00\x09" + bytes(18), "reserved header byte is 9; wanted 0"),
        (b"pl\x01\x01" + bytes(65_533), "PREDICT header frame has 65537 bytes; wanted at most 65536"),
    ],
)
def test_what_is_wrong_with_a_header(frame, message):
    with pytest.raises(WireError) as caught:
        wire.decode_header(frame)
    assert str(caught.value) == message


def test_other_versions_are_told_apart():
    with pytest.raises(ProtocolVersionError, match="protocol version 2; wanted 1"):
        wire.decode_header(b"pl\x02\x01" + bytes(20))
    assert wire.peek_id(b"pl\x02\x01" + bytes(4) + b"\x05" + bytes(15)) == 5


def test_no_id_without_magic_or_length():
    assert wire.peek_id(b"pl" + bytes(21)) is None
    assert wire.peek_id(b"lp" + bytes(22)) is None


def test_info_may_be_longer_than_other_headers():
    document = {"models": {f"model-{i}": "x" * 100 for i in range(1000)}}
    frame = wire.encode_header(Header(Kind.INFO, 1, wire.encode_info(document)))
    assert wire.decode_info(wire.decode_header(frame).meta) == document


# -- metas -----------------------------------------------------------------------------------------

names = st.text(max_size=12)
shapes = st.lists(st.integers(0, 1000), max_size=4).map(tuple)
tensor_metas = st.lists(
    st.builds(TensorMeta, names, st.sampled_from(DTYPES), shapes), max_size=4, unique_by=lambda t: t.name
).map(tuple)
versions = st.integers(0, 2**63 - 1)
metas = st.one_of(
    st.builds(
        PredictMeta,
        names,
        st.none() | versions,
        st.none() | names,
        tensor_metas,
        st.none() | st.lists(names, max_size=3).map(tuple),
    ),
    st.builds(SignatureMeta, names, st.none() | versions),
    st.builds(ResultMeta, versions, tensor_metas),
    st.builds(ErrorMeta, names, st.text(max_size=40)),
)
META_KINDS = (PredictMeta, SignatureMeta, ResultMeta, ErrorMeta)


@given(metas)
def test_meta_round_trip(meta):
    data = wire.encode_meta(meta)
    assert wire.decode_meta(type(meta), data) == meta
    assert wire.encode_meta(wire.decode_meta(type(meta), data)) == data  # always the same bytes


@given(st.sampled_from(META_KINDS), st.binary(max_size=80))
@example(SignatureMeta, b"\x92\xa1\xff\xc0")
@example(PredictMeta, b"\x91" * 80)
def test_any_bytes_are_a_meta_or_a_wire_error(kind, data):
    try:
        meta = wire.decode_meta(kind, data)
    except WireError:
        return
    assert isinstance(meta, kind)


@given(metas, st.sampled_from(META_KINDS), st.data())
def test_damaged_meta_is_a_meta_or_a_wire_error(meta, kind, data):
    damaged = bytearray(wire.encode_meta(meta))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        assert isinstance(wire.decode_meta(kind, bytes(damaged)), kind)


def test_elements_of_a_later_version_are_ignored_and_optional_ones_may_be_missing():
    longer = b"\x93\xa1m\xc0\xa5later"
    assert wire.decode_meta(SignatureMeta, longer) == SignatureMeta("m")
    assert wire.decode_meta(SignatureMeta, b"\x91\xa1m") == SignatureMeta("m")
    full = wire.encode_meta(DEFAULT_X)
    assert wire.decode_meta(PredictMeta, b"\x94" + full[1:-1]) == DEFAULT_X


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorMeta("x", "float8", ())], "tensor 'x' has dtype 'float8'; wanted one of bool, "),
        ([TensorMeta("x", "bool", (2, -1))], r"tensor 'x' has shape \[2, -1\]; wanted axes of 0 or more"),
        ([TensorMeta("x", "bool", (1,) * 64)], "tensor 'x' has rank 64; wanted at most 63"),
        ([TensorMeta("x", "bool", (2**40, 2**40))], "is larger than any memory"),
        ([TensorMeta("x", "bool", (0, 2**40, 2**40))], "is larger than any memory"),
        ([TensorMeta("x", "bool", ()), TensorMeta("x", "bool", ())], "tensor 'x' appears twice"),
        ([TensorMeta(str(i), "bool", ()) for i in range(257)], "257 tensors; wanted at most 256"),
    ],
)
def test_what_is_wrong_with_a_tensor_description(tensors, message):
    with pytest.raises(WireError, match=message):
        wire.decode_meta(PredictMeta, wire.encode_meta(PredictMeta("m", None, None, tuple(tensors))))
    with pytest.raises(WireError, match=message):
        wire.decode_meta(ResultMeta, wire.encode_meta(ResultMeta(1, tuple(tensors))))


@given(st.binary(max_size=60))
@example(b"\x81\x90\x01")  # a list as a key
@example(b"\x81\xa1a\xd7\xff" + b"\xff" * 8)  # a timestamp that is none
@example(b"\x81" * 5000)
@example(b"\x91" * 5000)
def test_any_bytes_are_a_document_or_a_wire_error(data):
    try:
        document = wire.decode_info(data)
    except WireError:
        return
    assert all(isinstance(key, str) for key in document)


@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=5))
)
def test_document_round_trip(document):
    assert wire.decode_info(wire.encode_info(document)) == document


# -- errors ----------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(errors.CODES)), st.text(max_size=80), st.none() | st.integers(1, 2**32 - 1))
def test_error_round_trip(code, message, retry_after_ms):
    error = errors.error_from_code(code, message, retry_after_ms=retry_after_ms)
    header = wire.decode_header(wire.encode_error(9, error))
    assert (header.kind, header.id) == (Kind.ERROR, 9)
    decoded = wire.decode_error(header)
    assert type(decoded) is type(error)
    assert (decoded.message, decoded.retry_after_ms) == (message, retry_after_ms)


def test_any_message_of_an_error_can_be_sent():
    for message in ("x" * 100_000, "\U0001f600" * 100_000, "lone \ud800 surrogate"):
        frame = wire.encode_error(1, Overloaded(message))
        assert len(frame) <= wire.MAX_HEADER_BYTES
        assert isinstance(wire.decode_error(wire.decode_header(frame)), PoolError)


def test_a_message_that_fits_is_not_cut():
    whole = "x" * wire.MAX_MESSAGE_CHARS
    for message, got in ((whole, whole), (whole + "y", whole[:-1] + "…")):
        decoded = wire.decode_error(wire.decode_header(wire.encode_error(1, Overloaded(message))))
        assert decoded.message == got


# -- tensors ---------------------------------------------------------------------------------------

numeric = st.sampled_from([name for name in DTYPES if name != "string"])
small_shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@given(numeric, small_shapes, st.data())
def test_numeric_tensor_round_trip(dtype, shape, data):
    items = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
    payload = data.draw(st.binary(min_size=items, max_size=items))
    array = wire.decode_tensor(payload, dtype, shape)
    assert array.shape == shape
    assert array.dtype == numpy_dtype(dtype)
    assert bytes(wire.encode_tensor(array, dtype)) == payload  # bit for bit: NaN payloads too


def test_tensors_need_not_be_contiguous_or_native():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for odd in (array.T, array[:, ::2], array.astype(">f4"), array[::-1]):
        got = wire.decode_tensor(bytes(wire.encode_tensor(odd, "float32")), "float32", odd.shape)
        np.testing.assert_array_equal(got, odd)


def test_contiguous_tensors_are_not_copied():
    for array in (np.arange(12, dtype=np.float32), np.ones((2, 3), ml_dtypes.bfloat16)):
        payload = wire.encode_tensor(array, str(array.dtype))
        assert np.shares_memory(np.frombuffer(payload, np.uint8), array.view(np.uint8))
        assert np.shares_memory(wire.decode_tensor(payload, str(array.dtype), array.shape), array)


@given(hnp.arrays(object, small_shapes, elements=st.binary(max_size=6), fill=st.nothing()))
def test_string_tensor_round_trip(array):
    payload = wire.encode_tensor(array, "string")
    assert len(payload) == 8 * (array.size + 1) + sum(map(len, array.reshape(-1).tolist()))
    got = wire.decode_tensor(payload, "string", array.shape)
    assert got.dtype == object
    assert got.shape == array.shape
    assert got.tolist() == array.tolist()


@given(st.binary(max_size=60), st.sampled_from(DTYPES), small_shapes)
def test_any_bytes_are_a_tensor_or_a_wire_error(payload, dtype, shape):
    try:
        array = wire.decode_tensor(payload, dtype, shape)
    except WireError:
        return
    assert array.shape == shape


@pytest.mark.parametrize(
    "shape", [(0,) * 70, (2**32 - 1, 0, 2**46), (0, 2**63), (0, 2**64)], ids=["rank", "bytes", "i64", "u64"]
)
@pytest.mark.parametrize("dtype", ["float64", "string"])
def test_empty_tensors_of_impossible_shape(dtype, shape):
    payload = bytes(8) if dtype == "string" else b""
    with contextlib.suppress(WireError):
        assert wire.decode_tensor(payload, dtype, shape).shape == shape


@pytest.mark.parametrize(
    ("payload", "items", "message"),
    [
        (b"", 0, "string tensor has 0 bytes; wanted at least 8 for 0 items"),
        (bytes(15), 1, "string tensor has 15 bytes; wanted at least 16 for 1 items"),
        (b"\1" + bytes(7) + b"\1" + bytes(7) + b"a", 1, "from 0 to its heap's 1 bytes; got 1 to 1"),
        (bytes(16) + b"a", 1, "from 0 to its heap's 1 bytes; got 0 to 0"),
        (bytes(8) + b"\3" + bytes(7) + b"\2" + bytes(7) + b"ab", 2, "from 0 to its heap's 2 bytes"),
    ],
)
def test_what_is_wrong_with_a_string_tensor(payload, items, message):
    with pytest.raises(WireError, match=message):
        wire.split_strings(payload, items)


parts = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**20)))


@given(parts.filter(bool))
def test_parts_of_a_bundle_round_trip(parts):
    table = parts_table(*parts).tobytes()
    total = sum(rows for _, _, rows in parts)
    assert list(zip(*wire.split_parts(table, total), strict=True)) == parts
    ids, _, counts = wire.split_parts(table, total)
    assert wire.split_parts(wire.without_millis(table), total) == (ids, [0] * len(ids), counts)
    with pytest.raises(WireError, match=f"have {total} rows; its header says {total + 1}"):
        wire.split_parts(table, total + 1)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_any_bytes_are_parts_or_a_wire_error(table, rows):
    with contextlib.suppress(WireError):
        assert sum(wire.split_parts(table, rows)[2]) == rows


def test_what_is_wrong_with_a_numeric_tensor():
    with pytest.raises(WireError, match=r"float32 tensor of shape \[2, 3\] has 20 bytes; wanted 24"):
        wire.decode_tensor(bytes(20), "float32", (2, 3))
