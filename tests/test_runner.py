"""The Runner: slots in, slots out, on a model of numpy functions. Real workers are in `test_zygote`."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pool.errors import ModelError
from pool.shm.arena import decode_outputs
from pool.shm.doorbell import Message, Ring
from pool.shm.loans import Place
from pool.signature import Signature, TensorSpec
from pool.worker.split import Split
from tests.rig import NumpyModel, floats, identity

FLOATS = identity(("x", "float32", (None, 3)))
WHOLE = Signature(
    "whole",
    (TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "int64", (2,))),
    (TensorSpec("a_out", "float32", (2, 3)), TensorSpec("b_out", "int64", (2,))),
    batched=False,
    unbatched_reason="the first dimension is fixed",
)


def run_one(rig):
    (slot,) = rig.start()
    return rig.finish(slot)


def test_inputs_are_the_slots_own_memory_and_are_bound_once(rig_of):
    rig = rig_of(FLOATS, slots=1, max_batch_size=4)
    for i in range(5):
        rig.place(i, {"x": floats(2, 10 * i)})
        assert run_one(rig).kind == Ring.DONE
        np.testing.assert_array_equal(rig.sink.answers[i]["x_out"], floats(2, 10 * i))
    assert rig.model.bound == [("serving_default", [(2, 3)])]


def test_what_is_bound_is_forgotten_before_it_fills_the_memory(rig_of, monkeypatch):
    monkeypatch.setattr("pool.worker.runner._BOUND_MAX", 4)
    rig = rig_of(identity(("x", "int8", (None, None))), slots=1, max_rows_bytes=1 << 16)
    for n in range(20):
        rig.place(n, {"x": np.full((1, n), n, np.int8)})
        run_one(rig)
        assert rig.sink.answers[n]["x_out"].tolist() == [[n] * n]
    assert len(rig.runner._bound) <= 4
    assert len(rig.runner._plans) <= 4


@pytest.mark.parametrize(("rows", "padded"), [(1, 2), (2, 2), (3, 8), (8, 8)])
def test_a_batch_is_padded_with_its_first_row_up_to_an_allowed_size(rig_of, rows, padded):
    rig = rig_of(FLOATS, slots=1, max_batch_size=8, allowed_batch_sizes=(2, 8))
    for turn in range(2):  # the second time, the slot holds another batch's rows
        sent = floats(rows, 100 * turn)
        rig.place(turn, {"x": sent})
        run_one(rig)
        ((seen,),) = rig.model.seen[turn:]
        np.testing.assert_array_equal(seen[:rows], sent)
        np.testing.assert_array_equal(seen[rows:], np.repeat(sent[:1], padded - rows, axis=0))
        np.testing.assert_array_equal(rig.sink.answers[turn]["x_out"], sent)


def test_strings_are_padded_too(rig_of):
    rig = rig_of(identity(("t", "string", (None,))), slots=1, max_batch_size=4, allowed_batch_sizes=(4,))
    rig.place(0, {"t": np.array([b"first", b"second"], object)})
    run_one(rig)
    assert rig.model.seen[0][0].tolist() == [b"first", b"second", b"first", b"first"]
    assert rig.sink.answers[0]["t_out"].tolist() == [b"first", b"second"]


def test_a_batch_of_no_rows_is_not_padded(rig_of):
    rig = rig_of(FLOATS, slots=1, max_batch_size=4, allowed_batch_sizes=(4,))
    rig.place(0, {"x": floats(0)})
    run_one(rig)
    assert rig.sink.answers[0]["x_out"].shape == (0, 3)


def test_a_signature_that_is_not_batched_is_not_padded(rig_of):
    rig = rig_of(WHOLE, FLOATS, slots=1, max_batch_size=8, allowed_batch_sizes=(4, 8))
    b = np.array([7, 8])
    rig.place(0, {"a": floats(2), "b": b}, name="whole")
    assert run_one(rig).text == ""
    assert rig.model.bound == [("whole", [(2, 3), (2,)])]
    np.testing.assert_array_equal(rig.sink.answers[0]["a_out"], floats(2))
    np.testing.assert_array_equal(rig.sink.answers[0]["b_out"], b)


def raising(error):
    def function(_signature, _inputs):
        raise type(error)(*error.args)  # a kept traceback would keep the arena

    return NumpyModel(function)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModelError("the model's own words"), "the model's own words"),
        (ValueError("what numpy says"), "ValueError: what numpy says"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_a_model_that_raises_is_a_message_and_the_next_batch_runs(rig_of, error, text):
    rig = rig_of(FLOATS, model=raising(error), slots=1)
    rig.place(0, {"x": floats(1)})
    message = run_one(rig)
    assert (message.kind, message.text) == (Ring.MODEL_ERROR, text)
    rig.model._function = lambda _, inputs: inputs
    rig.place(1, {"x": floats(1)})
    assert run_one(rig).kind == Ring.DONE


def test_the_answer_names_the_batch_it_answers(rig_of):
    rig = rig_of(FLOATS, slots=3)
    rig.place(0, {"x": floats(2)})
    (slot,) = rig.start()
    message = rig.finish(slot)
    assert message == Message(Ring.DONE, slot.index, 2, 1, 1, "")


def test_outputs_that_do_not_follow_the_rows_are_refused(rig_of):
    rig = rig_of(FLOATS, model=NumpyModel(lambda _, i: [i[0][:1]]))
    rig.place(0, {"x": floats(3)})
    message = run_one(rig)
    assert message.kind == Ring.MODEL_ERROR
    assert message.text == "output 'x_out' has shape [1, 3] for a batch of 3 rows; wanted 3 rows"


def test_an_output_without_a_wire_form_is_refused(rig_of):
    rig = rig_of(FLOATS, model=NumpyModel(lambda _, i: [np.zeros(len(i[0]), "M8[s]")]))
    rig.place(0, {"x": floats(3)})
    assert "output 'x_out' has dtype datetime64[s]" in run_one(rig).text


def test_outputs_larger_than_the_slot_are_refused_with_the_key_to_raise(rig_of):
    signature = Signature("s", FLOATS.inputs, (TensorSpec("y", "float32", (None, None)),))
    rig = rig_of(signature, model=NumpyModel(lambda _, i: [np.zeros((len(i[0]), 5000), np.float32)]),
                 max_rows_bytes=4096)  # fmt: skip
    rig.place(0, {"x": floats(2)})
    message = run_one(rig)
    assert message.kind == Ring.TOO_LARGE
    assert "outputs of 2 rows take 40000 bytes; the slot has" in message.text
    assert "raise max_rows_bytes" in message.text
    rig.model._function = lambda _, inputs: [inputs[0]]
    rig.place(1, {"x": floats(2)})
    assert run_one(rig).kind == Ring.DONE


def test_outputs_may_change_their_shape_from_run_to_run(rig_of):
    lengths = iter([2, 5, 5, 1])
    signature = Signature("s", FLOATS.inputs, (TensorSpec("y", "float32", (None, None)),))
    rig = rig_of(signature, model=NumpyModel(lambda _, i: [np.ones((len(i[0]), next(lengths)), np.float32)]),
                 slots=1, max_rows_bytes=4096)  # fmt: skip
    for i, length in enumerate([2, 5, 5, 1]):
        rig.place(i, {"x": floats(2)})
        run_one(rig)
        assert rig.sink.answers[i]["y"].tolist() == [[1.0] * length] * 2


def test_string_outputs_of_any_kind_of_item_become_bytes(rig_of):
    signature = Signature("s", FLOATS.inputs, (TensorSpec("y", "string", (None,)),))
    rig = rig_of(signature, model=NumpyModel(lambda *_: [np.array([b"\xff", "é", 3], object)]))
    rig.place(0, {"x": floats(3)})
    run_one(rig)
    assert rig.sink.answers[0]["y"].tolist() == [b"\xff", "é".encode(), b"3"]


def test_outputs_lie_aligned_behind_the_inputs(rig_of):
    rig = rig_of(identity(("a", "int8", (None,)), ("b", "float64", (None,))), max_batch_size=3)
    rig.place(0, {"a": np.array([1, 2, 3], np.int8), "b": np.array([1.0, 2, 3])})
    (slot,) = rig.start()
    rig.finish(slot)
    started_ns, ended_ns, piece_rows, encoded = rig.generation.arena.read_run_record(slot.index)
    assert 0 < started_ns <= ended_ns
    assert piece_rows == 0
    places = decode_outputs(encoded)
    assert [(place.dtype, place.shape) for place in places] == [("int8", (3,)), ("float64", (3,))]
    assert all(place.offset % 64 == 0 for place in places)
    layout = rig.route({"a": np.zeros(1, np.int8), "b": np.zeros(1)}).layout
    assert places[0].offset >= layout.descriptor.outputs_offset


# -- pieces --------------------------------------------------------------------------------------------

WIDE = identity(("x", "float32", (None, 16)), ("n", "int64", (None, 8)))  # 64 bytes a row


@pytest.fixture
def in_twos(monkeypatch):
    """Batches are run two rows at a time, wherever that may be."""
    monkeypatch.setattr(Split, "choose", lambda split, rows: 2 if rows > 2 and split._may_be(2) else 0)


def split_rig(rig_of, *signatures, split_s=1.0, **keywords):
    rig = rig_of(*signatures, slots=1, **keywords)
    rig.runner._split_s = split_s
    return rig


def wide(rows, start=0):
    x = np.arange(16 * rows, dtype=np.float32).reshape(rows, 16) + np.float32(start)
    return {"x": x, "n": np.arange(8 * rows).reshape(rows, 8) + start}


def shapes_seen(rig):
    return [call[0].shape[0] for call in rig.model.seen]


@pytest.mark.usefixtures("in_twos")
def test_pieces_answer_as_the_whole_does(rig_of):
    rig = split_rig(rig_of, WIDE)
    for turn, rows in enumerate((5, 5, 4, 2)):
        inputs = wide(rows, 100 * turn)
        rig.place(turn, inputs)
        assert run_one(rig).kind == Ring.DONE
        for name, sent in inputs.items():
            np.testing.assert_array_equal(rig.sink.answers[turn][f"{name}_out"], sent)
    assert shapes_seen(rig) == [2, 2, 1, 2, 2, 1, 2, 2, 2]
    assert len(rig.model.bound) == 6  # each once: (2, 2, 1), (2, 2), and 2 as the whole


@pytest.mark.usefixtures("in_twos")
def test_a_batch_in_a_clients_region_is_run_in_pieces_too(rig_of, monkeypatch):
    region = np.zeros(1 << 16, np.uint8)
    start = -region.ctypes.data % 64
    sent = wide(4)
    region[start : start + 256].view(np.float32)[:] = sent["x"].ravel()
    region[start + 1024 : start + 1280].view(np.int64)[:] = sent["n"].ravel()
    rig = split_rig(rig_of, WIDE)
    monkeypatch.setattr(
        "pool.worker.runner.read_places", lambda *_: (Place(7, start), Place(7, start + 1024))
    )
    monkeypatch.setattr(rig.runner._borrowed, "memory", lambda _: region)
    rig.place(0, wide(4, 99))
    (slot,) = rig.start()
    rig.generation.arena.describe(slot.index, slot.tickets[0].route.layout)
    message = Message(Ring.RUN_LENT, slot.index, slot.rows, slot.generation, slot.layout)
    assert rig.runner.run(message).kind == Ring.DONE
    np.testing.assert_array_equal(np.concatenate([call[0] for call in rig.model.seen]), sent["x"])
    assert shapes_seen(rig) == [2, 2]
    monkeypatch.setattr(rig.runner._borrowed, "give_back", lambda _: None)
    rig.runner.give_back(7)
    assert not rig.runner._bound
    rig.batcher.finish(slot, rig.now)
    rig.batcher.release(slot)


@pytest.mark.parametrize(
    "longest", [lambda x: int(x[:, 0].max()) // 16 + 1, lambda x: len(x)], ids=["by values", "by rows"]
)
def test_pieces_whose_outputs_do_not_fit_together_are_run_as_a_whole_from_then_on(
    rig_of, longest, monkeypatch
):
    """As of a model that pads its outputs to the longest of the batch."""
    signature = Signature("s", WIDE.inputs[:1], (TensorSpec("y", "float32", (None, None)),))
    model = NumpyModel(lambda _, inputs: [np.ones((len(inputs[0]), longest(inputs[0])), np.float32)])
    rig = split_rig(rig_of, signature, model=model, max_rows_bytes=1 << 14)
    monkeypatch.setattr(Split, "choose", lambda split, _: 2 if split._rest else 0)
    for turn in range(2):
        x = wide(3)["x"]
        rig.place(turn, {"x": x})
        assert run_one(rig).kind == Ring.DONE
        assert rig.sink.answers[turn]["y"].shape == (3, longest(x))
    assert shapes_seen(rig) == [2, 1, 3, 3]


@pytest.mark.usefixtures("in_twos")
def test_rows_that_would_not_be_aligned_are_never_cut(rig_of):
    rig = split_rig(rig_of, FLOATS)  # 12 bytes a row
    rig.place(0, {"x": floats(8)})
    run_one(rig)
    assert shapes_seen(rig) == [8]


@pytest.mark.parametrize(
    ("allowed", "rows", "seen"),
    [((2, 4, 8), 3, [2, 2]), ((2, 8), 7, [2] * 4), ((4, 8), 7, [8]), ((2, 5), 4, [5]), ((8,), 3, [8])],
)
@pytest.mark.usefixtures("in_twos")
def test_pieces_have_allowed_sizes(rig_of, allowed, rows, seen):
    rig = split_rig(rig_of, WIDE, allowed_batch_sizes=allowed, max_batch_size=allowed[-1])
    sent = wide(rows)
    rig.place(0, sent)
    run_one(rig)
    assert shapes_seen(rig) == seen
    np.testing.assert_array_equal(rig.sink.answers[0]["x_out"], sent["x"])


@pytest.mark.usefixtures("in_twos")
def test_strings_whole_tensors_and_models_that_are_not_to_be_split_are_not(rig_of):
    rig = split_rig(rig_of, identity(("t", "string", (None,))))
    rig.place(0, {"t": np.array([b"a"] * 4, object)})
    run_one(rig)
    rig.place(1, {"t": np.array([b"b"] * 4, object)})
    run_one(rig)
    assert shapes_seen(rig) == [4, 4]
    rig = split_rig(rig_of, WHOLE)
    rig.place(0, {"a": floats(2), "b": np.array([7, 8])}, name="whole")
    run_one(rig)
    assert len(rig.model.seen) == 1
    rig = split_rig(rig_of, WIDE, split_s=0.0)
    rig.place(0, wide(4))
    run_one(rig)
    assert shapes_seen(rig) == [4]


@pytest.mark.usefixtures("in_twos")
def test_a_piece_that_raises_is_an_error_of_its_batch(rig_of):
    def function(_, inputs):
        if inputs[0][0, 0] == 32:
            raise ModelError("the second piece")
        return inputs

    rig = split_rig(rig_of, WIDE, model=NumpyModel(function))
    rig.place(0, wide(5))
    assert (run_one(rig).kind, rig.sink.answers[0].message) == (Ring.MODEL_ERROR, "the second piece")
    assert shapes_seen(rig) == [2, 2]


def test_a_model_that_is_faster_with_few_rows_comes_to_be_run_so(rig_of):
    def function(_, inputs):
        rows = len(inputs[0])
        time.sleep(0.001 * rows if rows <= 2 else 0.002 * rows)
        return inputs

    rig = split_rig(rig_of, WIDE, model=NumpyModel(function), max_batch_size=4)
    for turn in range(60):
        sent = wide(4, turn)
        rig.place(turn, sent)
        run_one(rig)
        np.testing.assert_array_equal(rig.sink.answers[turn]["x_out"], sent["x"])
    assert shapes_seen(rig)[0] == 4
    assert shapes_seen(rig)[-8:] in ([2] * 8, [1] * 8)
    assert rig.generation.arena.read_run_record(0)[2] == shapes_seen(rig)[-1]  # and it is told
