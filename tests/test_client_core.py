"""The client core: inputs to frames, without a socket."""

from __future__ import annotations

import math
import struct

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import wire
from pool.client.core import COPY_BYTES, ClientCore, check_timeout, timeout_to_ms
from pool.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    SignatureNotFound,
    TooLarge,
    WireError,
)
from pool.signature import DTYPES, Signature, TensorSpec, numpy_dtype
from pool.wire import Flag, Header, Kind, PredictMeta, TensorMeta
from tests.scripted_server import SIGNATURES, rows, signature_document, unbundle
from tests.test_wire import documented_messages


def core_for(*signatures: Signature, cast: str = "safe") -> ClientCore:
    """A core that knows a model "m" with these signatures; with none, those of the scripted server."""
    core = ClientCore(cast=cast)
    document = signature_document()
    if signatures:
        document = signature_document(signatures=signatures) | {"max_rows": None}
    core.learn("m", None, document)
    return core


def sole(dtype, shape=(None,), **kwargs) -> ClientCore:
    """A core that knows a model "m" with one input "x" of this dtype and shape."""
    spec = TensorSpec("x", dtype, shape)
    return core_for(Signature("serving_default", (spec,), (spec,), **kwargs))


def encode(core, inputs, **kwargs):
    """What a server sees of a request: its header, its meta, its arrays."""
    request = core.request("m", inputs, **kwargs)
    assert request is not None
    first, *payloads = request.message()
    header = wire.decode_header(first)
    assert (header.kind, header.id) == (Kind.PREDICT, request.id)
    meta = wire.decode_meta(PredictMeta, header.meta)
    whole = [t.shape for t in meta.inputs]
    if meta.signature != "whole":
        whole = [(header.rows, *shape) for shape in whole]
    arrays = [
        wire.decode_tensor(bytes(payload), t.dtype, shape)
        for payload, t, shape in zip(payloads, meta.inputs, whole, strict=True)
    ]
    return header, meta, arrays


def refused(core, inputs, **kwargs) -> str:
    with pytest.raises(InvalidInput) as caught:
        core.request("m", inputs, **kwargs)
    return caught.value.message


# -- requests --------------------------------------------------------------------------------------


def test_a_request_says_what_is_asked():
    header, meta, arrays = encode(core_for(), {"x": rows(2)}, timeout_ms=250)
    assert (header.rows, header.millis, header.flags, header.priority) == (2, 250, 0, 0)
    assert meta == PredictMeta("m", None, "serving_default", (TensorMeta("x", "float32", (3,)),), None)
    np.testing.assert_array_equal(arrays[0], rows(2))


def test_the_bytes_of_a_repeated_request_differ_only_in_its_id():
    core = core_for()
    first, again = core.request("m", rows(1), timeout_ms=9), core.request("m", rows(1), timeout_ms=9)
    assert first.id != again.id
    (header, payload), (header_again, payload_again) = first.message(), again.message()
    assert header_again == header[:8] + struct.pack("<Q", again.id) + header[16:]
    assert payload_again == payload == rows(1).tobytes()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x}], ids=["bare", "dict"])
@pytest.mark.parametrize("count", [0, 1, 5, COPY_BYTES // 12, COPY_BYTES])
def test_all_ways_to_say_the_same_give_the_same_message(wrap, count):
    core = sole("float32", (None, 3))
    array = rows(count)
    expected = encode(core, array)
    odd = np.zeros((count, 6), np.float32)
    odd[:, ::2] = array
    for same in (array, array.astype(">f4"), np.asfortranarray(array), odd[:, ::2], array.astype(np.float16)):
        header, meta, arrays = encode(core, wrap(same))
        assert (header.rows, meta) == (expected[0].rows, expected[1])
        np.testing.assert_array_equal(arrays[0], same.astype(np.float32))


def test_small_inputs_are_copied_and_large_ones_aliased():
    core = sole("float32", (None, 3))
    small, large = rows(1), rows(COPY_BYTES)
    assert type(core.request("m", small).tensors[0]) is bytes
    assert np.shares_memory(np.frombuffer(core.request("m", large).tensors[0], np.float32), large)


def test_several_inputs_go_in_the_signature_s_order():
    core = core_for()
    for inputs in (
        {"a": np.arange(2), "b": np.full((2, 2), b"s", object)},
        {"b": np.full((2, 2), "s"), "a": np.arange(2, dtype=np.int8)},
    ):
        header, meta, (a, b) = encode(core, inputs, signature="pair", outputs=["b"])
        assert header.rows == 2
        assert [t.name for t in meta.inputs] == ["a", "b"]
        assert meta.outputs == ("b",)
        assert a.tolist() == [0, 1]
        assert b.tolist() == [[b"s", b"s"]] * 2


def test_what_is_not_batched_goes_whole():
    header, meta, arrays = encode(core_for(), rows(2), signature="whole")
    assert header.rows == 1
    assert meta.inputs == (TensorMeta("x", "float32", (2, 3)),)
    np.testing.assert_array_equal(arrays[0], rows(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalar_rows_of_every_dtype(dtype):
    array = (
        np.array([b"a\0", b""], object) if dtype == "string" else np.array([0, 1]).astype(numpy_dtype(dtype))
    )
    header, meta, arrays = encode(sole(dtype), array)
    assert header.rows == 2
    assert meta.inputs == (TensorMeta("x", dtype, ()),)
    assert arrays[0].dtype == array.dtype
    assert arrays[0].tolist() == array.tolist()


def test_nan_is_a_value():
    array = np.array([math.nan, math.inf, -0.0], np.float32)
    (got,) = encode(sole("float32"), array)[2]
    assert got.tobytes() == array.tobytes()


def test_a_signature_must_be_learnt_first_for_each_version():
    core = ClientCore()
    assert core.request("m", rows(1)) is None
    info = core.learn("m", None, signature_document())
    assert (info.model, info.version, info.max_rows) == ("m", 7, 64)
    assert core.request("m", rows(1)) is not None
    assert core.request("m", rows(1), version=3) is None
    core.learn("m", 3, signature_document())
    assert encode(core, rows(1), version=3)[1].version == 3
    assert core.request("other", rows(1)) is None


def test_a_tensor_above_the_servers_limit_is_refused():
    core = ClientCore()
    core.learn("m", None, signature_document() | {"max_rows": None, "max_frame_bytes": 65_536})
    with pytest.raises(TooLarge, match="has 65544 bytes; the server takes at most 65536 in one message"):
        core.request("m", np.zeros((5462, 3), np.float32))


def test_a_bundle_keeps_the_servers_limit():
    core = ClientCore()
    core.learn("m", None, signature_document() | {"max_rows": None, "max_frame_bytes": 65_536})
    requests = [core.request("m", rows(1000)) for _ in range(12)]
    sizes = [len(frames[-1]) for frames, _ in core.bundle(requests)]
    assert sizes == [60_000, 60_000, 24_000]


def test_the_only_signature_is_the_default():
    spec = TensorSpec("x", "float32", (None,))
    core = core_for(Signature("odd", (spec,), (spec,)))
    assert encode(core, [1.0])[1].signature == "odd"


def test_questions():
    core = ClientCore()
    for request, kind in (
        (core.models_request(), Kind.MODELS),
        (core.status_request(), Kind.STATUS),
        (core.live_request(), Kind.LIVE),
    ):
        assert [wire.decode_header(frame) for frame in request.message()] == [Header(kind, request.id, b"")]
    (frame,) = core.signature_request("m", 3).message()
    assert wire.decode_meta(wire.SignatureMeta, wire.decode_header(frame).meta) == wire.SignatureMeta("m", 3)
    (frame,) = core.ready_request().message()
    assert wire.decode_meta(wire.SignatureMeta, wire.decode_header(frame).meta) == wire.SignatureMeta(
        "", None
    )


# -- refusals --------------------------------------------------------------------------------------


def test_a_missing_row_axis_is_not_guessed_at():
    assert refused(sole("float32", (None, 3)), np.zeros(3, np.float32)) == (
        "input 'x' has shape [3]; wanted float32 [any, 3]; a single example needs a row axis: x[None]"
    )
    assert "needs a row axis" in refused(sole("float32"), np.float32(1))
    assert "needs a row axis" in refused(sole("float32", None), 1.0)
    assert "row axis" not in refused(sole("float32", (None, 3)), np.zeros(4, np.float32))
    assert "row axis" not in refused(core_for(), np.zeros(3, np.float32), signature="whole")


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (2, 4), (1, 2, 3)])
def test_wrong_shapes(shape):
    message = refused(sole("float32", (None, 3)), np.zeros(shape, np.float32))
    assert message.startswith(f"input 'x' has shape {list(shape)}; wanted float32 [any, 3]")


@pytest.mark.parametrize("shape", [(0,), (2,), (2, 3), (2, 0, 4)])
def test_an_unknown_rank_takes_any(shape):
    header, meta, _ = encode(sole("float32", None), np.zeros(shape, np.float32))
    assert (header.rows, *meta.inputs[0].shape) == shape


def test_wrong_names():
    core = core_for
    assert refused(core(), {"y": rows(1)}) == (
        "inputs of signature 'serving_default': missing 'x'; unknown 'y'; wanted 'x'"
    )
    assert "unknown 'z'" in refused(core(), {"x": rows(1), "z": rows(1)})
    assert "missing 'a', 'b'" in refused(core(), {}, signature="pair")
    assert refused(core(), rows(1), signature="pair") == (
        "inputs is one ndarray, but signature 'pair' has 2 inputs; wanted a dict with 'a', 'b'"
    )
    with pytest.raises(
        SignatureNotFound, match="no signature 'nope'; wanted one of 'serving_default', 'pair'"
    ):
        core().request("m", rows(1), signature="nope")


def test_wrong_outputs():
    assert refused(core_for(), rows(1), outputs=["z"]) == (
        "signature 'serving_default' has no output 'z'; wanted some of 'y'"
    )
    assert "empty" in refused(core_for(), rows(1), outputs=[])
    assert "names one twice" in refused(core_for(), rows(1), outputs=["y", "y"])
    assert "outputs is the str 'y'" in refused(core_for(), rows(1), outputs="y")


def test_unequal_rows():
    inputs = {"a": np.arange(3), "b": np.full((2, 2), b"s", object)}
    assert refused(core_for(), inputs, signature="pair") == (
        "inputs differ in rows: 'a' has 3, 'b' has 2; wanted the same number in all"
    )
    inputs = {"a": np.arange(3), "b": np.full(2, b"s", object)}
    assert "input 'b' has shape [2]" in refused(core_for(), inputs, signature="pair")


def test_too_many_rows():
    core = core_for()
    assert core.request("m", rows(64)) is not None
    with pytest.raises(TooLarge, match="65 rows; model 'm' takes at most 64 in one request"):
        core.request("m", rows(65))


def test_names_and_shapes_must_fit_a_header():
    spec = TensorSpec("x" * 70_000, "float32", (None,))
    assert "names and shapes take 70" in refused(core_for(Signature("s", (spec,), (spec,))), [1.0])


def test_wrong_names_of_models_and_versions():
    core = ClientCore()
    with pytest.raises(InvalidInput, match="model is 5; wanted its name"):
        core.signature_request(5)
    with pytest.raises(InvalidInput, match="version is -1; wanted a number from 0"):
        core.signature_request("m", -1)


@pytest.mark.parametrize(
    "refuse",
    [
        lambda core: core.request("m", np.zeros(5, np.float32)),
        lambda core: core.request("m", rows(1), signature="nope"),
        lambda core: core.request("m", rows(1), outputs=["nope"]),
    ],
)
def test_a_refusal_forgets_the_signature_which_may_be_an_old_one(refuse):
    core = core_for()
    with pytest.raises((InvalidInput, SignatureNotFound)):
        refuse(core)
    assert core.request("m", rows(1)) is None


@pytest.mark.parametrize(
    ("error", "forgets"),
    [(InvalidInput("x"), True), (ModelNotFound("x"), True), (Overloaded("x"), False)],
)
def test_a_refusal_by_the_server_too(error, forgets):
    core = core_for()
    core.learn("other", None, signature_document("other"))
    core.request("m", rows(1))
    core.note_refusal("m", error)
    assert (core.request("m", rows(1)) is None) is forgets
    assert core.request("other", rows(1)) is not None


# -- casts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("have", "wanted"),
    [
        ("int32", "int64"),
        ("float32", "float64"),
        ("float16", "float32"),
        ("uint8", "int16"),
        ("int8", "float16"),
        ("bool", "int8"),
        ("bfloat16", "float32"),
        ("int32", "float64"),
        ("float32", "complex64"),
    ],
)
def test_lossless_casts_are_made(have, wanted):
    array = np.array([0, 1]).astype(numpy_dtype(have))
    (got,) = encode(sole(wanted), array)[2]
    assert got.dtype == numpy_dtype(wanted)
    assert got.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("have", "wanted", "same_kind"),
    [
        ("float64", "float32", True),
        ("float32", "float16", True),
        ("float32", "bfloat16", True),
        ("int64", "int32", True),
        ("int64", "float32", True),
        ("complex128", "complex64", True),
        ("float32", "int32", False),
        ("complex64", "float32", False),
        ("float32", "bool", False),
        ("int8", "uint8", False),
    ],
)
def test_lossy_casts_are_refused_with_advice(have, wanted, same_kind):
    array = np.array([0, 1]).astype(numpy_dtype(have))
    message = refused(sole(wanted), array)
    assert message.startswith(f"input 'x' has dtype {have}; wanted {wanted} [any]")
    assert message.endswith('; cast="same_kind" allows the loss') is same_kind
    if same_kind:
        assert encode(sole(wanted), array, cast="same_kind")[2][0].tolist() == [0, 1]
        core = core_for(
            Signature("s", (TensorSpec("x", wanted, (None,)),), (TensorSpec("x", wanted, (None,)),)),
            cast="same_kind",
        )
        assert encode(core, array)[2][0].tolist() == [0, 1]
        assert "dtype" in refused(core, array, cast="safe")
    else:
        assert "cast=" not in refused(sole(wanted), array, cast="same_kind")


def test_same_kind_may_overflow_without_a_word():
    (got,) = encode(sole("float16"), np.array([1e30]), cast="same_kind")[2]
    assert math.isinf(got[0])


def test_integers_beyond_the_significand_are_not_safe():
    exact, not_exact = np.array([2**53, -(2**53)]), np.array([2**53 + 1])
    assert encode(sole("float64"), exact)[2][0].tolist() == [2.0**53, -(2.0**53)]
    assert "cast=" in refused(sole("float64"), not_exact)
    assert encode(sole("float64"), not_exact, cast="same_kind")[2][0].tolist() == [2.0**53]
    assert encode(sole("float64"), not_exact[:0])[0].rows == 0


@pytest.mark.parametrize(
    ("value", "wanted", "got"),
    [
        ([0.1, 2], "float32", [np.float32(0.1), 2]),
        ([0.1], "bfloat16", [ml_dtypes.bfloat16(0.1)]),
        ((1, 2), "int8", [1, 2]),
        ([1, 2], "float16", [1, 2]),
        ([True], "int32", [1]),
        ([2**63], "uint64", [2**63]),
        ([1 + 2j], "complex64", [1 + 2j]),
        ([math.inf, math.nan], "float16", [math.inf, math.nan]),
        ([], "int32", []),
        ([np.float32(1)], "float32", [1]),
    ],
)
def test_python_numbers_are_taken_by_value(value, wanted, got):
    np.testing.assert_array_equal(encode(sole(wanted), value)[2][0], np.array(got, numpy_dtype(wanted)))


@pytest.mark.parametrize(
    ("value", "wanted", "message"),
    [
        ([300], "uint8", "integers from 300 to 300, not all of which fit; wanted uint8"),
        ([-1, 5], "uint64", "integers from -1 to 5"),
        ([2**24 + 1], "float32", "integers from 16777217"),
        ([1e300, 1.0], "float32", "has 1e+300, which is too large"),
        ([1e5], "float16", "too large"),
        ([1.0], "int32", "has dtype float64; wanted int32"),
        ([1], "bool", "has dtype int64; wanted bool"),
        ([1j], "float32", "has dtype complex128"),
        ([2**70], "int64", "has dtype object"),
        ([[1], [2, 3]], "int64", "is not an array"),
        (["1"], "int64", "has dtype <U1"),
        ([None], "float32", "has dtype object"),
        (None, "float32", "has dtype object"),
        (object(), "float32", "has dtype object"),
        (np.array(["2020"], "datetime64[Y]"), "int64", "has dtype datetime64[Y]"),
        ([1], "string", "item of type int; wanted bytes or str"),
        (np.arange(2), "string", "has dtype int64; wanted string"),
        ([[b"a"], [b"b", b"c"]], "string", "is not an array|item of type list"),
        (["\ud800"], "string", "a str that is not Unicode"),
    ],
)
def test_what_cannot_be_taken(value, wanted, message):
    got = refused(sole(wanted), value)
    assert any(each in got for each in message.split("|")), got


@pytest.mark.parametrize(
    "value",
    [
        ["é", b"b\0"],
        ("é", b"b\0"),
        np.array(["é", b"b\0"], object),
        np.array(["é", "b\0"], object),
    ],
)
def test_strings(value):
    assert encode(sole("string"), value)[2][0].tolist() == ["é".encode(), b"b\0"]


def test_numpy_strings():
    for array in (np.array([b"ab", b"c"]), np.array(["ab", "c"])):
        assert encode(sole("string"), array)[2][0].tolist() == [b"ab", b"c"]
        assert encode(sole("string", (None, None)), array[None, ::-1])[2][0].tolist() == [[b"c", b"ab"]]


def test_objects_that_numpy_can_read():
    class Like:
        def __array__(self, dtype=None, copy=None):
            return np.ones(2, np.float32)

    assert encode(sole("float32"), Like())[2][0].tolist() == [1, 1]
    assert "float32" in refused(sole("int32"), Like())
    assert encode(sole("uint8"), memoryview(b"ab"))[2][0].tolist() == [97, 98]


def test_the_cast_must_be_known():
    with pytest.raises(InvalidInput, match="cast is 'unsafe'; wanted one of 'safe', 'same_kind'"):
        ClientCore(cast="unsafe")
    with pytest.raises(InvalidInput, match="cast is 'x'"):
        core_for().request("m", np.zeros((1, 3)), cast="x")


@given(
    st.sampled_from([name for name in DTYPES if name != "string"]),
    st.sampled_from([name for name in DTYPES if name != "string"]),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
)
def test_a_safe_cast_never_changes_a_value(have, wanted, values):
    with np.errstate(all="ignore"):
        array = np.array(values, np.int64).astype(numpy_dtype(have))
    try:
        (got,) = encode(sole(wanted), array)[2]
    except InvalidInput:
        return
    assert got.dtype == numpy_dtype(wanted)
    for mine, sent in zip(array.tolist(), got.tolist(), strict=True):
        assert mine == sent or mine != mine  # NaN


# -- documents and limits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "7"}, "Expected `int`, got `str`"),
        ({"signatures": [{"name": "s"}]}, "missing required field `inputs`"),
        ({"signatures": None}, "Expected `array`, got `null`"),
    ],
)
def test_signatures_that_are_none(change, message):
    with pytest.raises(WireError, match=f"the signatures of model 'm' are not valid: .*{message}"):
        ClientCore().learn("m", None, signature_document() | change)


def test_a_signature_of_an_unknown_dtype():
    spec = TensorSpec("x", "float8", (None,))
    with pytest.raises(WireError, match="model 'm': tensor 'x' has unknown dtype 'float8'"):
        ClientCore().learn("m", None, signature_document(signatures=[Signature("s", (spec,), (spec,))]))


def test_caches_are_bounded():
    core = sole("float32", (None, None))
    for width in range(5_000):
        core.request("m", np.zeros((1, width), np.float32))
    (route,) = core._routes.values()
    assert len(route.patterns) <= 4_096


@pytest.mark.parametrize(
    ("seconds", "ms"), [(60, 60_000), (0.0001, 1), (0.0019, 1), (math.inf, 0), (1e9, 2**32 - 1), (1.5, 1500)]
)
def test_timeouts_on_the_wire(seconds, ms):
    assert timeout_to_ms(check_timeout(seconds)) == ms


@pytest.mark.parametrize("seconds", [0, -1.5, math.nan])
def test_no_time_left(seconds):
    with pytest.raises(DeadlineExceeded, match="wanted more than 0 s"):
        check_timeout(seconds)


# -- priorities, cancelling -----------------------------------------------------------------------


def priority_of(header: Header) -> int | None:
    return header.priority if header.flags & Flag.PRIORITY else None


def test_a_priority_is_that_of_the_specification():
    core = core_for()
    (header, _), (documented, _) = (
        core.request("m", rows(1), priority=3).message(),
        documented_messages()["PREDICT priority"],
    )
    assert header[:8] == documented[:8]
    assert header[16 : wire.FIXED_BYTES] == documented[16 : wire.FIXED_BYTES]


@pytest.mark.parametrize("inputs", [rows(1), rows(1).tolist()], ids=["fast", "slow"])
@pytest.mark.parametrize("priority", [None, 0, 1, 2, 3])
def test_every_request_can_have_a_priority(inputs, priority):
    core = core_for()
    core.request("m", rows(1))
    header, _, _ = encode(core, inputs, priority=priority)
    assert priority_of(header) == priority
    assert header.priority == (priority or 0)


@pytest.mark.parametrize("priority", [-1, 4, 1.5, "1", [1]])
def test_wrong_priorities(priority):
    core = core_for()
    for _ in range(2):
        assert refused(core, rows(1), priority=priority) == (
            f"priority is {priority!r}; wanted a number from 0 (first) to 3, or None"
        )
    assert core.request("m", rows(1)) is not None


def test_a_withdrawal_is_that_of_the_specification():
    assert ClientCore().cancel(1) == documented_messages()["CANCEL"]


# -- bundles ---------------------------------------------------------------------------------------


def sent(core: ClientCore, requests) -> list[tuple[int, int, int, int | None, list[bytes]]]:
    """What a server sees of requests sent in bundles: (id, millis, rows, priority, tensor frames) of each."""
    seen = []
    for frames, count in core.bundle(requests):
        arrived = [
            (header.id, header.millis, header.rows, priority_of(header), [bytes(each) for each in payloads])
            for header, payloads in unbundle(wire.decode_header(frames[0]), [bytes(f) for f in frames[1:]])
        ]
        assert len(arrived) == count
        seen += arrived
    return seen


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["serving_default", "pair", "whole", "large"]),
            st.integers(0, 5),
            st.sampled_from([None, 0, 3]),
        ),
        max_size=40,
    )
)
def test_bundles_carry_every_request_in_order_and_unchanged(calls):
    core = core_for(*SIGNATURES)
    requests = []
    for signature, n, priority in calls:
        inputs = {
            "serving_default": lambda n: rows(n),
            "pair": lambda n: {"a": np.arange(n), "b": np.full((n, 2), b"x", object)},
            "whole": lambda _: rows(2),
            "large": lambda n: np.zeros((1, n * COPY_BYTES // 2), np.uint8),
        }[signature](n)
        request = core.request("m", inputs, signature=signature, timeout_ms=n, priority=priority)
        requests.append(request)
    expected = []
    for request in requests:
        first, *payloads = request.message()
        header = wire.decode_header(first)
        tensors = [bytes(payload) for payload in payloads]
        expected.append((request.id, header.millis, header.rows, priority_of(header), tensors))
    assert [each[3] for each in expected] == [priority for _, _, priority in calls]
    assert sent(core, requests) == expected


def test_what_is_alike_and_small_travels_together_and_nothing_else():
    core = core_for(*SIGNATURES)
    core.request("m", rows(1))
    small = [core.request("m", rows(1)) for _ in range(5000)]
    counts = [count for _, count in core.bundle(small)]
    assert counts == [4096, 904]
    strings = {"a": np.arange(1), "b": np.full((1, 2), b"x", object)}
    alone = [
        core.request("m", strings, signature="pair"),
        core.request("m", rows(2), signature="whole"),
        core.request("m", np.zeros((1, COPY_BYTES + 1), np.uint8), signature="large"),
    ]
    for request in alone:
        assert [count for _, count in core.bundle([request, request])] == [1, 1]
    mixed = [small[0], small[1], alone[0], small[2], small[3]]
    assert [count for _, count in core.bundle(mixed)] == [2, 1, 2]
    ranked = [core.request("m", rows(1), priority=each) for each in (None, None, 0, 0, 0, 3, 0)]
    assert [count for _, count in core.bundle(ranked)] == [2, 3, 1, 1]
    assert list(core.bundle([])) == []


def test_a_bundle_is_that_of_the_specification():
    core = core_for(*SIGNATURES)
    request = core.request("m", rows(1))
    assert request is not None

    def numbered(id_, millis, array):
        tensors = [array.astype(np.float32).tobytes()]
        return msgspec.structs.replace(request, id=id_, millis=millis, rows=len(array), tensors=tensors)

    requests = [
        numbered(3, 60_000, np.array([[1, 2, 3]])),
        numbered(4, 0, np.array([[4, 5, 6], [7, 8, 9]])),
    ]
    ((frames, count),) = core.bundle(requests)
    assert count == 2
    assert [bytes(frame) for frame in frames][1:] == documented_messages()["PREDICT bundle"][1:]
    # The client names the signature it learnt; so the header is that of the box up to the meta.
    assert frames[0][: wire.FIXED_BYTES] == documented_messages()["PREDICT bundle"][0][: wire.FIXED_BYTES]
