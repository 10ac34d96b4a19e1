"""Regions passed to a worker, and where in them a batch lies: both ends in this process."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.shm import loans
from pool.shm.loans import LENDABLE, Borrowed, Place
from pool.signature import DTYPES


@contextlib.contextmanager
def memfd(data):
    fd = os.memfd_create("pool-region")
    os.pwrite(fd, data, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def pair():
    front, worker = loans.make_pair()
    with front, worker:
        yield front, worker


def test_a_worker_maps_what_it_was_passed_and_what_it_writes_stays_its_own(pair):
    front, worker = pair
    with memfd(b"a" * 4096) as one, memfd(b"b" * 8192) as other:
        loans.lend(front, 7, 4096, one)
        loans.lend(front, 8, 8192, other)
        borrowed = Borrowed(worker)
        assert bytes(borrowed.memory(8)) == b"b" * 8192
        assert bytes(borrowed.memory(7)) == b"a" * 4096
        os.pwrite(one, b"c", 0)
        assert bytes(borrowed.memory(7)[:2]) == b"ca", "the client's bytes, not a copy of them"
        borrowed.memory(7)[1] = 0
        assert os.pread(one, 2, 0) == b"ca"


def test_what_was_given_back_is_not_there_any_more(pair):
    front, worker = pair
    with memfd(bytes(4096)) as fd:
        loans.lend(front, 1, 4096, fd)
        borrowed = Borrowed(worker)
        assert borrowed.memory(1).nbytes == 4096
        borrowed.give_back(1)
        borrowed.give_back(1)
        with pytest.raises(BlockingIOError):
            borrowed.memory(1)


def test_what_is_given_back_unused_does_not_stay_on_its_way(pair):
    front, worker = pair
    borrowed = Borrowed(worker)
    with memfd(bytes(4096)) as fd, memfd(b"x" * 4096) as other:
        loans.lend(front, 1, 4096, fd)
        loans.lend(front, 2, 4096, other)
        borrowed.give_back(1)
        assert bytes(borrowed.memory(2)[:1]) == b"x"
        with pytest.raises(BlockingIOError):
            borrowed.memory(1)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)), max_size=20))
def test_places_are_read_as_they_were_written(given_):
    slot = np.zeros(3 * 4096, np.uint8)
    loans.write_places(slot, [Place(*each) for each in given_])
    assert loans.read_places(slot, len(given_)) == tuple(given_)


def test_nothing_that_can_be_an_index_is_lent():
    assert set(DTYPES) - LENDABLE == {"string", "int16", "int32", "int64", "uint16", "uint32", "uint64"}


def test_a_front_that_passes_more_than_is_read_is_told(pair):
    front, _ = pair

    def lend_for_ever():
        while True:
            loans.lend(front, 0, 4096, fd)

    with memfd(bytes(4096)) as fd, pytest.raises(BlockingIOError):
        lend_for_ever()
