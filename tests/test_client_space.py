"""Blocks of a region: taken and given back in any order, they never overlap and none is lost."""

from __future__ import annotations

import mmap

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pool.client.space import Space


class SpaceMachine(RuleBasedStateMachine):
    """Blocks are taken and given back in any order."""

    PAGES = 32
    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.space = Space(self.PAGES * mmap.PAGESIZE)
        self.held = {}  # offset to bytes asked for

    @rule(target=blocks, size=st.integers(1, 12 * mmap.PAGESIZE))
    def take(self, size):
        offset = self.space.take(size)
        if offset is None:
            pages = -(-size // mmap.PAGESIZE)
            assert not any(self.is_free(page, pages) for page in range(self.PAGES - pages + 1))
            return -1
        self.held[offset] = size
        return offset

    def is_free(self, page, pages):
        used = [(at // mmap.PAGESIZE, -(-(at + n) // mmap.PAGESIZE)) for at, n in self.held.items()]
        return all(page + pages <= start or page >= end for start, end in used)

    @rule(offset=consumes(blocks))
    def give_back(self, offset):
        if offset >= 0:
            self.space.give_back(offset)
            del self.held[offset]

    @invariant()
    def no_two_overlap_and_all_are_inside(self):
        ends = 0
        for offset, size in sorted(self.held.items()):
            assert offset >= ends
            assert offset % mmap.PAGESIZE == 0
            ends = offset + size
        assert ends <= self.space.size
        assert self.space.is_empty == (not self.held)

    def teardown(self):
        for offset in self.held:
            self.space.give_back(offset)
        assert self.space.take(self.space.size) == 0, "everything is free again"


TestSpace = SpaceMachine.TestCase
