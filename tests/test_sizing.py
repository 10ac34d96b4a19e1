"""How large arenas come out."""

from __future__ import annotations

import msgspec
import pytest

from pool.config import ModelConfig
from pool.front.sizing import plan_arena, row_bytes
from pool.shm.arena import TENSORS_OFFSET, UNKNOWN_ROWS_BYTES, plan_layout
from pool.signature import Signature, TensorSpec
from pool.wire import TensorMeta
from tests.rig import report

MLP = Signature(
    "serving_default", (TensorSpec("x", "float32", (None, 784)),), (TensorSpec("y", "float32", (None, 10)),)
)
WORDS = Signature("words", (TensorSpec("t", "string", (None,)),), (TensorSpec("n", "int64", (None,)),))
CLASSIFIER = Signature(
    "classes", (TensorSpec("x", "float32", (None, 4)),), (TensorSpec("y", "float32", (None, None)),)
)


def plan(*signatures, seen=None, **keys):
    found = msgspec.structs.replace(report(*signatures), output_row_bytes=seen or {})
    return plan_arena(ModelConfig(path="/m", **keys), found)


@pytest.mark.parametrize(
    ("specs", "batched", "size"),
    [
        (MLP.inputs, True, 3136),
        ((TensorSpec("x", "bfloat16", (3, 5)),), False, 30),
        ((TensorSpec("x", "complex128", (None,)), TensorSpec("y", "bool", (None, 0))), True, 16),
        ((TensorSpec("x", "int8", (None, None)),), True, None),
        ((TensorSpec("x", "int8", None),), True, None),
        ((TensorSpec("x", "int8", (None,)),), False, None),
        (WORDS.inputs, True, None),
    ],
)
def test_row_bytes(specs, batched, size):
    assert row_bytes(specs, batched) == size


def test_a_slot_holds_a_full_batch_of_the_largest_signature():
    slots, slot_bytes = plan(MLP, max_batch_size=64)
    assert slots == 32
    inputs = (TensorMeta("x", "float32", (784,)),)
    assert plan_layout(1, MLP, inputs, 40, slot_bytes, 1000).capacity >= 64
    assert slot_bytes < TENSORS_OFFSET + 64 * 3176 + 2 * 4096


@pytest.mark.parametrize(("workers", "slots"), [(1, 32), (15, 32), (16, 34), (20, 42)])
def test_each_worker_has_one_batch_running_and_one_waiting(workers, slots):
    assert plan(MLP, workers=workers)[0] == slots


def test_large_rows_get_fewer_slots_but_enough():
    image = Signature("s", (TensorSpec("x", "float32", (None, 1024, 1024)),), MLP.outputs)
    assert plan(image, workers=2)[0] == 6


def test_the_config_has_the_last_word():
    slots, slot_bytes = plan(MLP, slots=3, max_rows_bytes=1 << 20)
    assert (slots, slot_bytes) == (3, TENSORS_OFFSET + (1 << 20))


def test_what_the_signature_leaves_open_gets_a_fixed_budget():
    assert plan(WORDS)[1] == TENSORS_OFFSET + UNKNOWN_ROWS_BYTES


def test_what_the_loader_saw_counts_where_the_signature_says_nothing():
    seen = 1 << 20
    slot_bytes = plan(CLASSIFIER, seen={"classes": seen}, max_batch_size=64)[1]
    inputs = (TensorMeta("x", "float32", (4,)),)
    planned = plan_layout(1, CLASSIFIER, inputs, None, slot_bytes, 64, seen_row_bytes=seen)
    assert planned.capacity == 64


def test_outputs_may_be_as_large_as_the_inputs_whatever_was_seen():
    """A probe sees small shapes; requests of larger ones give larger outputs."""
    same = Signature(
        "s", (TensorSpec("x", "float32", (None, None)),), (TensorSpec("y", "float32", (None, None)),)
    )
    planned = plan_layout(
        1, same, (TensorMeta("x", "float32", (1000,)),), None, 1 << 16, 64, seen_row_bytes=16
    )
    assert planned.capacity == 7
    assert planned.descriptor.outputs_offset + 7 * 4000 <= 1 << 16
