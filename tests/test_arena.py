"""The arena's layouts, by property, and its memory, as two processes see it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import ConfigError, InternalError, TooLarge
from pool.shm.arena import (
    ALIGN_BYTES,
    PAGE_BYTES,
    RUN_RECORD_OFFSET,
    TENSORS_OFFSET,
    Arena,
    OutputPlace,
    align,
    decode_outputs,
    encode_outputs,
    plan_layout,
    slot_bytes_for,
)
from pool.signature import DTYPES, ITEM_BYTES, Signature, TensorSpec, row_items
from pool.wire import TensorMeta

FLOATS = Signature(
    "serving_default", (TensorSpec("x", "float32", (None, 4)),), (TensorSpec("y", "float32", (None, 2)),)
)
ROW = (TensorMeta("x", "float32", (4,)),)


def layout(number=1, signature=FLOATS, inputs=ROW, out=8, slot_bytes=1 << 20, most=8, allowed=()):
    return plan_layout(number, signature, inputs, out, slot_bytes, most, allowed)


# -- layouts ---------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(
    tensors=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=6),
    out=st.none() | st.integers(0, 5000),
    slot_bytes=st.integers(3, 64).map(lambda pages: pages * PAGE_BYTES),
    most=st.integers(1, 300),
    batched=st.booleans(),
    allowed=st.sets(st.integers(1, 300), max_size=4).map(sorted).map(tuple),
)
def test_a_layout_keeps_every_tensor_apart_and_within_the_slot(
    tensors, out, slot_bytes, most, batched, allowed
):
    inputs = [TensorMeta(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
    specs = tuple(TensorSpec(t.name, t.dtype, None) for t in inputs)
    signature = Signature("s", specs, (TensorSpec("y", "float32", None),), batched)
    try:
        planned = plan_layout(1, signature, inputs, out, slot_bytes, most, allowed)
    except TooLarge:
        return
    capacity, descriptor = planned.capacity, planned.descriptor
    assert 1 <= capacity <= (most if batched else 1)
    assert not (batched and allowed) or capacity in allowed
    ends = [TENSORS_OFFSET]
    for tensor, region in zip(inputs, descriptor.inputs, strict=True):
        assert (region.dtype, region.shape) == (tensor.dtype, tensor.shape)
        assert region.offset % ALIGN_BYTES == 0
        assert region.offset >= ends[-1]
        if tensor.dtype == "string":
            assert region.row_bytes == 8 * row_items(tensor.shape)
            ends.append(region.offset + capacity * region.row_bytes + 8)
            assert region.heap_offset % ALIGN_BYTES == 0
            assert region.heap_offset >= ends[-1]
            ends.append(region.heap_offset + region.heap_bytes)
        else:
            assert region.row_bytes == ITEM_BYTES[tensor.dtype] * row_items(tensor.shape)
            ends.append(region.offset + capacity * region.row_bytes)
    assert descriptor.outputs_offset >= ends[-1]
    assert descriptor.outputs_offset % ALIGN_BYTES == 0
    assert descriptor.outputs_offset + capacity * (out or 0) <= slot_bytes


def test_capacity_is_what_the_bytes_allow():
    # 24 bytes a row, 100 rows of them, and 5 tensors' worth of alignment.
    slot_bytes = TENSORS_OFFSET + 100 * 24 + 5 * ALIGN_BYTES
    assert layout(slot_bytes=slot_bytes, most=1000).capacity == 100
    assert layout(slot_bytes=slot_bytes, most=64).capacity == 64
    assert layout(slot_bytes=slot_bytes, most=1000, allowed=(32, 64, 1000)).capacity == 64


def test_outputs_of_unknown_size_get_as_much_room_as_the_inputs_take():
    slot_bytes = TENSORS_OFFSET + 100 * 32 + 5 * ALIGN_BYTES
    assert layout(slot_bytes=slot_bytes, most=1000, out=None).capacity == 100


def test_a_row_that_does_not_fit_is_refused_with_the_key_to_raise():
    with pytest.raises(TooLarge, match=r"one row needs 20000 bytes .*a slot has 3776: raise max_rows_bytes"):
        layout(out=19984, slot_bytes=3 * PAGE_BYTES)


def test_a_padded_batch_that_does_not_fit_is_refused():
    with pytest.raises(TooLarge, match="raise max_rows_bytes"):
        layout(slot_bytes=3 * PAGE_BYTES, most=1000, allowed=(500, 1000))


def test_shapes_too_long_to_write_down_are_refused():
    inputs = [TensorMeta(f"t{i}", "int8", (1,) * 60) for i in range(100)]
    signature = Signature("s", tuple(TensorSpec(t.name, "int8", None) for t in inputs), ())
    with pytest.raises(TooLarge, match=r"shapes of the inputs take .* wanted at most 4092"):
        layout(signature=signature, inputs=inputs)
    places = [OutputPlace("int8", (1,) * 60, 0, 1)] * 100
    with pytest.raises(TooLarge, match=r"shapes of the outputs take .* wanted at most 4072"):
        encode_outputs(places)


@pytest.mark.parametrize(("got", "want"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_align(got, want):
    assert align(got) == want


def test_a_slot_is_whole_pages():
    assert slot_bytes_for(1) == 3 * PAGE_BYTES
    assert slot_bytes_for(PAGE_BYTES) == 3 * PAGE_BYTES
    assert slot_bytes_for(PAGE_BYTES + 1) == 4 * PAGE_BYTES


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture
def arena():
    made = Arena.create(3, 4 * PAGE_BYTES)
    yield made
    made.close()


def test_what_the_front_describes_the_worker_reads(arena):
    first, second = layout(1, slot_bytes=arena.slot_bytes), layout(2, most=3, slot_bytes=arena.slot_bytes)
    attached = Arena.attach(os.dup(arena.fd), 3, arena.slot_bytes)
    for planned in (first, second, second, first):
        arena.describe(1, planned)
        assert attached.read_descriptor(1) == planned.descriptor
    arena.describe(2, second)
    assert attached.read_descriptor(2) == second.descriptor
    assert attached.read_descriptor(1) == first.descriptor
    attached.close()


def test_what_the_worker_records_the_front_reads(arena):
    places = [OutputPlace("float32", (2, 3), 8192, 24), OutputPlace("string", (2,), 8256, 40)]
    arena.write_run_record(2, 123, 1 << 60, 4, encode_outputs(places))
    *rest, encoded = arena.read_run_record(2)
    assert (rest, decode_outputs(encoded)) == ([123, 1 << 60, 4], places)


def test_a_record_that_cannot_be_one_is_an_error_not_a_crash(arena):
    arena.slots[0][RUN_RECORD_OFFSET : RUN_RECORD_OFFSET + 64] = 0xFF
    with pytest.raises(InternalError, match="run record of 4294967295 bytes"):
        arena.read_run_record(0)


def test_slots_do_not_overlap(arena):
    for i, slot in enumerate(arena.slots):
        slot[:] = i + 1
    assert [set(slot.tolist()) for slot in arena.slots] == [{1}, {2}, {3}]
    assert arena.size_bytes == 3 * arena.slot_bytes == os.fstat(arena.fd).st_size


def test_slots_are_aligned_for_every_framework(arena):
    assert all(slot.ctypes.data % PAGE_BYTES == 0 for slot in arena.slots)


def test_another_process_maps_the_same_bytes(arena):
    arena.slots[1][:5] = np.frombuffer(b"front", np.uint8)
    program = (
        "import sys; from pool.shm.arena import Arena\n"
        "slot = Arena.attach(int(sys.argv[1]), 3, int(sys.argv[2])).slots[1]\n"
        "assert bytes(slot[:5]) == b'front'\n"
        "slot[5:11] = bytearray(b'worker')"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(arena.fd), str(arena.slot_bytes)], pass_fds=[arena.fd], check=True
    )
    assert bytes(arena.slots[1][:11]) == b"frontworker"


def mapped():
    with open("/proc/self/maps") as f:
        return f.read().count("/memfd:pool-arena")


def test_the_map_goes_with_the_last_view_of_it():
    before = mapped()
    arena = Arena.create(2, 3 * PAGE_BYTES)
    kept = arena.slots[1][100:200]
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(arena.fd)
    kept[:] = 7  # ZeroMQ may still be sending from a view like this
    assert mapped() == before + 1
    del kept
    assert mapped() == before


def test_an_arena_the_machine_cannot_hold_is_refused_and_nothing_stays():
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"arena of 4 slots x .* bytes .* are available; lower slots"):
        Arena.create(4, 1 << 60)
    assert set(os.listdir("/proc/self/fd")) == before
