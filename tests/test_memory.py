"""`pool.shm.memory`: what is available, and reserving it."""

from __future__ import annotations

import os
import sys

import psutil
import pytest

from pool.shm import memory


@pytest.fixture
def fd():
    number = os.memfd_create("test")
    yield number
    os.close(number)


def test_reserved_pages_are_there(fd):
    memory.reserve(fd, 100_000)
    status = os.fstat(fd)
    assert status.st_size == 100_000
    assert status.st_blocks * 512 >= 100_000


def test_nothing_is_reserved_for_nothing(fd):
    memory.reserve(fd, 0)
    assert os.fstat(fd).st_size == 0


def test_more_than_there_is_is_refused_before_the_kernel_is_asked(fd):
    with pytest.raises(MemoryError, match="1,152,921,504,606,846,976 bytes of shared memory wanted; "):
        memory.reserve(fd, 1 << 60)
    assert os.fstat(fd).st_size == 0


def write_group(folder, limit, used, cached):
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 9\n")


def test_control_groups_limit_what_is_available(tmp_path):
    assert memory.cgroup_available_bytes(tmp_path, "nowhere") == sys.maxsize
    write_group(tmp_path / "outer", "max", 100, 0)
    assert memory.cgroup_available_bytes(tmp_path, "outer") == sys.maxsize
    write_group(tmp_path / "outer" / "inner", 1000, 700, 50)
    assert memory.cgroup_available_bytes(tmp_path, "outer/inner") == 350
    (tmp_path / "outer" / "memory.max").write_text("300\n")
    assert memory.cgroup_available_bytes(tmp_path, "outer/inner") == 200


def test_available_memory_is_that_of_the_machine_at_most():
    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total + psutil.swap_memory().total
