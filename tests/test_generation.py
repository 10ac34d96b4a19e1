"""Resolving headers and placing rows, read back through the worker's own code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool import wire
from pool.errors import (
    ConfigError,
    InternalError,
    InvalidInput,
    Overloaded,
    PoolError,
    SignatureNotFound,
    TooLarge,
    WireError,
    WorkerLost,
)
from pool.shm.arena import OutputPlace, encode_outputs
from pool.signature import DTYPES, Signature, TensorSpec, numpy_dtype
from pool.wire import PredictMeta, TensorMeta
from tests.rig import ClientMemory, NumpyModel, Rig, floats, generation, identity

FLOATS = identity(("x", "float32", (None, 3)))
PAIR = identity(("a", "int32", (None,)), ("b", "float64", (None, 2)))
TEXTS = identity(("text", "string", (None,)))


def texts(*items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


def meta(*tensors, signature=None, outputs=None):
    return PredictMeta("m", None, signature, tuple(TensorMeta(*t) for t in tensors), outputs)


# -- resolving -------------------------------------------------------------------------------------

UNBATCHED = Signature(
    "whole",
    (TensorSpec("x", "float32", (2, 3)),),
    (TensorSpec("y", "float32", (2, 3)),),
    batched=False,
    unbatched_reason="the first dimension is fixed",
)


@pytest.mark.parametrize(
    ("request_", "kind", "sentence"),
    [
        (meta(("x", "float32", (3,)), signature="other"), SignatureNotFound, "no signature 'other'.*'pair'"),
        (meta(("y", "float32", (3,))), InvalidInput, "has no input 'y'; wanted 'x'"),
        (meta(), InvalidInput, r"inputs \['x'\] are missing"),
        (meta(("x", "float64", (3,))), InvalidInput, "input 'x' has dtype float64; wanted float32"),
        (meta(("x", "float32", (4,))), InvalidInput, r"input 'x' has rows of shape \[4\]; wanted \[3\]"),
        (meta(("x", "float32", ())), InvalidInput, r"input 'x' has rows of shape \[\]; wanted \[3\]"),
        (meta(("x", "float32", (1, 3))), InvalidInput, r"has rows of shape \[1, 3\]; wanted \[3\]"),
        (meta(("x", "float32", (3,)), outputs=("z",)), InvalidInput, "has no output 'z'; wanted 'x_out'"),
        (meta(("x", "float32", (3,)), outputs=("x_out",) * 2), InvalidInput, "outputs .* name one twice"),
        (meta(("a", "int32", ()), signature="pair"), InvalidInput, r"inputs \['b'\] are missing"),
        (meta(("x", "float32", (3, 3)), signature="whole"), InvalidInput, r"\[3, 3\]; wanted \[2, 3\]"),
        (meta(("x", "float32", (9, 2**20)), signature="open"), TooLarge, "one row .* raise max_rows_bytes"),
        (meta(("x", "float32", (9,)), signature="open"), InvalidInput, r"\[9\]; wanted \['any', 'any'\]"),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_says_what_was_got_and_wanted(rig_of, request_, kind, sentence):
    pair = Signature("pair", PAIR.inputs, PAIR.outputs)
    rig = rig_of(FLOATS, pair, UNBATCHED, identity(("x", "float32", (None, None, None)), name="open"))
    with pytest.raises(kind, match=sentence):
        rig.generation.resolve(request_)


def test_the_default_signature_is_the_only_one_or_serving_default(rig_of):
    assert rig_of(UNBATCHED).generation.find_signature(None) is UNBATCHED
    assert rig_of(UNBATCHED, FLOATS).generation.find_signature(None) is FLOATS
    with pytest.raises(SignatureNotFound):
        rig_of(UNBATCHED, identity(("x", "int8", (None,)), name="two")).generation.find_signature(None)


def test_requests_of_equal_row_shape_share_a_layout_whatever_their_order_and_outputs(rig_of):
    resolve = rig_of(PAIR).generation.resolve
    one = resolve(meta(("a", "int32", ()), ("b", "float64", (2,))))
    two = resolve(meta(("b", "float64", (2,)), ("a", "int32", ()), outputs=("b_out",)))
    assert one.key == two.key
    assert one.inputs == two.inputs[::-1]
    assert one.outputs == (0, 1)
    assert two.outputs == (1,)


def test_what_a_client_must_know_is_described(rig_of):
    described = rig_of(FLOATS, UNBATCHED, max_batch_size=8, slots=4).generation.describe()
    assert described["model"] == "m"
    assert described["version"] == 7
    assert described["max_rows"] == 32
    assert [each["name"] for each in described["signatures"]] == ["serving_default", "whole"]
    assert described["signatures"][1]["unbatched_reason"] == "the first dimension is fixed"


def test_layouts_are_forgotten_before_they_fill_the_memory(rig_of, monkeypatch):
    monkeypatch.setattr("pool.front.generation._REMEMBERED_MAX", 8)
    rig = rig_of(identity(("x", "int8", (None, None))), slots=1, max_rows_bytes=1 << 16)
    numbers = [rig.route({"x": np.zeros((1, n), np.int8)}).key for n in range(30)]
    assert len(set(numbers)) == 30, "a number is never used twice: workers know layouts by it"
    assert len(rig.generation._layouts) <= 8


def test_an_arena_too_large_for_the_machine_is_a_mistake_of_the_config():
    with pytest.raises(ConfigError, match=r"arena of 1024 slots .*; lower slots"):
        generation(FLOATS, max_rows_bytes=1 << 40, slots=1024)


# -- placing: sizes and refusals ---------------------------------------------------------------------


def test_rows_run_together_and_each_request_gets_its_own_back(rig_of):
    rig = rig_of(FLOATS, max_batch_size=8, slots=2)
    for i, rows in enumerate([1, 3, 0, 2]):
        rig.place(i, {"x": floats(rows, 100 * i)})
    rig.run_all()
    assert rig.batches == [6]
    for i, rows in enumerate([1, 3, 0, 2]):
        np.testing.assert_array_equal(rig.sink.answers[i]["x_out"], floats(rows, 100 * i))


def test_a_request_that_does_not_fit_its_slot_is_split_and_joined(rig_of):
    rig = rig_of(PAIR, max_batch_size=4, slots=6)
    rig.place("small", {"a": np.arange(3, dtype=np.int32), "b": np.ones((3, 2))})
    a, b = np.arange(17, dtype=np.int32), np.arange(34.0).reshape(17, 2)
    rig.place("large", {"a": a, "b": b})
    rig.run_all()
    assert rig.batches == [4, 4, 4, 4, 4]
    np.testing.assert_array_equal(rig.sink.answers["large"]["a_out"], a)
    np.testing.assert_array_equal(rig.sink.answers["large"]["b_out"], b)
    assert len(rig.sink.answers["small"]["a_out"]) == 3


def test_parts_may_finish_in_any_order(rig_of):
    rig = rig_of(FLOATS, max_batch_size=2, slots=4)
    rig.place(0, {"x": floats(7)})
    running = []
    for worker in range(4):
        rig.batcher.worker_ready(worker)
    running = [slot for slot, _ in rig.batcher.dispatch(rig.now)]
    assert len(running) == 4
    for slot in reversed(running):
        assert rig.sink.answers == {}
        rig.finish(slot)
    np.testing.assert_array_equal(rig.sink.answers[0]["x_out"], floats(7))
    assert rig.batcher.is_idle


def test_a_request_of_all_the_rows_there_are_is_admitted_and_one_more_is_too_large(rig_of):
    rig = rig_of(FLOATS, max_batch_size=4, slots=3)
    rig.place(0, {"x": floats(12)})
    with pytest.raises(Overloaded, match="no room for 1 rows: model 'm' has 0 of 12 rows free") as caught:
        rig.place(1, {"x": floats(1)})
    assert caught.value.retryable
    assert caught.value.retry_after_ms > 0
    rig.run_all()
    with pytest.raises(TooLarge, match="request of 13 rows; model 'm' takes at most 12 of one client"):
        rig.place(2, {"x": floats(13)})
    assert list(rig.sink.answers) == [0]


def test_an_overloaded_request_leaves_no_rows_behind(rig_of):
    rig = rig_of(FLOATS, max_batch_size=4, slots=2)
    rig.place(0, {"x": floats(3)})
    with pytest.raises(Overloaded, match="no room for 6 rows: model 'm' has 5 of 8"):
        rig.place(1, {"x": floats(6)})
    assert rig.batcher.queue_rows == 3
    rig.run_all()
    assert rig.batches == [3]


def test_a_request_of_no_rows_finds_no_room_in_a_full_arena(rig_of):
    rig = rig_of(FLOATS, max_batch_size=2, slots=1)
    rig.place(0, {"x": floats(2)})
    with pytest.raises(Overloaded, match="no room for 0 rows"):
        rig.place(1, {"x": floats(0)})


def test_requests_of_different_shapes_do_not_share_a_batch(rig_of):
    rig = rig_of(identity(("x", "int8", (None, None))), slots=3, max_rows_bytes=1 << 12)
    for i, length in enumerate([2, 3, 2]):
        rig.place(i, {"x": np.full((1, length), i, np.int8)})
    rig.run_all()
    assert rig.batches == [2, 1]
    for i, length in enumerate([2, 3, 2]):
        np.testing.assert_array_equal(rig.sink.answers[i]["x_out"], np.full((1, length), i))


def test_an_unbatched_signature_takes_whole_tensors_one_at_a_time(rig_of):
    rig = rig_of(UNBATCHED, slots=3)
    for i in range(2):
        rig.place(i, {"x": floats(2, i)})
    rig.run_all()
    assert rig.batches == [1, 1]
    for i in range(2):
        np.testing.assert_array_equal(rig.sink.answers[i]["y"], floats(2, i))
    route = rig.route({"x": floats(2)})
    for rows in (0, 2):
        with pytest.raises(
            InvalidInput, match=f"{rows} rows for signature 'whole', .*first dimension is fixed"
        ):
            rig.generation.place(rig.ticket(9, route, rows), [floats(2).tobytes()], rig.now)


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ([], "0 tensor frames; the header names 1"),
        ([b"", b""], "2 tensor frames; the header names 1"),
        ([b"x" * 35], r"tensor frame 0 has 35 bytes; wanted 36 \(3 rows of float32 \[3\]\)"),
        ([b"x" * 37], "tensor frame 0 has 37 bytes; wanted 36"),
    ],
)
def test_frames_that_do_not_fit_the_header_are_refused(rig_of, frames, sentence):
    rig = rig_of(FLOATS)
    ticket = rig.ticket(0, rig.route({"x": floats(3)}), 3)
    with pytest.raises(WireError, match=sentence):
        rig.generation.place(ticket, frames, rig.now)
    assert rig.batcher.is_idle


# -- placing: strings --------------------------------------------------------------------------------


def heap_bytes(rig):
    return rig.route({"text": texts(b"")}).regions[0].heap_bytes


def test_strings_of_many_requests_share_a_heap(rig_of):
    rig = rig_of(TEXTS, slots=2, max_rows_bytes=4096)
    sent = [texts(b"a", b"", b"\x00\xff"), texts(), texts(b"x" * 500)]
    for i, each in enumerate(sent):
        rig.place(i, {"text": each})
    rig.run_all()
    assert rig.batches == [4]
    assert [rig.sink.answers[i]["text_out"].tolist() for i in range(3)] == [each.tolist() for each in sent]


LENGTHS = Signature("s", TEXTS.inputs, (TensorSpec("length", "int64", (None,)),))


def length_model():
    return NumpyModel(lambda _, inputs: [np.array([len(text) for text in inputs[0]], np.int64)])


def test_a_full_heap_ends_the_batch(rig_of):
    rig = rig_of(LENGTHS, model=length_model(), slots=3, max_rows_bytes=4096)
    most = heap_bytes(rig)
    rig.place(0, {"text": texts(b"a" * (most - 10))})
    rig.place(1, {"text": texts(b"b" * 10)})  # fits to the byte
    rig.place(2, {"text": texts(b"c")})
    rig.run_all()
    assert rig.batches == [2, 1]
    assert [rig.sink.answers[i]["length"].tolist() for i in range(3)] == [[most - 10], [10], [1]]


def test_strings_that_overflow_the_heap_go_on_in_the_next_slot(rig_of):
    rig = rig_of(LENGTHS, model=length_model(), slots=4, max_rows_bytes=4096)
    size = heap_bytes(rig) // 2 - 1
    sent = texts(*(bytes([65 + i]) * size for i in range(7)))
    rig.place(0, {"text": sent})
    rig.run_all()
    assert rig.batches == [2, 2, 2, 1]
    assert rig.sink.answers[0]["length"].tolist() == [size] * 7
    assert [text for (batch,) in rig.model.seen for text in batch] == sent.tolist()


def test_a_string_longer_than_any_heap_is_too_large(rig_of):
    rig = rig_of(TEXTS, slots=4, max_rows_bytes=4096)
    rig.place("before", {"text": texts(b"b")})
    with pytest.raises(TooLarge, match="row 1 of the request has more string bytes than a slot holds"):
        rig.place(0, {"text": texts(b"a", b"x" * (heap_bytes(rig) + 1))})
    rig.run_all()
    assert list(rig.sink.answers) == ["before"]


def test_strings_that_find_no_slot_are_overloaded_and_answered_by_nobody_else(rig_of):
    rig = rig_of(TEXTS, slots=2, max_rows_bytes=4096)
    with pytest.raises(Overloaded):
        rig.place(0, {"text": texts(*[b"x" * (heap_bytes(rig) - 1)] * 3)})
    assert rig.batcher.is_idle
    rig.run_all()
    assert rig.sink.answers == {}


@pytest.mark.parametrize(
    "payload",
    [b"", b"\0" * 15, b"\1" + b"\0" * 15, b"\0" * 8 + b"\5" + b"\0" * 7, b"\0" * 16 + b"heap"],
    ids=["nothing", "short", "not from 0", "beyond the heap", "heap left over"],
)
def test_string_payloads_that_are_none_are_refused(rig_of, payload):
    rig = rig_of(TEXTS, max_rows_bytes=4096, slots=1)
    ticket = rig.ticket(0, rig.route({"text": texts(b"a")}), 1)
    with pytest.raises(WireError, match="string tensor"):
        rig.generation.place(ticket, [payload], rig.now)
    assert rig.batcher.is_idle


# -- rows that stay where their client has them -------------------------------------------------------

ROW_BYTES = 64
VECTORS = identity(("x", "float32", (None, 16)))


def vectors(rows, start=0):
    return np.arange(16 * rows, dtype=np.float32).reshape(rows, 16) + np.float32(start)


def lay(rig, memory, id_, row, rows):
    """A request whose rows lie in memory of its client from such a row on."""
    x = vectors(rows, 1000 * id_)
    rig.place(id_, {"x": x}, loans=[memory.lay(ROW_BYTES * row, x)])
    return x


def got_back(rig, sent):
    assert sorted(rig.sink.answers) == sorted(sent)
    for id_, x in sent.items():
        np.testing.assert_array_equal(rig.sink.answers[id_]["x_out"], x)


def test_rows_that_follow_each_other_are_run_on_where_they_lie(rig_of):
    rig, memory = rig_of(VECTORS, max_batch_size=8), ClientMemory(4096)
    sent = {}
    for id_, (row, rows) in enumerate([(5, 1), (6, 3), (9, 4), (13, 2)]):  # 8 and 2
        sent[id_] = lay(rig, memory, id_, row, rows)
    for slot in rig.generation.arena.slots:
        slot[8192:] = 0xEE
    rig.run_all()
    assert (rig.batches, rig.lent) == ([8, 2], [True, True])
    assert all(slot[8192 + 64] == 0xEE for slot in rig.generation.arena.slots), "rows were copied"
    got_back(rig, sent)


@pytest.mark.parametrize(
    "what", ["a gap", "another region", "rows before", "copied rows", "a bundle", "too many"]
)
def test_a_batch_that_does_not_lie_in_one_piece_is_in_its_slot(rig_of, what):
    rig, memory, other = rig_of(VECTORS, max_batch_size=4), ClientMemory(4096), ClientMemory(4096)
    sent = {0: lay(rig, memory, 0, 2, 2)}
    match what:
        case "a gap":
            sent[1] = lay(rig, memory, 1, 5, 1)
        case "another region":
            sent[1] = lay(rig, other, 1, 4, 1)
        case "rows before":
            sent[1] = lay(rig, memory, 1, 1, 1)
        case "copied rows":
            sent[1] = vectors(1, 1000)
            rig.place(1, {"x": sent[1]})
        case "a bundle":
            sent |= {1: vectors(1, 1000), 2: vectors(1, 2000)}
            parts = rig.parts(rig.route({"x": sent[1]}), [(1, 0, 1), (2, 0, 1)])
            assert not rig.generation.place_all(parts, [sent[1].tobytes() + sent[2].tobytes()], rig.now)
        case "too many":
            sent[1] = lay(rig, memory, 1, 4, 3)
    if what != "too many":
        sent[3] = lay(rig, memory, 3, 4, 1)  # would follow, if the batch still lay there
    rig.run_all()
    assert not rig.lent[0]
    got_back(rig, sent)


def test_a_batch_that_needs_other_rows_beside_its_own_is_in_its_slot(rig_of):
    rig, memory = rig_of(VECTORS, max_batch_size=4, allowed_batch_sizes=(2, 4)), ClientMemory(4096)
    sent = {0: lay(rig, memory, 0, 0, 2), 1: lay(rig, memory, 1, 2, 1)}
    rig.run_all()
    sent |= {2: lay(rig, memory, 2, 0, 2), 3: lay(rig, memory, 3, 2, 2), 4: lay(rig, memory, 4, 4, 2)}
    rig.run_all()
    assert (rig.batches, rig.lent) == ([3, 4, 2], [False, True, True])
    got_back(rig, sent)


def test_rows_that_nobody_waits_for_are_left_out_where_they_lie_too(rig_of):
    rig, memory = rig_of(VECTORS, max_batch_size=8), ClientMemory(4096)
    sent = {id_: lay(rig, memory, id_, id_, 1) for id_ in range(4)}
    (slot,) = rig.start()
    rows = {ticket.id: rig.generation.read_rows(slot, ticket) for ticket in slot.tickets}
    assert {id_: [x.tobytes()] for id_, x in sent.items()} == rows
    live = [ticket for ticket in slot.tickets if ticket.id in (1, 3)]
    rig.generation.refill(slot, [(ticket, rows[ticket.id]) for ticket in live], [])
    rig.finish(slot)
    assert (rig.batches, rig.lent) == ([2], [False])
    got_back(rig, {1: sent[1], 3: sent[3]})


def test_indices_and_what_no_framework_could_alias_are_copied(rig_of):
    memory = ClientMemory(4096)
    rig = rig_of(identity(("x", "int32", (None, 16))))
    x = np.arange(16, dtype=np.int32).reshape(1, 16)
    rig.place(0, {"x": x}, loans=[memory.lay(0, x)])
    rig.run_all()
    assert rig.lent == [False]
    rig = rig_of(VECTORS)
    rig.place(0, {"x": vectors(1)}, loans=[memory.lay(32, vectors(1))])
    rig.run_all()
    assert rig.lent == [False]
    got_back(rig, {0: vectors(1)})


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["behind", "elsewhere", "other", "copied", "run"])),
        min_size=1,
        max_size=20,
    ),
    capacity=st.integers(1, 5),
    allowed=st.booleans(),
)
def test_wherever_rows_lie_each_request_gets_its_own_back(requests, capacity, allowed):
    sizes = (capacity,) if allowed else ()
    served = generation(VECTORS, max_batch_size=capacity, slots=6, allowed_batch_sizes=sizes)
    memories = [ClientMemory(1 << 16) for _ in range(2)]
    ends = [0, 0]
    sent = {}
    with Rig(served) as rig:
        for id_, (rows, how) in enumerate(requests):
            x = vectors(rows, 1000 * id_)
            which = how == "other"
            place = []
            if how in ("behind", "elsewhere", "other"):
                row = ends[which] + (how == "elsewhere")
                ends[which] = row + rows
                place = [memories[which].lay(ROW_BYTES * row, x)]
            if how == "run":
                rig.run_all()
                continue
            try:
                rig.place(id_, {"x": x}, loans=place)
            except (Overloaded, TooLarge):
                continue
            sent[id_] = x
        rig.run_all()
        got_back(rig, sent)


# -- whatever is placed comes back -------------------------------------------------------------------


def arrays_of(dtype, shape):
    if dtype == "string":
        items = st.lists(st.binary(max_size=30), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))

        def pack(strings):
            array = np.empty(len(strings), object)
            array[:] = strings
            return array.reshape(shape)

        return items.map(pack)
    numpy = numpy_dtype(dtype)
    size = int(np.prod(shape)) * numpy.itemsize
    if dtype == "bool":
        return st.binary(min_size=size, max_size=size).map(
            lambda b: (np.frombuffer(b, np.uint8) & 1).astype(bool).reshape(shape)
        )
    return st.binary(min_size=size, max_size=size).map(lambda b: np.frombuffer(b, numpy).reshape(shape))


shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    tensors=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=4),
    capacity=st.integers(1, 6),
    allowed=st.booleans(),
)
def test_what_is_placed_comes_back_bit_for_bit(data, tensors, capacity, allowed):
    specs = [(f"t{i}", dtype, (None, *shape)) for i, (dtype, shape) in enumerate(tensors)]
    sizes = (capacity,) if allowed else ()
    served = generation(
        identity(*specs), max_batch_size=capacity, slots=4, max_rows_bytes=1 << 14, allowed_batch_sizes=sizes
    )
    sent = {}
    with Rig(served) as rig:
        for id_ in range(data.draw(st.integers(1, 5), "requests")):
            rows = data.draw(st.integers(0, 9), "rows")
            inputs = {name: data.draw(arrays_of(dtype, (rows, *shape[1:]))) for name, dtype, shape in specs}
            names = data.draw(st.permutations(list(inputs)), "order")
            try:
                rig.place(id_, {name: inputs[name] for name in names})
            except (Overloaded, TooLarge):
                pass
            else:
                sent[id_] = inputs
            if data.draw(st.booleans(), "run"):
                rig.run_all()
        rig.run_all()
        assert all(rows <= capacity for rows in rig.batches)
        if allowed:
            assert {shape[0] for _, shapes in rig.model.bound for shape in shapes} <= {0, capacity}
    assert sorted(rig.sink.answers) == sorted(sent)
    for id_, inputs in sent.items():
        for name, array in inputs.items():
            back = rig.sink.answers[id_][f"{name}_out"]
            assert back.shape == array.shape
            assert back.dtype == array.dtype
            if array.dtype == object:
                assert back.tolist() == array.tolist()
            else:
                assert back.tobytes() == array.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    tensors=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=3),
)
def test_the_rows_of_a_batch_can_be_taken_out_and_run_again_in_any_grouping(data, tensors):
    specs = [(f"t{i}", dtype, (None, *shape)) for i, (dtype, shape) in enumerate(tensors)]
    sent = {}
    with Rig(generation(identity(*specs), max_batch_size=12, slots=2, max_rows_bytes=1 << 15)) as rig:
        for id_ in range(data.draw(st.integers(1, 5), "requests")):
            rows = data.draw(st.integers(0, 3), "rows")
            inputs = {name: data.draw(arrays_of(dtype, (rows, *shape[1:]))) for name, dtype, shape in specs}
            names = data.draw(st.permutations(list(inputs)), "order")
            try:
                rig.place(id_, {name: inputs[name] for name in names})
            except (Overloaded, TooLarge):
                continue
            sent[id_] = inputs
        while started := rig.start():
            (slot,) = started
            tickets = rig.batcher.reap(slot)
            rows_of = {id(ticket): rig.generation.read_rows(slot, ticket) for ticket in tickets}
            rig.generation.arena.slots[slot.index][2 * 4096 :] = 0xEE  # what a dying worker may leave
            left = data.draw(st.permutations(tickets), "again")
            while left:
                count = data.draw(st.integers(1, len(left)), "in this run")
                ran, left = left[:count], left[count:]
                rig.generation.refill(slot, [(ticket, rows_of[id(ticket)]) for ticket in ran], left)
                rig.batcher.dispatch_to(slot, 9, rig.now)
                rig.answer(slot)
                rig.batcher.hold(slot)
            rig.batcher.release(slot)
        assert rig.batcher.is_idle
    assert sorted(rig.sink.answers) == sorted(sent)
    for id_, inputs in sent.items():
        for name, array in inputs.items():
            back = rig.sink.answers[id_][f"{name}_out"]
            assert back.dtype == array.dtype
            assert (
                back.tolist() == array.tolist()
                if array.dtype == object
                else back.tobytes() == array.tobytes()
            )


# -- what a worker wrote -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (b"\xc1", "run record of model 'm' is not valid"),
        (encode_outputs([]), "points outside its slot"),
        (encode_outputs([OutputPlace("float32", (1, 3), 1 << 40, 12)]), "points outside its slot"),
    ],
)
def test_a_record_that_describes_no_outputs_is_refused(rig_of, record, sentence):
    rig = rig_of(FLOATS)
    with pytest.raises(InternalError, match=sentence):
        rig.generation.reply_for(rig.route({"x": floats(1)}), record)


def test_bfloat16_is_met_on_the_way(rig_of):
    rig = rig_of(identity(("x", "bfloat16", (None, 2))))
    sent = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    rig.place(0, {"x": sent})
    rig.run_all()
    assert rig.sink.answers[0]["x_out"].dtype == ml_dtypes.bfloat16
    assert rig.sink.answers[0]["x_out"].tolist() == sent.tolist()


def test_one_part_that_fails_fails_the_request_once_and_its_other_parts_never_start(rig_of):
    def fail_first(_, inputs, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the first batch is bad")
        return inputs

    rig = rig_of(FLOATS, model=NumpyModel(fail_first), max_batch_size=2, slots=4)
    rig.place(0, {"x": floats(5)})
    rig.place(1, {"x": floats(1)})
    rig.run_all()
    error = rig.sink.answers[0]
    assert isinstance(error, PoolError)
    assert error.message == "ValueError: the first batch is bad"
    # The second part's batch held nothing else; the third's was shared.
    assert rig.batches == [2, 2]
    np.testing.assert_array_equal(rig.sink.answers[1]["x_out"], floats(1))


def test_parts_whose_outputs_do_not_join_are_an_error_that_says_so(rig_of):
    lengths = iter([3, 4])
    model = NumpyModel(lambda _, inputs: [np.zeros((len(inputs[0]), next(lengths)), np.float32)])
    signature = Signature("s", FLOATS.inputs, (TensorSpec("y", "float32", (None, None)),))
    rig = rig_of(signature, model=model, max_batch_size=2, slots=4, max_rows_bytes=4096)
    rig.place(0, {"x": floats(4)})
    rig.run_all()
    assert "do not join" in rig.sink.answers[0].message


def test_encoded_tensors_are_what_a_column_takes(rig_of):
    """Big-endian and strided arrays are made wire order by `encode_tensor`, not here."""
    rig = rig_of(FLOATS)
    strided = np.arange(12, dtype=">f4").reshape(2, 6)[:, ::2]
    rig.place(0, {"x": strided})
    rig.run_all()
    np.testing.assert_array_equal(rig.sink.answers[0]["x_out"], strided.astype(np.float32))
    assert wire.encode_tensor(strided, "float32")[:4] == np.float32(0).tobytes()


# -- what killed a worker ----------------------------------------------------------------------------


def test_the_same_bytes_are_barred_in_whatever_order_they_come(rig_of):
    rig = rig_of(identity(("a", "float32", (None, 3)), ("b", "float32", (None, 3))), max_batch_size=8)
    ticket = rig.place(0, {"a": floats(2), "b": floats(2)})
    (slot,) = rig.start()
    rows = rig.generation.read_rows(slot, ticket)
    rig.generation.poison.remember(ticket.route.layout.number, rows, "it burnt", rig.now)
    rig.finish(slot)
    rig.place(1, {"a": floats(2), "b": floats(2) + 1})
    for inputs in ({"a": floats(2), "b": floats(2)}, {"b": floats(2), "a": floats(2)}):
        with pytest.raises(WorkerLost, match="the same request came before, and it burnt; it is refused for"):
            rig.place(2, inputs)
    route = rig.route({"b": floats(2), "a": floats(2)})
    parts = rig.parts(route, [(3, 0, 2), (4, 0, 2)])
    columns = [np.concatenate([floats(2), floats(2)]), np.concatenate([floats(2), floats(2) + 5])]
    refused = rig.generation.place_all(parts, [column.tobytes() for column in columns], rig.now)
    assert [(type(error), ids) for error, ids in refused] == [(WorkerLost, [3])]
    rig.run_all()
    assert sorted(rig.sink.answers) == [0, 1, 4]
