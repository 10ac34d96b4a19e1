from __future__ import annotations

import mmap
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pool.errors import ModelLoadError
from pool.shm import memory, weights
from pool.signature import DTYPES, numpy_dtype

NUMERIC = [name for name in DTYPES if name != "string"]


@pytest.fixture
def fd():
    created = weights.create()
    yield created
    os.close(created)


@st.composite
def named_arrays(draw):
    named = []
    for i in range(draw(st.integers(0, 6))):
        dtype = numpy_dtype(draw(st.sampled_from(NUMERIC)))
        shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
        size = int(np.prod(shape)) * dtype.itemsize
        content = draw(st.binary(min_size=size, max_size=size))
        named.append((f"w{i}", np.frombuffer(content, np.uint8).view(dtype).reshape(shape)))
    return named


@settings(max_examples=60, deadline=None)
@given(named_arrays())
def test_what_is_written_is_what_is_mapped(named):
    fd = weights.create()
    try:
        places = weights.write(fd, named)
        weights.seal(fd)
        mapped = weights.map_private(fd, places)
    finally:
        os.close(fd)  # mappings outlive the descriptor
    assert [place.name for place in places] == [name for name, _ in named]
    for (_, array), got in zip(named, mapped, strict=True):
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()
        assert got.flags.writeable
        assert got.flags.c_contiguous
        if got.size:
            assert got.ctypes.data % weights.ALIGNMENT_BYTES == 0


@settings(max_examples=60, deadline=None)
@given(named_arrays())
def test_places_are_aligned_in_order_and_apart(named):
    places, size = weights.layout(named)
    end = 0
    for place, (_, array) in zip(places, named, strict=True):
        assert place.offset_bytes % weights.ALIGNMENT_BYTES == 0
        assert place.offset_bytes >= end
        end = place.offset_bytes + array.nbytes
    assert end <= size < end + weights.ALIGNMENT_BYTES


def test_arrays_that_are_not_contiguous_are_written_in_order(fd):
    array = np.arange(24, dtype=np.int32).reshape(4, 6).T
    (mapped,) = weights.map_private(fd, weights.write(fd, [("w", array)]))
    assert np.array_equal(mapped, array)


def test_a_write_is_seen_by_the_writer_alone(fd):
    places = weights.write(fd, [("w", np.zeros(4096, np.float32))])
    weights.seal(fd)
    (mine,) = weights.map_private(fd, places)
    (other,) = weights.map_private(fd, places)
    mine[:] = 7
    assert not other.any()
    assert os.pread(fd, 4, 0) == bytes(4)


def test_a_sealed_memfd_cannot_be_changed(fd):
    weights.write(fd, [("w", np.ones(16, np.float32))])
    weights.seal(fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 64, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def test_clear_gives_the_memory_back(fd):
    weights.write(fd, [("w", np.ones(1 << 16, np.float32))])
    assert os.fstat(fd).st_blocks > 0
    weights.clear(fd)
    assert os.fstat(fd).st_size == 0
    assert os.fstat(fd).st_blocks == 0


def test_the_descriptor_is_not_inherited_and_has_a_name(fd):
    assert not os.get_inheritable(fd)
    assert "pool-weights" in os.readlink(f"/proc/self/fd/{fd}")


def test_memory_that_is_not_there_is_an_error_and_leaves_nothing(fd):
    # A view of one item with strides of 0 claims 2^60 bytes without having them. `write` must refuse
    # before it asks the kernel, which would kill whatever runs on this machine to find that much.
    endless = np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 57,), (0,))
    assert memory.available_bytes() < endless.nbytes
    with pytest.raises(ModelLoadError, match="1,152,921,504,606,846,976 bytes of shared memory wanted; "):
        weights.write(fd, [("w", endless)])
    assert os.fstat(fd).st_size == 0


@pytest.mark.parametrize("array", [np.array([b"x"], object), np.zeros(2, "M8[s]")])
def test_dtypes_that_cannot_be_shared_are_named(fd, array):
    with pytest.raises(ModelLoadError, match=f"weight 'w' has dtype {re.escape(str(array.dtype))}"):
        weights.write(fd, [("w", array)])


def test_weights_beyond_the_memfd_are_refused(fd):
    weights.write(fd, [("w", np.zeros(16, np.float32))])
    beyond = weights.Weight(name="v", dtype="float32", shape=(17,), offset_bytes=0)
    with pytest.raises(ModelLoadError, match="end at byte 68 of a memfd of 64 bytes"):
        weights.map_private(fd, [beyond])
