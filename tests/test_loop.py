"""The Runner: slots in, slots out, on a model of numpy functions. Real workers are in `test_zygote`."""

from __future__ import annotations

import numpy as np
import pytest

from pool.config import Placement
from pool.errors import ModelError
from pool.sample import Recipe
from pool.shm.arena import decode_outputs
from pool.shm.control import WarmUp, WorkerOrder
from pool.shm.doorbell import Message, Ring
from pool.signature import Signature, TensorSpec
from pool.worker.loop import _warm_up
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
    monkeypatch.setattr("pool.worker.loop._BOUND_MAX", 4)
    rig = rig_of(identity(("x", "int8", (None, None))), slots=1, max_rows_bytes=1 << 16)
    for n in range(20):
        rig.place(n, {"x": np.full((1, n), n, np.int8)})
        run_one(rig)
        assert rig.sink.answers[n]["x_out"].tolist() == [[n] * n]
    assert len(rig.runner._bound) <= 4
    assert len(rig.runner._descriptors) <= 4


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
    started_ns, ended_ns, encoded = rig.generation.arena.read_run_record(slot.index)
    assert 0 < started_ns <= ended_ns
    places = decode_outputs(encoded)
    assert [(place.dtype, place.shape) for place in places] == [("int8", (3,)), ("float64", (3,))]
    assert all(place.offset % 64 == 0 for place in places)
    layout = rig.route({"a": np.zeros(1, np.int8), "b": np.zeros(1)}).layout
    assert places[0].offset >= layout.descriptor.outputs_offset


def test_signatures_that_run_the_same_function_are_warmed_up_once():
    class Twins(NumpyModel):
        def runs(self, signature):
            return "the same" if signature in ("serving_default", "twin") else signature

    model = Twins()
    signatures = [FLOATS, *(identity(("x", "float32", (None, 3)), name=name) for name in ("twin", "other"))]
    order = WorkerOrder(
        model="m", index=0, backend="", path="", weights=(), placement=Placement(), slots=1, slot_bytes=4096,
        allowed_batch_sizes=(), warm_up=tuple(WarmUp(one, Recipe(), (1, 4)) for one in signatures),
    )  # fmt: skip
    _warm_up(order, model)
    sizes = [[(1, 3)], [(4, 3)]]
    want = [(name, size) for name in ("serving_default", "other") for size in sizes]
    assert model.bound == want
    assert len(model.seen) == len(want)
