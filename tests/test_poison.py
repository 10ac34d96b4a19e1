"""Remembering what killed workers."""

from __future__ import annotations

from pool.front.poison import _REMEMBERED_MAX, PoisonMemory


def test_it_is_remembered_for_so_long_and_no_longer():
    memory = PoisonMemory(10.0)
    assert not memory
    memory.remember(1, [b"ab", b"c"], "it burnt", 100.0)
    assert memory
    assert memory.find(1, [b"ab", b"c"], 104.0) == ("it burnt", 6.0)
    assert memory.find(1, [memoryview(b"ab"), b"c"], 104.0) == ("it burnt", 6.0)
    assert memory.find(1, [b"ab", b"c"], 110.0) is None
    assert not memory


def test_only_the_same_bytes_of_the_same_layout_count():
    memory = PoisonMemory(10.0)
    memory.remember(1, [b"ab", b"c"], "it burnt", 0.0)
    for layout, payloads in [(2, [b"ab", b"c"]), (1, [b"a", b"bc"]), (1, [b"abc"]), (1, [b"ab", b"d"])]:
        assert memory.find(layout, payloads, 1.0) is None


def test_with_no_time_nothing_is_remembered():
    memory = PoisonMemory(0.0)
    memory.remember(1, [b"a"], "it burnt", 0.0)
    assert not memory


def test_a_flood_pushes_out_the_oldest():
    memory = PoisonMemory(10.0)
    for n in range(_REMEMBERED_MAX + 1):
        memory.remember(n, [b"a"], "it burnt", 0.0)
    assert memory.find(0, [b"a"], 1.0) is None
    assert memory.find(1, [b"a"], 1.0) is not None


def test_what_kills_again_is_remembered_anew():
    memory = PoisonMemory(10.0)
    memory.remember(1, [b"a"], "it burnt", 0.0)
    memory.remember(2, [b"a"], "it burnt", 1.0)
    memory.remember(1, [b"a"], "it burnt twice", 5.0)
    assert memory.find(2, [b"a"], 12.0) is None
    assert memory.find(1, [b"a"], 12.0) == ("it burnt twice", 3.0)
